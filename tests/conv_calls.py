"""Calls of conv1d and conv2d as hypothesis finds them, and what torch makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from nmfx.ops.packed import ACTIVATIONS
from nmfx.pattern import Pattern

PATTERNS = ("2:4", "1:4", "4:8", "1:8", "2:16", "8:16", "1:2", "3:4", "3:5", "7:20", "33:64")
LAYOUTS = (
    "contiguous",
    "channels_last",
    "transposed",
    "rows apart",
    "part of channels",
    "expanded",
)


class Conv(NamedTuple):
    pattern: Pattern
    channels: int  # of one group
    out: int  # of one group
    groups: int
    kernel: tuple[int, ...]
    stride: Any
    padding: Any
    dilation: Any
    size: tuple[int, ...]
    batch: int  # 0: unbatched
    layout: str
    has_bias: bool
    activation: str
    seed: int

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


@st.composite
def convs(draw: DrawFn) -> Conv:
    """conv1d and conv2d calls whose kernel fits into the padded input."""
    pattern = Pattern.parse(draw(st.sampled_from(PATTERNS)))
    kernels = [(1, 1), (3, 3), (1, 3), (5, 2), (1,), (3,), (4,)]
    kernel = draw(st.sampled_from(kernels))
    dims = len(kernel)

    def either(low: int, high: int) -> Any:
        """One number for all dimensions, or one for each."""
        numbers = st.integers(low, high)
        return draw(st.one_of(numbers, st.tuples(*[numbers] * dims)))

    padding = draw(st.sampled_from(["number", "number", "same", "valid"]))
    stride = draw(st.sampled_from([1, (1,) * dims])) if padding == "same" else either(1, 3)
    dilation = either(1, 2)
    each = dilation if isinstance(dilation, tuple) else (dilation,) * dims
    least = [d * (k - 1) + 1 for d, k in zip(each, kernel, strict=True)]
    return Conv(
        pattern,
        pattern.m * draw(st.integers(1, 3 if pattern.m <= 20 else 1)),
        draw(st.sampled_from([1, 3, 16, 17, 33])),
        draw(st.integers(1, 3)),
        kernel,
        stride,
        either(0, 3) if padding == "number" else padding,
        dilation,
        tuple(k + draw(st.integers(0, 9)) for k in least),
        draw(st.integers(0, 3)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.booleans()),
        draw(st.sampled_from(list(ACTIVATIONS))),
        draw(st.integers(0, 999)),
    )


def lay_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """Random input of shape (batch, channels, *size)."""
    batch, channels, *size = shape
    if layout == "channels_last":
        return torch.randn(batch, *size, channels, dtype=dtype).movedim(-1, 1)
    if layout == "transposed":
        return torch.randn(*reversed(shape), dtype=dtype).permute(*reversed(range(len(shape))))
    if layout == "rows apart":
        return torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    if layout == "part of channels":
        return torch.randn(batch, channels + 3, *size, dtype=dtype)[:, 1 : channels + 1]
    if layout == "expanded":
        return torch.randn(1, channels, *size, dtype=dtype).expand(shape)
    return torch.randn(shape, dtype=dtype)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    function = F.conv2d if len(conv.kernel) == 2 else F.conv1d
    return function(x, weight, bias, *conv.settings)


def input_of(conv: Conv, dtype: torch.dtype) -> Tensor:
    channels = conv.channels * conv.groups
    x = lay_out((max(1, conv.batch), channels, *conv.size), conv.layout, dtype)
    return x if conv.batch else x[0]


BASE = Conv(
    Pattern(2, 4), 8, 6, 1, (3, 3), 1, 1, 1, (7, 6), 2, "contiguous", True, "none", 0
)  # fmt: skip
