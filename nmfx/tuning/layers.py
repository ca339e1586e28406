"""The candidates of one layer: functions of its input that all compute the same.

A new kind of layer is a new function here, and a line in `candidates`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture.own_weights import EXPERTS
from ..capture.packed import compress_weight, pack_weight
from ..errors import NMError
from ..kernels import semi_structured, triton_packed
from ..ops.conv_nm import conv_nm
from ..ops.conv_prepacked import conv_prepacked
from ..ops.conv_semi_structured import conv_semi_structured
from ..ops.linear_nm import linear_nm
from ..ops.linear_prepacked import linear_prepacked
from ..ops.linear_semi_structured import linear_semi_structured
from ..ops.pictures import as_pictures
from ..ops.weight_copy import WeightCopy, can_prepack
from ..packing import as_matrix
from ..pattern import Pattern
from .algorithms import fastest_algorithm
from .decide import DENSE, PACKED, PREPACKED, SEMI
from .shapes import Seen

Run = Callable[[Tensor], Tensor]

PACKABLE = ("linear", "addmm", "conv", EXPERTS)  # kinds that have a packed kernel


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
        in_parts: whether calls use some rows of it only: packed ones are blocks of rows.
    """

    kind: str
    weight: Tensor
    dim: int
    groups: int
    pattern: Pattern
    prepack: bool
    in_parts: bool = False

    def part(self, outputs: tuple[int, int] | None) -> Layer:
        """The layer that a call uses, see `Seen`."""
        return self if outputs is None else replace(self, weight=self.weight[slice(*outputs)])

    @functools.cached_property  # some look at the whole weight, and wait for a GPU to do so
    def obstacles(self) -> dict[str, str | None]:
        """Why each form other than dense is no candidate; None for those that are."""
        return {
            PREPACKED: can_prepack(self.weight) if self.prepack else "no second copy is allowed",
            SEMI: _WHOLE
            if self.in_parts
            else semi_structured.why_not(self.weight, self.dim, self.groups),
            PACKED: _no_packed(self),
        }


_WHOLE = "semi-structured it could only be used as a whole"


def names(layer: Layer) -> list[str]:
    """The candidates that `candidates` makes for a layer; dense comes first."""
    return [DENSE, *(name for name, why in layer.obstacles.items() if why is None)]


def _no_packed(layer: Layer) -> str | None:
    device = layer.weight.device.type
    if device == "cpu":
        return None
    if layer.groups > 1:
        return f"packed convolutions in groups run on the CPU, not on {device}"
    return triton_packed.why_not(layer.weight, layer.pattern.m)


def candidates(layer: Layer, bias: bool, rest: tuple[tuple[str, Any], ...]) -> dict[str, Run]:
    """All candidates of a layer, by name.

    Args:
        layer: what to run.
        bias: whether it has one; an invented one is added.
        rest: the other arguments of a convolution, see `Seen`.
    """
    makers = _convs(layer, bias, dict(rest)) if layer.kind == "conv" else _linears(layer, bias)
    return {name: _made(makers[name]) for name in names(layer)}


def _made(maker: Callable[[], Run]) -> Run:
    """What `maker` makes or, where a library refuses, a function that says so when it is called."""
    try:
        return maker()
    except (RuntimeError, NMError) as error:
        refusal = error

    def run(x: Tensor) -> Tensor:
        raise refusal

    return run


def multiply_adds(layer: Layer, seen: Seen) -> int:
    """Of one call, dense: every weight is used once per row of the product."""
    return product_rows(layer, seen) * layer.part(seen.outputs).weight.numel()


def product_rows(layer: Layer, seen: Seen) -> int:
    """Rows of the product that a call computes: those of the input, or positions of the output."""
    if layer.kind != "conv":
        return seen.rows
    weight = torch.empty_like(layer.weight, device="meta")
    dense = F.conv1d if weight.ndim == 3 else F.conv2d
    out = dense(weight.new_empty(seen.shape), weight, **dict(seen.rest))
    return out.numel() // weight.shape[0]


def _bias(layer: Layer, outputs: int, wanted: bool) -> Tensor | None:
    return layer.weight.new_zeros(outputs) if wanted else None


