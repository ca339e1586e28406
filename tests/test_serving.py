"""A lowered model that serves for long: many threads, many calls, memory that stays flat."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fake_timer import PACKED_WINS, PREPACKED_WINS, install
from torch import Tensor, nn

import nmfx

THREADS, CALLS = 8, 10_000
WINDOWS = 4


def resident() -> int:
    """Anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    pytest.skip("this system does not tell the memory of a process")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x)).mean(1).flatten(1)
        return self.fc2(self.fc1(y).relu())


@pytest.mark.parametrize("ms", [PACKED_WINS, PREPACKED_WINS])
def test_eight_threads_and_ten_thousand_calls(
    ms: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, ms)
    inputs = [torch.randn(rows, 8, 8, 8) for rows in (1, 2, 5)]
    model = nmfx.lower(nmfx.sparsify(Net().eval(), {"?*": "2:4"}), [(x,) for x in inputs])
    assert {row.state for row in nmfx.report(model)} & {"packed", "prepacked"}
    with torch.inference_mode():
        wanted = [model(x) for x in inputs]
    wrong, memory = [], []
    per_thread = CALLS // THREADS
    looked_at = {per_thread * (window + 1) // (WINDOWS + 1) for window in range(WINDOWS + 1)}
    barrier = threading.Barrier(THREADS)

    def serve(thread: int) -> None:
        barrier.wait()
        with torch.inference_mode():
            for call in range(per_thread):
                which = (thread + call) % len(inputs)
                if not torch.equal(model(inputs[which]), wanted[which]):
                    wrong.append((thread, call))
                if thread == 0 and call + 1 in looked_at:
                    memory.append(resident())

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(serve, range(THREADS)))
    assert not wrong
    assert steady_growth(memory) < 2**19


@pytest.mark.parametrize("inplace", [False, True])
def test_hundreds_of_lowered_models_leave_nothing_behind(
    inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = install(monkeypatch, PACKED_WINS)
    x = torch.ones(2, 64)

    def cycle() -> None:
        model = nmfx.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), "2:4")
        nmfx.lower(model.eval(), (x,), inplace=inplace)(x)
        timer.asked.clear()

    flat_after(cycle, 300 if inplace else 1000)


def test_saving_and_loading_over_and_over_leaves_nothing_behind(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    model = nmfx.lower(nmfx.sparsify(make(), "2:4"), tune=False)
    flat_after(lambda: nmfx.load(nmfx.save(model, tmp_path)[0], into=make()), 300)


def steady_growth(memory: list[int]) -> int:
    """By how much memory grows at least from one look to the next, in bytes.

    A leak grows in every window. What else the process does, and the allocator's arenas for
    threads, may grow by megabytes, once.
    """
    assert len(memory) == WINDOWS + 1
    return min(later - earlier for earlier, later in itertools.pairwise(memory))


def flat_after(cycle: Callable[[], object], count: int) -> None:
    memory, objects = [], []
    for _ in range(WINDOWS + 1):
        for _ in range(count // (WINDOWS + 1)):
            cycle()
        gc.collect()
        memory.append(resident())
        objects.append(len(gc.get_objects()))
    assert steady_growth(memory) < 2**19
    assert steady_growth(objects) < 20
