"""One small sparsified model for each way of capture, and what nmfx says about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import nmfx
from nmfx.mask import nm_mask

X = torch.linspace(-1, 1, 96).view(6, 16)
RULES = {"0": "2:4", "2": "2:4"}


def dense() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


# One model for each way of capture, all of them two 2:4 weights and an input of (6, 16).
CAPTURES: dict[str, Callable[[], nn.Module]] = {
    "leaf": lambda: nmfx.sparsify(dense(), RULES),
    "graph": lambda: nmfx.sparsify(fx.symbolic_trace(dense()), RULES),
    "scoped": lambda: nmfx.sparsify(Attention(), "2:4"),
}
captures = pytest.mark.parametrize("capture", CAPTURES)


def patterns(model: nn.Module) -> list[str]:
    return [row.pattern.text for row in nmfx.report(model) if row.pattern is not None]


def lambdas(model: nn.Module) -> list[float | None]:
    return [row.lambda_w for row in nmfx.report(model)]


def states(model: nn.Module) -> list[str]:
    return [row.state for row in nmfx.report(model)]


def assert_masks_are(model: nn.Module, *wanted: str) -> None:
    found = nmfx.masks(model)
    for (name, mask), pattern in zip(found.items(), wanted, strict=True):
        assert torch.equal(mask, nm_mask(model.get_parameter(name), pattern, 1)), (
            f"{name} {pattern}"
        )
