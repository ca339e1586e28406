"""Methods, and what came of each: one row of a table, one line of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")

# lambda_W = 0 is STE; a method is (pattern or None for dense, lambda_W).
Method = tuple[str | None, float]


@dataclass(frozen=True)
class Row(Generic[ResultT]):
    """One method; `results[i]` belongs to the i-th shown seed."""

    pattern: str | None
    lambda_w: float
    results: list[ResultT]

    @property
    def name(self) -> str:
        if not self.pattern:
            return "dense"
        return f"{self.pattern} {'SR-STE' if self.lambda_w else 'STE'}"


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean +- sample standard deviation; the mean alone of one value."""
    mean = format(fmean(values), form)
    return f"{mean} +- {format(stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def seeds_text(seeds: range) -> str:
    """Such as "seeds 0..2"."""
    return f"seeds {seeds[0]}..{seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
