"""The recorder: what each weight meets, in leaf, scoped and graph capture, masked or folded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nmfx
from nmfx.tuning.shapes import Recorder, Seen, make_input


def record(model: nn.Module, *inputs: Tensor) -> dict[str, dict[Seen, int]]:
    recorder = Recorder(dict(model.named_parameters()))
    with recorder, torch.no_grad():
        for x in inputs:
            model(x)
    return {name: dict(seen) for name, seen in recorder.seen.items() if seen}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.fc = nn.Linear(8, 8)
        self.gpt = Conv1D(8, 8)
        self.free = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).transpose(1, 2)
        return F.linear(self.gpt(self.fc(self.fc(h.contiguous()))), self.free)


LINEAR = Seen((8, 8), (8, 1), "torch.float32", bias=True)


@pytest.mark.parametrize("state", ["dense", "sparse", "frozen", "folded"])
def test_shapes_of_leaves(state: str) -> None:
    model = Net()
    if state != "dense":
        nmfx.sparsify(model, {"conv": "2:4", "fc": "2:4", "gpt": "1:4"})
    if state == "frozen":
        nmfx.freeze(model)
    if state == "folded":
        model = nmfx.fold(model)
    x = torch.randn(2, 4, 4, 4)
    found = record(model, x, x.to(memory_format=torch.channels_last))
    assert found["fc.weight"] == {LINEAR: 4}, "rows of a batch count together, and every call"
    assert found["gpt.weight"] == {LINEAR: 2}
    assert found["free"] == {Seen((8, 8), (8, 1), "torch.float32"): 2}
    contiguous, last = found["conv.weight"]
    assert (contiguous.shape, contiguous.strides) == ((2, 4, 4, 4), (64, 16, 4, 1))
    assert (last.shape, last.strides) == ((2, 4, 4, 4), (64, 1, 16, 4))
    assert contiguous.rest == (
        *(("stride", (2, 2)), ("padding", (1, 1)), ("dilation", (1, 1)), ("groups", 1)),
    )
    assert contiguous.rows == 2


def test_shapes_of_graphs() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w)

    x = torch.randn(8, 8)
    for gm in (torch.fx.symbolic_trace(Free()), torch.export.export(Free(), (x,)).module()):
        expected = {"w": {Seen((8, 8), (8, 1), "torch.float32"): 1}}
        assert record(gm, x) == expected
        assert record(nmfx.sparsify(gm, {"": "1:4"}), x) == expected


def test_shapes_with_gaps_count_as_contiguous() -> None:
    fc = nn.Linear(4, 4)
    wide = torch.randn(3, 8)
    for x in (wide[:, :4], wide[:1, :4].expand(3, 4), torch.randn(4)):
        (seen,) = record(fc, x)["weight"]
        rows = x.numel() // 4
        assert (seen.rows, seen.strides) == (rows, (4, 1))
        assert make_input(seen, x.device).shape == (rows, 4)


def test_shapes_under_autocast() -> None:
    fc = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        (seen,) = record(fc, torch.randn(3, 4))["weight"]
    assert (seen.dtype, seen.autocast) == ("torch.float32", "torch.bfloat16")


def test_made_inputs_are_like_the_seen_ones_and_use_no_random_state() -> None:
    before = torch.get_rng_state()
    x = make_input(Seen((2, 4, 3, 3), (36, 1, 12, 4), "torch.bfloat16"), torch.device("cpu"))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (x.dtype, x.shape) == (torch.bfloat16, (2, 4, 3, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert x.float().std() > 0.1
