"""The models of `bench_train_step.py`: random weights, random inputs, a loss and an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from resnet import ResNet50
from torch import Tensor, nn

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


MODELS: dict[str, Callable[[bool], Made]] = {"bert-base": bert, "resnet50": resnet50}


class _LastHidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(tokens).last_hidden_state


def _square(out: Tensor) -> Tensor:
    return out.float().square().mean()