def _linears(layer: Layer, bias: bool) -> dict[str, Callable[[], Run]]:
    weight, transposed = layer.weight.detach(), layer.dim == 0
    outputs, inputs = weight.shape[1 - layer.dim], weight.shape[layer.dim]
    vector = _bias(layer, outputs, bias)
    n, m = layer.pattern.n, layer.pattern.m

    def dense(x: Tensor) -> Tensor:
        if transposed:
            return torch.addmm(vector, x, weight)  # type: ignore[arg-type]  # it has a bias
        return F.linear(x, weight, vector)

    def prepacked() -> Run:
        copy = WeightCopy()
        return lambda x: linear_prepacked(x, weight, vector, copy, transposed)

    def packed() -> Run:
        values, index = pack_weight(weight, layer.dim, 1, layer.pattern)
        return lambda x: linear_nm(x, values, index, vector, outputs, inputs, n, m)

    def semi_structured() -> Run:
        compressed, meta, _ = compress_weight(weight, layer.dim)

        def run(x: Tensor, chosen: tuple[int, ...]) -> Tensor:
            stored = compressed, meta, vector
            return linear_semi_structured(x, *stored, outputs, inputs, weight.dtype, chosen)

        def find(x: Tensor) -> int | None:
            rows = x.reshape(-1, inputs).to(weight.dtype)  # what autocast does
            return fastest_algorithm(rows, compressed, meta, vector, dense(rows))

        return SemiStructured(run, find)

    return {
        DENSE: lambda: dense,
        PREPACKED: prepacked,
        PACKED: packed,
        SEMI: semi_structured,
    }


class SemiStructured:
    """A semi-structured layer that uses the library's fastest algorithm for its last input.

    Attributes:
        algorithm: its number, or None before the first input and where there is no choice.
    """

    algorithm: int | None = None

    def __init__(
        self,
        run: Callable[[Tensor, tuple[int, ...]], Tensor],
        find: Callable[[Tensor], int | None],
    ) -> None:
        self._run, self._find = run, find
        self._last: tuple[Any, ...] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        last = x.shape, x.stride(), x.dtype
        if self._last != last:
            self.algorithm, self._last = self._find(x), last
        return self._run(x, () if self.algorithm is None else (1, self.algorithm))


def _convs(layer: Layer, bias: bool, rest: dict[str, Any]) -> dict[str, Callable[[], Run]]:
    weight, shape = layer.weight.detach(), tuple(layer.weight.shape)
    vector = _bias(layer, shape[0], bias)
    n, m = layer.pattern.n, layer.pattern.m
    dense = F.conv1d if len(shape) == 3 else F.conv2d

    def prepacked() -> Run:
        # A copy serves one size of input, and turns away another that comes for the first time.
        copies: defaultdict[tuple[Any, ...], WeightCopy] = defaultdict(WeightCopy)

        def run(x: Tensor) -> Tensor:
            copy = copies[x.shape, x.stride()]
            return conv_prepacked(x, weight, vector, **rest, dims=len(shape) - 2, copy=copy)

        return run

    def packed() -> Run:
        values, index = pack_weight(weight, layer.dim, layer.groups, layer.pattern)
        return lambda x: conv_nm(x, values, index, vector, **rest, weight_shape=shape, n=n, m=m)

    def semi_structured() -> Run:
        compressed, meta, _ = compress_weight(weight, layer.dim)
        stride, padding, dilation, groups = rest.values()

        def run(x: Tensor, chosen: tuple[int, ...]) -> Tensor:
            window = stride, padding, dilation, groups, shape
            return conv_semi_structured(x, compressed, meta, vector, *window, weight.dtype, chosen)

        def find(x: Tensor) -> int | None:
            p = as_pictures(x.to(weight.dtype), shape, stride, padding, dilation, "the layer")
            rows = p.patches().flatten(0, 2)
            expected = F.linear(rows, as_matrix(weight), vector)
            return fastest_algorithm(rows, compressed, meta, vector, expected)

        return SemiStructured(run, find)

    return {
        DENSE: lambda: lambda x: dense(x, weight, vector, **rest),
        PREPACKED: prepacked,
        PACKED: packed,
        SEMI: semi_structured,
    }
