"""The candidates of one layer: functions of its input that all compute the same.

A new kind of layer is a new function here, and a line in `candidates`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture.packed import linear_packed, pack_weight
from ..ops.linear_prepacked import WeightCopy, can_prepack, linear_prepacked
from ..pattern import Pattern
from .decide import DENSE, PACKED, PREPACKED

Run = Callable[[Tensor], Tensor]

PACKABLE = ("linear", "addmm")  # kinds that have a packed kernel


@dataclass(frozen=True)
class Layer:
    """One layer to be timed.

    Attributes:
        kind: "linear" or "addmm".
        weight: dense, its pattern's zeros in place, as the model stores it.
        dim: the dimension that is grouped and summed over.
        pattern: the pattern of the zeros.
        prepack: whether the prepacked dense layer is a candidate here.
    """

    kind: str
    weight: Tensor
    dim: int
    pattern: Pattern
    prepack: bool


def names(layer: Layer) -> list[str]:
    """The candidates that `candidates` makes for a layer; dense comes first."""
    prepack = layer.prepack and can_prepack(layer.weight) is None
    return [DENSE, *([PREPACKED] if prepack else []), PACKED]


def candidates(layer: Layer, bias: bool) -> dict[str, Run]:
    """All candidates of a layer, by name, with an invented bias if there is one."""
    weight = layer.weight.detach()
    outputs = weight.shape[1 - layer.dim]
    vector = weight.new_zeros(outputs) if bias else None
    transposed = layer.dim == 0
    copy = WeightCopy()

    def dense(x: Tensor) -> Tensor:
        if transposed:
            return torch.addmm(vector, x, weight)  # type: ignore[arg-type]  # it has a bias
        return F.linear(x, weight, vector)

    def prepacked(x: Tensor) -> Tensor:
        return linear_prepacked(x, weight, vector, copy, transposed)

    made: dict[str, Run] = {DENSE: dense}
    wanted = names(layer)
    if PREPACKED in wanted:
        made[PREPACKED] = prepacked
    if PACKED in wanted:
        packed = pack_weight(weight, layer.dim, layer.pattern)
        reduced = weight.shape[layer.dim]
        made[PACKED] = lambda x: linear_packed(x, packed, vector, outputs, reduced, layer.pattern)
    return made
