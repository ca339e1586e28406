"""Models that `lower` gives two forms on any machine: a fake timer lets each form win somewhere.

Annotations are evaluated here: torch cannot pickle a graph that has them as texts.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import FakeTimer, install
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import nmfx

FEW, MANY, THRESHOLD = 4, 36, 12  # sqrt(4 * 36)
X = torch.linspace(-2, 2, MANY * 64).sin().reshape(MANY, 64)
CALLS = [(X[:FEW],), (X,)]
KEEP = ("packed", "dense")
SIDES = [1, FEW, THRESHOLD, THRESHOLD + 1, MANY]  # rows


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64, bias=False)
        self.gpt, self.head = Conv1D(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gpt(self.fc2(self.act(self.fc1(x)))))


class Reads(nn.Module):
    """Weights that only a graph sees, one of them added by addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.randn(64, 64) / 8) for _ in "uv")
        self.b = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, F.linear(x, self.u).relu(), self.v)


TWO = {"leaf": ["fc1.weight", "fc2.weight", "gpt.weight"], "graph": ["u", "v"]}


def dense(capture: str) -> nn.Module:
    return (fx.symbolic_trace(Reads()) if capture == "graph" else Mlp()).eval()


def sparse(capture: str) -> nn.Module:
    rules = {"": "2:4"} if capture == "graph" else {"head": None, "*": "2:4"}
    return nmfx.sparsify(dense(capture), rules)


def each_wins_somewhere(few: str = "packed", many: str = "dense") -> Any:
    """Milliseconds: `few` is the fastest for up to 12 rows, `many` above."""
    slow = {"dense": 5.0, "prepacked": 5.0, "packed": 5.0, "semi_structured": 5.0}
    return lambda rows: {**slow, few if rows <= THRESHOLD else many: 1.0}


def timed(monkeypatch: pytest.MonkeyPatch, *forms: str, **kwargs: Any) -> FakeTimer:
    return install(monkeypatch, each_wins_somewhere(*forms), **kwargs)


def states(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.state for row in nmfx.report(model)}
