"""The candidates of one layer: functions of its input that all compute the same.

A new kind of layer is a new function here, and a line in `candidates`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture.packed import pack_weight
from ..errors import NMError
from ..kernels import semi_structured, triton_packed
from ..ops.conv_nm import conv_nm
from ..ops.conv_prepacked import conv_prepacked
from ..ops.linear_nm import linear_nm
from ..ops.linear_prepacked import linear_prepacked
from ..ops.linear_semi_structured import linear_semi_structured
from ..ops.weight_copy import WeightCopy, can_prepack
from ..pattern import Pattern
from .decide import DENSE, PACKED, PREPACKED, SEMI
from .shapes import Seen

Run = Callable[[Tensor], Tensor]

PACKABLE = ("linear", "addmm", "conv")  # kinds that have a packed kernel


@dataclass(frozen=True)
class Layer:
    """One layer to be timed.

    Attributes:
        kind: "linear", "addmm" or "conv".
        weight: dense, its pattern's zeros in place, as the model stores it.
        dim: the dimension that is grouped and summed over.
        groups: of a convolution, else 1.
        pattern: the pattern of the zeros.
        prepack: whether the prepacked dense layer is a candidate here.
    """

    kind: str
    weight: Tensor
    dim: int
    groups: int
    pattern: Pattern
    prepack: bool


def names(layer: Layer) -> list[str]:
    """The candidates that `candidates` makes for a layer; dense comes first."""
    return [DENSE, *(name for name, why in obstacles(layer).items() if why is None)]


def obstacles(layer: Layer) -> dict[str, str | None]:
    """Why each form other than dense is no candidate for a layer; None for those that are."""
    return {
        PREPACKED: can_prepack(layer.weight) if layer.prepack else "no second copy is allowed",
        SEMI: semi_structured.why_not(layer.weight, layer.dim),
        PACKED: _no_packed(layer),
    }


def _no_packed(layer: Layer) -> str | None:
    device = layer.weight.device.type
    if device == "cpu":
        return None
    if layer.kind == "conv":
        return f"packed convolutions run on the CPU, not on {device}"
    return triton_packed.why_not(layer.weight, layer.pattern.m)


def candidates(layer: Layer, bias: bool, rest: tuple[tuple[str, Any], ...]) -> dict[str, Run]:
    """All candidates of a layer, by name.

    Args:
        layer: what to run.
        bias: whether it has one; an invented one is added.
        rest: the other arguments of a convolution, see `Seen`.
    """
    wanted = names(layer)
    if layer.kind == "conv":
        made = _convs(layer, bias, dict(rest))
    else:
        made = _linears(layer, bias, semi=SEMI in wanted)
    return {name: made[name] for name in wanted}


def multiply_adds(layer: Layer, seen: Seen) -> int:
    """Of one call, dense: every weight is used once per row or output position."""
    if layer.kind != "conv":
        return seen.rows * layer.weight.numel()
    weight = torch.empty_like(layer.weight, device="meta")
    dense = F.conv1d if weight.ndim == 3 else F.conv2d
    out = dense(weight.new_empty(seen.shape), weight, **dict(seen.rest))
    return out.numel() // weight.shape[0] * weight.numel()


def _bias(layer: Layer, outputs: int, wanted: bool) -> Tensor | None:
    return layer.weight.new_zeros(outputs) if wanted else None


def _linears(layer: Layer, bias: bool, semi: bool) -> dict[str, Run]:
    weight, transposed = layer.weight.detach(), layer.dim == 0
    outputs, inputs = weight.shape[1 - layer.dim], weight.shape[layer.dim]
    vector = _bias(layer, outputs, bias)
    values, index = pack_weight(weight, layer.dim, 1, layer.pattern)
    copy, n, m = WeightCopy(), layer.pattern.n, layer.pattern.m

    def dense(x: Tensor) -> Tensor:
        if transposed:
            return torch.addmm(vector, x, weight)  # type: ignore[arg-type]  # it has a bias
        return F.linear(x, weight, vector)

    made = {
        DENSE: dense,
        PREPACKED: lambda x: linear_prepacked(x, weight, vector, copy, transposed),
        PACKED: lambda x: linear_nm(x, values, index, vector, outputs, inputs, n, m),
    }
    if semi:
        backend = semi_structured.backend_of(weight.device)
        assert not isinstance(backend, str), backend
        try:
            tensors = semi_structured.compress(weight.t() if transposed else weight, backend)
        except (RuntimeError, NMError) as error:
            made[SEMI] = _failing(error)
            return made
        made[SEMI] = lambda x: linear_semi_structured(
            x, *tensors, vector, outputs, inputs, weight.dtype
        )
    return made


def _failing(error: Exception) -> Run:
    """A candidate that could not be made: it says why when it is compared with dense."""

    def run(x: Tensor) -> Tensor:
        raise error

    return run


def _convs(layer: Layer, bias: bool, rest: dict[str, Any]) -> dict[str, Run]:
    weight, shape = layer.weight.detach(), tuple(layer.weight.shape)
    vector = _bias(layer, shape[0], bias)
    values, index = pack_weight(weight, layer.dim, layer.groups, layer.pattern)
    n, m = layer.pattern.n, layer.pattern.m
    dense = F.conv1d if len(shape) == 3 else F.conv2d
    # The copy serves one size of input, and turns away another that comes for the first time.
    copies: defaultdict[tuple[Any, ...], WeightCopy] = defaultdict(WeightCopy)

    def prepacked(x: Tensor) -> Tensor:
        copy = copies[x.shape, x.stride()]
        return conv_prepacked(x, weight, vector, **rest, dims=len(shape) - 2, copy=copy)

    return {
        DENSE: lambda x: dense(x, weight, vector, **rest),
        PREPACKED: prepacked,
        PACKED: lambda x: conv_nm(x, values, index, vector, **rest, weight_shape=shape, n=n, m=m),
    }
