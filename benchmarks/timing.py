"""Interleaved timing: every candidate sees the same drift of the machine."""

from __future__ import annotations

import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Timing(NamedTuple):
    """Milliseconds per call, and how many of the rounds they come from."""

    median: float
    min: float
    rounds: int


def interleave(
    candidates: dict[str, Callable[[], object]], rounds: int, min_time: float
) -> dict[str, Timing]:
    """Times all candidates round-robin in this process.

    In each round each candidate is called until about `min_time` seconds have passed. Rounds of a
    candidate during which the kernel took the CPU away are left out, if enough others remain.
    """
    calls = {name: _calibrate(call, min_time) for name, call in candidates.items()}
    samples: dict[str, list[tuple[float, bool]]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds):
        # Rotated, so that nobody always runs after the same neighbour (its caches, its clock).
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_measure(candidates[name], calls[name]))
    return {name: _summary(found) for name, found in samples.items()}


def _calibrate(call: Callable[[], object], min_time: float) -> int:
    call()  # the first call allocates, packs or compiles
    start = time.perf_counter()
    call()
    return max(1, round(min_time / (time.perf_counter() - start)))


def _measure(call: Callable[[], object], calls: int) -> tuple[float, bool]:
    """(ms per call, whether no thread of this process was preempted)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - start
    clean = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == before
    return seconds / calls * 1e3, clean


def _summary(samples: list[tuple[float, bool]]) -> Timing:
    clean = [ms for ms, is_clean in samples if is_clean]
    # A median of fewer than three, or of a small minority, would be worse than the noise.
    kept = clean if len(clean) >= max(3, len(samples) // 3) else [ms for ms, _ in samples]
    return Timing(statistics.median(kept), min(kept), len(kept))


def last_level_cache() -> int:
    """Bytes of the largest cache that the system reports; 32 MiB if it reports none."""
    found = [32 << 20] if not (files := _cache_files()) else [_size(path) for path in files]
    return max(found)


def _cache_files() -> list[Path]:
    # Not `getconf LEVEL3_CACHE_SIZE`: on some virtual machines it multiplies by all the sockets.
    return sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))


def _size(path: Path) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="utf-8").strip())
    assert found is not None, f"{path} is not a cache size"
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]
