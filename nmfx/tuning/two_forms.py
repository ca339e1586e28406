"""Two forms of one weight: is a layer faster that chooses between them by the rows of its input?

    rows      1     8  |  4096          milliseconds, times how often each number of rows came
    packed    1     1  |  900     <-    least in total up to 8 rows
    dense     3     3  |  400     <-    least in total from 4096 rows on
                       181              the threshold: sqrt(8 * 4096)

The threshold is the geometric middle of the two measured numbers of rows that it lies between:
nothing is known of what lies there, and both may be off by the same factor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..capture.forms import TWO_FORMS, forms_of
from ..errors import NMError
from .decide import DENSE, PACKED, SEMI, TIE, Choice, Timing, as_fast

FORMS = (PACKED, SEMI, DENSE)  # those that may be kept beside one another


def check_keep(keep: Any, tune: bool) -> None:
    """Checks the argument `keep` of `nmfx.lower`.

    Raises:
        NMError: it is neither None nor two of `FORMS`, or nothing is measured to choose by.
    """
    if keep is None:
        return
    fits = isinstance(keep, (tuple, list)) and len(keep) == 2
    if not fits or sum(form in keep for form in FORMS) != 2:
        raise NMError(
            f"keep={keep!r} does not name two forms of a weight; give two of "
            f'"packed", "semi_structured" and "dense", like keep=("packed", "dense"), or None'
        )
    if not tune:
        raise NMError(
            f"keep={keep!r} with tune=False: which number of rows gets which form is measured; "
            f"leave tune=True, or keep=None"
        )


@dataclass(frozen=True)
class _Split:
    """One way to share the measured numbers of rows among two forms."""

    state: str
    few: tuple[int, ...]
    many: tuple[int, ...]
    ms: float

    @property
    def threshold(self) -> int:
        return math.isqrt(self.few[-1] * self.many[0])

    @property
    def words(self) -> str:
        first, second = map(_words, forms_of(self.state))
        return f"{first} up to {self.threshold} rows, {second} above"


# Rows of the input -> milliseconds by candidate, over all calls with so many rows.
_Times = dict[int, dict[str, float]]


def decide_two(
    timings: Sequence[Timing], single: Choice, keep: Sequence[str], *, every: bool
) -> Choice:
    """Two forms of a weight if they are faster than the best one by more than a tie, else `single`.

    Args:
        timings: what `single` was decided by, with their rows.
        single: the best single form.
        keep: two of `FORMS`.
        every: see `decide`; each form may then lose to dense on none of its rows.
    """
    missing = next((form for form in keep if form not in timings[0].ms), None)
    if missing is not None:
        return _one(single, f"{_words(missing)} is no candidate here")
    times = _by_rows(timings)
    if len(times) < 2:
        return _one(single, f"all inputs had {next(iter(times))} rows")
    splits = [
        split
        for state in TWO_FORMS
        if set(forms_of(state)) == set(keep)
        for split in _splits(times, state)
        if split.threshold and not (every and _loses(times, split))
    ]
    if not splits:
        return _one(single, "every two would be slower than dense at some number of rows")
    best = min(splits, key=lambda split: split.ms)
    alone, ms = _best_single(times, every)
    gain = f"{ms / best.ms:.2f}x as fast as {_words(alone)} alone"
    if best.ms >= ms * (1 - TIE):
        return _one(single, f"{best.words} would be {gain}")
    ranges = "; ".join(
        f"{_range(rows)}: {as_fast(_total(times, rows))}" for rows in (best.few, best.many)
    )
    middle = f"{best.threshold} is the geometric middle of {best.few[-1]} and {best.many[0]}"
    return replace(
        single,
        name=best.state,
        ms=best.ms,
        reason=f"{ranges}: {best.words} ({middle}), together {gain}",
        threshold=best.threshold,
        dense_share=_dense_share(timings, best),
    )


def _one(single: Choice, why: str) -> Choice:
    return replace(single, reason=f"{single.reason}; one copy: {why}")


def _words(form: str) -> str:
    return form.replace("_", "-")


def _range(rows: Sequence[int]) -> str:
    text = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    return f"{text} row" if text == "1" else f"{text} rows"


def _by_rows(timings: Sequence[Timing]) -> _Times:
    sums: dict[int, Counter[str]] = {}
    for timing in sorted(timings, key=lambda timing: timing.rows):
        row = sums.setdefault(timing.rows, Counter())
        for name, ms in timing.ms.items():
            row[name] += ms * timing.count  # type: ignore[assignment]  # of floats
    return {rows: dict(row) for rows, row in sums.items()}


def _total(times: _Times, rows: Sequence[int]) -> dict[str, float]:
    names = next(iter(times.values()))
    return {name: sum(times[row][name] for row in rows) for name in names}


def _splits(times: _Times, state: str) -> list[_Split]:
    first, second = forms_of(state)
    rows = tuple(times)
    found = []
    for i in range(1, len(rows)):
        few, many = rows[:i], rows[i:]
        ms = sum(times[row][first] for row in few) + sum(times[row][second] for row in many)
        found.append(_Split(state, few, many, ms))
    return found


def _loses(times: _Times, split: _Split) -> bool:
    parts = zip(forms_of(split.state), (split.few, split.many), strict=True)
    return any(_is_slower(times[row], form) for form, rows in parts for row in rows)


def _is_slower(ms: dict[str, float], form: str) -> bool:
    return ms[form] > ms[DENSE] * (1 + TIE)


def _best_single(times: _Times, every: bool) -> tuple[str, float]:
    total = _total(times, tuple(times))
    allowed = [
        name for name in total if not (every and any(_is_slower(ms, name) for ms in times.values()))
    ]
    name = min(allowed, key=total.__getitem__)
    return name, total[name]


def _dense_share(timings: Sequence[Timing], split: _Split) -> float:
    """The share of the multiply-adds that the dense one of two forms does."""
    parts = dict(zip(forms_of(split.state), (split.few, split.many), strict=True))
    dense = parts.get(DENSE, ())
    work = sum(timing.rows * timing.count for timing in timings)
    return sum(t.rows * t.count for t in timings if t.rows in dense) / work
