"""Ctrl-C at any line of nmfx.save and nmfx.load: the file and the model are whole, old or new."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fusing import X as IMAGE
from test_lower_measured import Everywhere
from test_save import STATES, Mlp, _chain, assert_same_model, randomized
from test_save_faults import state_of
from torch import nn

import nmfx


class Anywhere(Everywhere):
    """From the first line on, except where Python itself takes no signal: see `Everywhere`."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.armed = True

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        # Between two lines of `_Alone.close` no call ends.
        return None if frame.f_code.co_name == "close" else super().trace(frame, event, arg)


def interrupted(work: Callable[[], Any], at: int) -> int:
    """Runs `work` until line `at` of nmfx; returns how many lines ran."""
    everywhere, previous = Anywhere(at), sys.gettrace()
    grad = torch.is_grad_enabled()
    sys.settrace(everywhere.trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(previous)
        torch.set_grad_enabled(grad)
    return everywhere.lines


def lowered_chain() -> nn.Module:
    return nmfx.lower(nmfx.sparsify(_chain(), {"?*": "2:4"}), (IMAGE,), tune=False)


@pytest.mark.parametrize("state", ["frozen", "packed", "chain"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading(state: str, device: str, tmp_path: Path) -> None:
    make = _chain if state == "chain" else lambda: Mlp().eval()
    model = lowered_chain() if state == "chain" else STATES[state]()
    (path,) = nmfx.save(model, tmp_path / "model.safetensors")
    nmfx.load(path, into=make())  # the first run fills caches, so it runs more lines

    def fresh() -> nn.Module:
        with torch.device(device):
            return make()

    def anatomy(one: nn.Module) -> Any:
        shapes = [(k, v.device.type, tuple(v.shape)) for k, v in one.state_dict().items()]
        return [type(m).__name__ for m in one.modules()], shapes, str(nmfx.report(one))

    total = interrupted(lambda: nmfx.load(path, into=fresh()), -1)
    assert total > 300
    outcomes = set()
    for at in range(1, total + 1, max(1, total // 100)):
        into = fresh()
        start = copy.deepcopy(into)
        interrupted(lambda: nmfx.load(path, into=into), at)  # noqa: B023
        done = anatomy(into) == anatomy(model)
        outcomes.add(done)
        if done:
            assert_same_model(into, model)
            if device == "cpu":
                assert state_of(into) == state_of(model)
        else:
            assert anatomy(into) == anatomy(start), at
            if device == "cpu":
                assert state_of(into) == state_of(start), at
        # Whatever it is, it can be loaded into.
        assert_same_model(nmfx.load(path, into=into), model)
    assert outcomes == {True, False}


@pytest.mark.parametrize("size", ["1GB", "2KB"])
def test_saving(size: str, tmp_path: Path) -> None:
    old, new = STATES["frozen"](), randomized(STATES["sparse"]())

    def work(folder: Path) -> None:
        nmfx.save(new, folder, max_shard_size=size)

    warm = tmp_path / "warm"
    warm.mkdir()
    work(warm)  # the first run fills caches, so it runs more lines
    nmfx.save(old, warm, max_shard_size="2KB")
    total = interrupted(lambda: work(warm), -1)
    outcomes = set()
    last = range(total - 25, total + 1)  # where the new file is in its place
    for at in (*range(1, last[0], max(1, total // 100)), *last):
        folder = tmp_path / str(at)
        folder.mkdir()
        nmfx.save(old, folder, max_shard_size="2KB")
        interrupted(lambda: work(folder), at)  # noqa: B023
        found = nmfx.load(folder, into=Mlp())
        done = nmfx.report(found).rows[0].state == "sparse"
        outcomes.add(done)
        assert_same_model(new if done else old, found)
        written = nmfx.save(new, folder, max_shard_size=size)
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in written)
    assert outcomes == {True, False}
