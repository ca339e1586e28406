"""The timer interleaves, evicts before every run, and stops; sizes of caches are read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nmfx.errors import NMError
from nmfx.tuning import hardware, timer


def test_timer_runs_candidates_in_turn() -> None:
    order: list[str] = []
    candidates = {name: (lambda name=name: order.append(name)) for name in "abc"}
    ms = timer.measure(candidates, lambda: order.append("-"), budget_s=0.0)
    assert "".join(order).startswith("abc" + "-a-b-c" * 3)
    assert set(ms) == set("abc")
    assert all(value >= 0 for value in ms.values())


def test_timer_spends_no_time_on_the_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    now, runs = [0.0], {"slow": 0, "a": 0, "b": 0}

    def taking(name: str, seconds: float) -> None:
        now[0] += seconds
        runs[name] += 1

    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])
    ms = timer.measure(
        {
            "slow": lambda: taking("slow", 0.1),
            "a": lambda: taking("a", 1e-3),
            "b": lambda: taking("b", 1.5e-3),
        }
    )
    assert ms == pytest.approx({"slow": 100.0, "a": 1.0, "b": 1.5})
    assert runs["slow"] == 4, "one to warm up, three to see"
    assert runs["a"] == runs["b"] >= 1 + timer.MIN_ROUNDS


def test_timer_reports_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = itertools.cycle([1e-3, 2e-3, 9e-3])  # seconds of the runs, one after the other
    now = [0.0]

    def run() -> None:
        now[0] += next(lengths)

    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])
    ms = timer.measure({"a": run}, budget_s=0.05)
    assert ms["a"] == pytest.approx(2.0)


def test_of_a_busy_machine_the_shortest_runs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = itertools.cycle([1e-3, 7e-3, 8e-3])
    now = [0.0]

    def run() -> None:
        now[0] += next(lengths)

    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])
    ms = timer.measure({"a": run}, budget_s=0.05)
    assert ms["a"] == pytest.approx(1.0)
    assert ms.busy


def test_timer_is_bounded() -> None:
    runs: list[int] = []
    timer.measure({"a": lambda: runs.append(0)}, budget_s=60.0)
    assert len(runs) == 1 + timer.MAX_ROUNDS


def test_evict_reads_the_model_but_not_the_timed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    read: list[torch.Tensor] = []
    total = torch.Tensor.sum

    def watched(self: torch.Tensor, *args: object) -> torch.Tensor:
        read.append(self)
        return total(self, *args)

    monkeypatch.setattr(torch.Tensor, "sum", watched)
    size = 64 * 64 * 4
    timer.make_evict(model, 2 * size, lambda: model[1].weight)()
    addresses = [tensor.data_ptr() for tensor in read]
    assert model[0].weight.data_ptr() in addresses
    assert model[1].weight.data_ptr() not in addresses
    assert sum(tensor.nbytes for tensor in read) == 2 * size, "a scratch buffer adds the rest"


@pytest.mark.parametrize(
    ("text", "size"),
    [("32768K\n", 2**25), ("1M", 2**20), ("512", 512), ("1G", 2**30), ("", 0), ("x", 0)],
)
def test_hardware_parses_cache_sizes(text: str, size: int) -> None:
    assert hardware.parse_size(text) == size


def test_hardware_is_described() -> None:
    assert re.search(r", (DEFAULT|AVX2|AVX512|NEON|SVE\w*|.*)$", hardware.cpu_model())
    assert hardware.cache_bytes() >= 2**18
    assert hardware.kernel_status()


def test_a_cache_larger_than_the_cores_can_have_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(hardware, "parse_size", lambda text: 480 * 2**20)
    assert hardware._cpu_cache_bytes.__wrapped__() == 16 * 2**20


def test_on_a_gpu_graphs_are_timed_where_there_can_be_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host's time to launch is no part of a kernel's: cuSPARSELt takes 0.6 ms for a call."""
    seen: list[str] = []

    def capture(
        run: Callable[[], object], device: torch.device, pool: object
    ) -> Callable[[], object]:
        if run is odd:
            raise NMError("it cannot be captured")
        assert pool == "pool"
        return lambda: "replay"

    def seconds(device: torch.device, run: Callable[[], object]) -> float:
        seen.append(str(run()))
        return 1e-3

    def even() -> str:
        return "even"

    def odd() -> str:
        return "odd"

    monkeypatch.setattr(timer, "capture", capture)
    monkeypatch.setattr(timer, "_gpu_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    device = torch.device("cuda")
    assert timer.measure({"a": even}, budget_s=0.0, device=device) == {"a": 1.0}
    assert set(seen) == {"replay"}
    seen.clear()
    # Where one cannot be captured none is: a graph is no match for what the host launches.
    assert timer.measure({"a": even, "b": odd}, budget_s=0.0, device=device) == {"a": 1.0, "b": 1.0}
    assert set(seen) == {"even", "odd"}
    seen.clear()
    timer.measure({"a": even}, budget_s=0.0, device=device, captured=False)
    assert set(seen) == {"even"}
