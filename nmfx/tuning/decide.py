"""From milliseconds to a choice, with the sentence that explains it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Medians of two runs of the same candidate differ by up to this share on a shared machine.
TIE = 0.03

DENSE, PREPACKED, PACKED, SEMI = "dense", "prepacked", "packed", "semi_structured"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call per candidate, on one shape of `rows`, which `count` calls have."""

    ms: Mapping[str, float]
    count: int
    rows: int = 0


@dataclass(frozen=True)
class Choice:
    """What a layer becomes.

    Attributes:
        name: "dense", "prepacked", "packed", "semi_structured" or one of `TWO_FORMS`.
        ms_dense, ms: milliseconds over all calls, dense and as chosen.
        reason: the measured ratios in words, or why nothing was measured.
        rows: rows of the inputs that were measured; empty if nothing was.
        multiply_adds: of the dense layer over all calls; 0 if nothing was measured.
        threshold: of two forms: inputs of up to so many rows use the first; else 0.
        dense_share: of two forms: the share of the multiply-adds that the dense one does.
        algorithms: of semi-structured layers, see `semi_structured.algorithm_for`.
    """

    name: str
    ms_dense: float
    ms: float
    reason: str
    rows: tuple[int, ...] = ()
    multiply_adds: int = 0
    threshold: int = 0
    dense_share: float = 0.0
    algorithms: tuple[int, ...] = ()


def stays_dense(reason: str) -> Choice:
    """A choice without measurement."""
    return Choice(DENSE, 0.0, 0.0, reason)


def decide(timings: Sequence[Timing], *, every: bool) -> Choice:
    """The candidate with the least total time; dense wins ties.

    Packed must be faster than prepacked too: a user who compiles with freezing has that already.
    A tie of these two is no reason for prepacked, which takes more memory.

    Args:
        timings: at least one; all with the same candidates, "dense" among them.
        every: whether a choice may lose on no shape at all: for shapes that are assumed, as who
            knows which of them the user will run.
    """
    names = list(timings[0].ms)
    total = {name: sum(t.ms[name] * t.count for t in timings) for name in names}
    dense = total[DENSE]

    def beats(name: str, other: str, tie: float = TIE) -> bool:
        if name not in total or other not in total:
            return name in total
        if every and any(t.ms[name] > t.ms[other] * (1 + TIE) for t in timings):
            return False
        return total[name] < total[other] * (1 - tie)

    packed, semi = beats(PACKED, DENSE) and beats(PACKED, PREPACKED, 0.0), beats(SEMI, DENSE)
    if packed and not (semi and total[SEMI] < total[PACKED]):
        chosen = PACKED
    elif semi:
        chosen = SEMI
    elif beats(PREPACKED, DENSE):
        chosen = PREPACKED
    else:
        chosen = DENSE
    return Choice(chosen, dense, total[chosen], _reason(chosen, total, every))


def _ratios(total: Mapping[str, float]) -> dict[str, float]:
    return {name: total[DENSE] / ms for name, ms in total.items() if name != DENSE}


def as_fast(total: Mapping[str, float]) -> str:
    """Milliseconds by candidate in words: how many times as fast as dense each is."""
    texts = [f"{name.replace('_', '-')} {ratio:.2f}x" for name, ratio in _ratios(total).items()]
    return f"{', '.join(texts)} as fast as dense"


def _reason(chosen: str, total: Mapping[str, float], every: bool) -> str:
    ratios, text = _ratios(total), as_fast(total)
    if not ratios:
        return "no other candidate"
    if chosen == DENSE and max(ratios.values()) >= 1:
        if every and max(ratios.values()) * (1 - TIE) > 1:
            return f"{text} in total, but slower at some number of rows"
        return f"{text}: a tie, which dense wins"
    if chosen == PREPACKED and ratios.get(PACKED, 0.0) > 1:
        return f"{text}: packed does not beat prepacked"
    return text


def packed_share(choices: Iterable[Choice]) -> str | None:
    """How much of the work of the measured layers packed kernels do, in words; None without any."""
    choices = list(choices)
    total = sum(choice.multiply_adds for choice in choices)
    if not total:
        return None
    packed = sum(
        choice.multiply_adds * (1 - choice.dense_share)
        for choice in choices
        if choice.name not in (DENSE, PREPACKED)
    )
    return (
        f"packed kernels carry {packed / total:.0%} of the multiply-adds of the N:M layers that "
        f"were measured, counted dense"
    )
