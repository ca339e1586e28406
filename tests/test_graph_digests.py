"""Digests of graphs: equal for the same code in other words, and for nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nmfx.storage.graphs import graph_digests


def traced_code(code: str) -> fx.GraphModule:
    """The graph of an expression of x and y, with a weight w and modules relu and layer."""
    root = nn.Module()
    root.w, root.relu, root.layer = nn.Parameter(torch.ones(4, 4)), nn.ReLU(), nn.Linear(4, 4)
    names = {"F": F, "torch": torch, "aten": torch.ops.aten}

    class Expression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__.update(root.__dict__)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return eval(code, names, {"x": x, "y": y, "self": self})

    return fx.symbolic_trace(Expression())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("F.linear(x, self.w)", "aten.linear.default(x, self.w)", True),
        ("F.linear(x, self.w)", "F.linear(y, self.w)", False),
        ("F.linear(x, self.w)", "F.linear(x, self.w.t())", False),
        ("F.linear(x, self.w)", "F.linear(x, self.layer.weight)", False),
        ("F.linear(x, self.w)", "F.linear(x, self.w, self.layer.bias)", False),
        ("torch.addmm(x, y, self.w)", "aten.addmm.default(x, y, self.w)", True),
        ("torch.addmm(x, y, self.w)", "torch.addmm(x, y, self.w, beta=2)", False),
        ("F.relu(F.linear(x, self.w))", "self.relu(F.linear(x, self.w))", True),
        ("F.relu(F.linear(x, self.w))", "torch.relu_(F.linear(x, self.w))", True),
        ("F.relu(F.linear(x, self.w))", "F.silu(F.linear(x, self.w))", False),
        ("F.gelu(x + y)", "F.gelu(x + y, approximate='tanh')", False),
        ("(x, F.relu(x))", "(x, torch.relu_(x))", False),  # the first x is another then
        ("self.layer(x)", "self.relu(x)", False),
        ("x - y", "y - x", False),
        ("x + 1", "x + 2", False),
        ("F.conv1d(x, self.w)", "aten.conv1d.default(x, self.w)", True),
        ("F.conv1d(x, self.w)", "F.conv1d(x, self.w, stride=2)", False),
    ],
)
def test_a_digest_tells_other_code_from_other_words_for_it(
    one: str, other: str, same: bool
) -> None:
    digests = [graph_digests(traced_code(code)) for code in (one, other)]
    assert (digests[0] == digests[1]) is same
