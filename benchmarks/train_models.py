"""Models of the training-step benchmarks: random weights and inputs, a loss, an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from resnet import ResNet50
from torch import Tensor, nn

from nmfx.demo.lm.model import make_model

Made = tuple[nn.Module, tuple[Tensor, ...], Callable[[Tensor], Tensor], Callable[..., Any]]


def bert(quick: bool) -> Made:
    """A BERT-base encoder over 4 sequences of 128 tokens, AdamW."""
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = BertConfig(
        num_hidden_layers=1 if quick else 12, **(small | {"vocab_size": 64} if quick else {})
    )
    model = _LastHidden(BertModel(config, add_pooling_layer=False)).train()
    tokens = torch.randint(config.vocab_size, (4, 128))
    return model, (tokens,), _square, lambda parameters: torch.optim.AdamW(parameters, lr=1e-5)


def resnet50(quick: bool) -> Made:
    """ResNet-50 on 8 images of 224 x 224, SGD with momentum."""
    side = 32 if quick else 224
    return (
        ResNet50().train(),
        (torch.randn(8, 3, side, side),),
        _square,
        lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    )


def byte_lm(quick: bool) -> Made:
    """The GPT of `python -m nmfx demo --task lm`, 4 windows of 128 bytes, AdamW."""
    model = make_model(width=128, layers=1 if quick else 3, heads=4, context=128, seed=0)
    text = torch.randint(256, (4, 129))
    following = text[:, 1:].flatten()
    return (
        model.train(),
        (text[:, :-1].contiguous(),),
        lambda out: F.cross_entropy(out.flatten(0, 1), following),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    )


def vit_l(quick: bool) -> Made:
    """ViT-L/16 on 128 images of 224 x 224, fused AdamW; for a GPU."""
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    config = ViTConfig(num_hidden_layers=2 if quick else 24, **(small if quick else large))
    model = _LastHidden(ViTModel(config, add_pooling_layer=False)).train()
    return model, (torch.randn(2 if quick else 128, 3, 224, 224),), _square, _fused_adamw


def llama_1b(quick: bool) -> Made:
    """A Llama of 1.1 billion parameters (TinyLlama's shapes), 4 x 2048 tokens; for a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64 if quick else 2048,
        intermediate_size=128 if quick else 5632,
        num_hidden_layers=2 if quick else 22,
        num_attention_heads=2 if quick else 32,
        num_key_value_heads=1 if quick else 4,
        vocab_size=256 if quick else 32000,
        use_cache=False,
    )
    model = _Logits(LlamaForCausalLM(config)).train()
    tokens = torch.randint(config.vocab_size, (1, 33) if quick else (4, 2049))
    following = tokens[:, 1:].flatten()
    return (
        model,
        (tokens[:, :-1].contiguous(),),
        lambda out: F.cross_entropy(out.flatten(0, 1), following),
        _fused_adamw,
    )


CPU_MODELS: dict[str, Callable[[bool], Made]] = {
    "bert-base": bert,
    "resnet50": resnet50,
    "byte-lm": byte_lm,
}
GPU_MODELS: dict[str, Callable[[bool], Made]] = {"llama-1b": llama_1b, "vit-l": vit_l}


def _fused_adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-6, fused=True)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(tokens).logits


class _LastHidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Any:
        return self.model(input).last_hidden_state


def _square(out: Tensor) -> Tensor:
    return out.float().square().mean()
