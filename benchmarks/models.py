"""The whole models of `bench_cpu_model.py`, with random weights and nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from resnet import ResNet50, fuse
from torch import Tensor, nn


def llama(quick: bool) -> tuple[nn.Module, Tensor]:
    """Llama-like decoder blocks, hidden states of one token, no cache: 202M weights."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=64 if quick else 2048,
        intermediate_size=128 if quick else 5504,
        num_hidden_layers=1 if quick else 4,
        num_attention_heads=2 if quick else 16,
        vocab_size=8,
        use_cache=False,
    )
    return _Blocks(LlamaModel(config)), torch.randn(1, 1, config.hidden_size)


def mixtral(quick: bool) -> tuple[nn.Module, Tensor]:
    """Mixtral-like decoder blocks, one token, 2 of 8 experts per block, no cache: 144M weights."""
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        hidden_size=64 if quick else 1024,
        intermediate_size=128 if quick else 2816,
        num_hidden_layers=1 if quick else 2,
        num_attention_heads=2 if quick else 16,
        num_key_value_heads=2 if quick else 16,
        vocab_size=8,
        use_cache=False,
    )
    return _Blocks(MixtralModel(config)), torch.randn(1, 1, config.hidden_size)


def gpt2(quick: bool) -> tuple[nn.Module, Tensor]:
    """GPT-2-small-shaped blocks (torch linears, not Conv1D), 8 rows, no cache: 85M weights."""
    width, depth = (64, 1) if quick else (768, 12)
    return nn.Sequential(*[Block(width, width // 64) for _ in range(depth)]), torch.randn(
        1, 8, width
    )


def bert(quick: bool) -> tuple[nn.Module, Tensor]:
    """BERT-base encoder, hidden states of 128 tokens."""
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = BertConfig(
        num_hidden_layers=1 if quick else 12, vocab_size=8, **(small if quick else {})
    )
    return _Blocks(BertModel(config, add_pooling_layer=False)), torch.randn(
        1, 128, config.hidden_size
    )


def encoder(quick: bool) -> tuple[nn.Module, Tensor]:
    """torch's own nn.TransformerEncoder in BERT-base's size, 16 tokens: 85M weights."""
    width, depth = (64, 1) if quick else (768, 12)
    layer = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, activation="gelu", batch_first=True
    )
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(encoder), torch.randn(1, 16, width)


def resnet50(quick: bool) -> tuple[nn.Module, Tensor]:
    """ResNet-50, one image, batch norms folded."""
    side = 32 if quick else 224
    return fuse(ResNet50().eval()), torch.randn(1, 3, side, side)


MODELS: dict[str, tuple[Callable[[bool], tuple[nn.Module, Tensor]], tuple[str, ...]]] = {
    "llama-1-token": (llama, ("fp32", "bf16")),
    "mixtral-1-token": (mixtral, ("fp32",)),
    "gpt2-8-rows": (gpt2, ("fp32",)),
    "bert-128": (bert, ("fp32",)),
    "encoder-16": (encoder, ("fp32",)),
    "resnet50": (resnet50, ("fp32",)),
}


class _Blocks(nn.Module):
    """A Hugging Face model from embeddings to last hidden state, one tensor in and out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(inputs_embeds=x).last_hidden_state


class Block(nn.Module):
    """A pre-norm transformer block as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


def prepare(name: str, dtype: str, quick: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name][0](quick)
    to = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return model.eval().requires_grad_(False).to(to), x.to(to)
