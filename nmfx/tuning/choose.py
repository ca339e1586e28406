"""One layer's choice: its inputs, seen or assumed, put to the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..capture.candidates import Candidate
from ..capture.site import place_of
from ..pattern import Pattern
from .bench import Bench
from .decide import DENSE, PACKED, SEMI, Choice, stays_dense
from .layers import Layer, names
from .shapes import Seen
from .table import assumed


def choose(
    bench: Bench,
    candidate: Candidate,
    weight: Tensor,
    pattern: Pattern,
    seen: Mapping[Seen, int] | None,
    *,
    prepack: bool,
    keep: Sequence[str] | None = None,
) -> Choice:
    """What a layer becomes on this machine.

    Args:
        bench: of the model.
        candidate: the layer.
        weight: dense, its pattern's zeros in place.
        pattern: of the weight.
        seen: the inputs it met and how often, or None to assume some.
        prepack: whether a second copy of the weight is allowed.
        keep: two forms that a linear layer may hold, or None.
    """
    if weight.device.type not in ("cpu", "cuda"):
        return stays_dense(f"it is on {weight.device.type}, where nmfx times nothing")
    if seen is not None and not seen:
        return stays_dense("the example inputs never reach it")
    if seen is None and candidate.kind == "conv":
        return stays_dense("without example inputs the size of its pictures is not known")
    shapes = (
        assumed(candidate.reduced, weight.dtype, _has_bias(candidate)) if seen is None else seen
    )
    # A graph has no module of its own that could keep the copy.
    prepack = prepack and candidate.capture == "leaf"
    c = candidate
    layer = Layer(c.kind, weight, c.dim, c.groups, pattern, prepack)
    if names(layer) == [DENSE]:
        return stays_dense(f"{layer.obstacles[SEMI]}; {layer.obstacles[PACKED]}")
    keep = None if candidate.kind == "conv" else keep
    return bench.choose(candidate.name, layer, shapes, every=seen is None, keep=keep)


def choose_untimed(candidate: Candidate, weight: Tensor, pattern: Pattern) -> Choice:
    """The form of a layer when nothing is timed.

    Packed on the CPU; on a GPU semi-structured if it can be, which serves any number of rows.
    """
    c = candidate
    reasons = Layer(c.kind, weight, c.dim, c.groups, pattern, prepack=False).obstacles
    for name in (SEMI, PACKED) if weight.is_cuda else (PACKED, SEMI):
        if reasons[name] is None:
            return Choice(name, 0.0, 0.0, "")
    return stays_dense(f"{reasons[SEMI]}; {reasons[PACKED]}")


def _has_bias(candidate: Candidate) -> bool:
    if candidate.capture != "leaf":
        return candidate.kind == "addmm"
    owner, _ = place_of(candidate.host, candidate.path)
    return getattr(owner, "bias", None) is not None
