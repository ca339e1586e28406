"""Timing several ways to do one thing, so that their ratios mean something.

    round 1   A B C        every round runs each candidate once, so that a slow moment of a shared
    round 2   A B C        machine hits all of them; the median of each forgets it
    ...

A layer of a model that does not fit into the last-level cache meets its weights in DRAM. Timed
again and again by itself it would find them in the cache, and every layout would look alike, so
`evict` pushes them out between two runs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import NMError
from .cuda_graph import capture

# Per layer and shape. On a shared 2-core machine the medians of 0.2 s were within 2 % of those of
# 2 s for all shapes of ops/linear_prepacked.py that take longer than 0.3 ms.
BUDGET_S = 0.2
MIN_ROUNDS, MAX_ROUNDS = 9, 60

# A candidate that took twice as long as the fastest in each of the first rounds is not run again:
# the time goes to those that are close.
_ROUNDS_TO_DROP = 3
_HOPELESS = 2.0

# Where half the runs take more than twice as long as the shortest, something else has the CPU in
# between (a thread of a pool that has to be woken waits for its turn): medians time that, not this.
_BUSY = 2.0


class Times(dict[str, float]):
    """{name: milliseconds of one run}: medians, or of a busy machine the shortest runs."""

    busy = False


def measure(
    candidates: Mapping[str, Callable[[], object]],
    evict: Callable[[], object] | None = None,
    budget_s: float = BUDGET_S,
    device: torch.device | None = None,
    captured: bool = True,
) -> Times:
    """Runs all candidates in turn until the budget is spent.

    Args:
        candidates: functions without arguments, by name.
        evict: called before every run, outside the time; None for weights that stay in the cache.
        budget_s: wall time to spend, warm-up not counted.
        device: a GPU that the runs keep busy: then its time is taken, and not the host's.
        captured: on a GPU, time CUDA graphs of the runs, if all can be captured: some take the host
            longer to launch than any lead that it could be given.

    Returns:
        {name: milliseconds of one run}; `busy` tells of what kind.
    """
    for run in candidates.values():  # code and tables are loaded, weights laid out
        run()
    seconds = _host_seconds
    if device is not None and device.type == "cuda":
        seconds = partial(_gpu_seconds, device)
        if captured:
            candidates = _replays(candidates, device)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    running = dict(candidates)
    end = time.perf_counter() + budget_s
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        if done == _ROUNDS_TO_DROP:
            limit = _HOPELESS * min(max(times) for times in samples.values())
            running = {k: run for k, run in running.items() if min(samples[k]) < limit}
        for name, run in running.items():
            if evict is not None:
                evict()
            samples[name].append(seconds(run))
    found = Times({name: statistics.median(times) * 1e3 for name, times in samples.items()})
    shortest = {name: min(times) * 1e3 for name, times in samples.items()}
    if any(found[name] > _BUSY * shortest[name] for name in running):
        found.update(shortest)
        found.busy = True
    return found


def _host_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _replays(
    candidates: Mapping[str, Callable[[], object]], device: torch.device
) -> Mapping[str, Callable[[], object]]:
    """CUDA graphs of the runs; the runs where there can be none of one, as all must be alike."""
    pool = torch.cuda.graph_pool_handle()  # one for all, or each would keep its result
    try:
        replays = {name: capture(run, device, pool) for name, run in candidates.items()}
    except NMError:
        return candidates
    for replay in replays.values():
        replay()
    return replays


# Clock cycles that a GPU waits before a run, about 0.6 ms: by then the host has launched all of
# the run, and what is timed are its kernels, as in a CUDA graph or behind other layers.
_LEAD_CYCLES = 1_000_000


def _gpu_seconds(device: torch.device, run: Callable[[], object]) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_LEAD_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def make_evict(
    model: nn.Module,
    size: int,
    but: Callable[[], Tensor | None] = lambda: None,
    device: torch.device | None = None,
) -> Callable[[], object]:
    """A function that reads `size` bytes, after which a cache of half that size holds no others.

    It reads the model's own weights on `device` (the CPU), which take no extra memory, except for
    the one that `but()` returns: the layer that is being timed. What the model lacks, a scratch
    buffer adds.
    """
    device = torch.device("cpu") if device is None else device
    scratch = torch.zeros(0, dtype=torch.int64, device=device)

    def evict() -> None:
        nonlocal scratch
        left, skipped = size, but()
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if left <= 0:
                return
            if tensor is not skipped and tensor.device == device and tensor.numel():
                tensor.detach().sum()
                left -= tensor.nbytes
        if left > 0:
            if scratch.nbytes < left:
                scratch = torch.zeros(-(-left // 8), dtype=torch.int64, device=device)
            scratch.sum()

    return evict
