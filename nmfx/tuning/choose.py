"""One layer's choice: its inputs, seen or assumed, put to the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..capture.candidates import Candidate, as_layer
from ..capture.own_weights import EXPERTS
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
    c = as_layer(candidate)
    layer = _layer(c, weight, pattern, prepack)
    if names(layer) == [DENSE]:
        return stays_dense(f"{layer.obstacles[SEMI]}; {layer.obstacles[PACKED]}")
    keep = None if c.kind == "conv" or layer.in_parts else keep
    return bench.choose(candidate.name, layer, shapes, every=seen is None, keep=keep)


def choose_untimed(candidate: Candidate, weight: Tensor, pattern: Pattern) -> Choice:
    """The form of a layer when nothing is timed.

    Packed on the CPU; on a GPU semi-structured if it can be, which serves any number of rows.
    """
    c = as_layer(candidate)
    layer = _layer(c, weight, pattern, prepack=False)
    if weight.is_cuda and layer.in_parts:
        return stays_dense(_MANY_ROWS)
    forms: tuple[str, ...] = (SEMI, PACKED) if weight.is_cuda else (PACKED, SEMI)
    if weight.is_cuda and c.kind == "conv":
        if weight.shape[2:].numel() > 1:
            return stays_dense(_UNFOLDED)
        forms = (SEMI,)
    reasons = layer.obstacles
    for name in forms:
        if reasons[name] is None:
            return Choice(name, 0.0, 0.0, "")
    return stays_dense(f"{reasons[SEMI]}; {reasons[PACKED] or _MANY_ROWS}")


def _layer(c: Candidate, weight: Tensor, pattern: Pattern, prepack: bool) -> Layer:
    # A graph has no module of its own that could keep the copy.
    prepack, in_parts = prepack and c.capture == "leaf", c.capture == "scoped"
    if c.kind == EXPERTS:  # one of them stands for all
        return Layer("linear", weight[0], 1, 1, pattern, prepack, in_parts)
    return Layer(c.kind, weight, c.dim, c.groups, pattern, prepack, in_parts)


_UNFOLDED = "on a GPU its input would be unfolded, which only measuring can justify"
_MANY_ROWS = "packed it would be unpacked at every call, for all but the smallest inputs"


def _has_bias(candidate: Candidate) -> bool:
    if candidate.capture != "leaf":
        return candidate.kind == "addmm"
    owner, _ = place_of(candidate.host, candidate.path)
    return getattr(owner, "bias", None) is not None
