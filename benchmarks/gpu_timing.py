"""Interleaved timing on a GPU: events around each call, with its caches emptied before it."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from timing import Timing

# Zeroed before each call: several times the largest L2. It also gives the host time to queue the
# call behind it, so that the events see the GPU at work and not a launch on its way.
_FLUSHED = 512 << 20


def interleave(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times all candidates round-robin, each from cold caches."""
    flushed = torch.empty(_FLUSHED, dtype=torch.int8, device="cuda")
    for call in candidates.values():
        call()  # the first call compiles
        call()
    return _in_turn(candidates, rounds, flushed.zero_)


def interleave_graphs(
    candidates: dict[str, list[Callable[[], object]]], rounds: int
) -> dict[str, Timing]:
    """Times all candidates round-robin, each captured in a CUDA graph: what their kernels take.

    Args:
        candidates: each the same call on so many copies of its tensors that together they do not
            fit into the cache; a graph runs them one after the other, and the time is that of one.
        rounds: how often each graph is replayed.
    """
    replays = {}
    for name, calls in candidates.items():
        calls[0]()  # the first call compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        replays[name] = graph.replay
    found = _in_turn(replays, rounds, lambda: None)
    return {
        name: Timing(t.median / len(candidates[name]), t.min / len(candidates[name]), t.rounds)
        for name, t in found.items()
    }


def _in_turn(
    candidates: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object]
) -> dict[str, Timing]:
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    names = list(candidates)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            before()
            pair[0].record()
            candidates[name]()
            pair[1].record()
            events.setdefault(name, []).append(pair)
    torch.cuda.synchronize()
    times = {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}
    return {name: Timing(statistics.median(ms), min(ms), len(ms)) for name, ms in times.items()}


def gpu() -> str:
    """The GPU, as in the names of the result files."""
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
