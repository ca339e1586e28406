"""A study as plain numbers, for `--json`: those of its table, and each seed's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from .meter import Packed
from .rows import Row


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """What `rows.spread` writes, and the values, one per shown seed; no deviation of one value."""
    deviation = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "deviation": deviation, "each": list(values)}


def flips_of(row: Row[Any]) -> float | None:
    """Mean share of mask entries that one step changed; None if dense."""
    rates = [share for result in row.results for _, share in result.flips]
    return fmean(rates) if row.pattern else None


def sad_of(row: Row[Any]) -> float | None:
    """Mean share of mask entries that differ at the end; None if dense."""
    return fmean(result.sad for result in row.results) if row.pattern else None


def numbers_of(row: Row[Any]) -> dict[str, Any]:
    """One method: what the tables of both tasks have in common."""
    packed: list[Packed] = [result.packed for result in row.results if result.packed]
    return {
        "method": row.name,
        "pattern": row.pattern,
        "lambda_w": row.lambda_w,
        "flips": flips_of(row),
        "sad": sad_of(row),
        "density": fmean(result.density for result in row.results),
        "max_difference": max((one.max_difference for one in packed), default=None),
        "folded_bytes": packed[0].folded_bytes if packed else None,
        "lowered_bytes": packed[0].lowered_bytes if packed else None,
    }
