"""Hypothesis strategies: weights in which the values that break masks are common.

`tests/test_strategies.py` checks that ties, NaN, Inf, -0.0, denormals, odd sizes and strided
layouts really occur.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from nmfx.pattern import Pattern

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "sliced", "channels_last")

# dtype -> (integer of that width, bits of the significand)
_FORMATS = {
    torch.float64: (torch.int64, 52),
    torch.float32: (torch.int32, 23),
    torch.float16: (torch.int16, 10),
    torch.bfloat16: (torch.int16, 7),
}


def special_bits(dtype: torch.dtype) -> dict[str, int]:
    """Name -> bits without sign of the values around which a mask can go wrong."""
    width, mantissa = 8 * dtype.itemsize, _FORMATS[dtype][1]
    inf = (1 << width - 1) - (1 << mantissa)  # all exponent bits
    one = (inf >> 1) & inf
    return {
        "zero": 0,
        "least denormal": 1,
        "largest denormal": (1 << mantissa) - 1,
        "least normal": 1 << mantissa,
        "one": one,
        "next after one": one + 1,
        "two": one + (1 << mantissa),
        "largest finite": inf - 1,
        "inf": inf,
        "signalling nan": inf + 1,
        "quiet nan": inf + (1 << mantissa - 1),
        "nan of ones": (1 << width - 1) - 1,
    }


def from_bits(bits: list[int], dtype: torch.dtype) -> Tensor:
    """A 1-D tensor of the given bit patterns (0 <= pattern < 2 ** width)."""
    width = 8 * dtype.itemsize
    signed = [b - (1 << width) if b >> (width - 1) else b for b in bits]
    return torch.tensor(signed, dtype=_FORMATS[dtype][0]).view(dtype)


def element_bits(dtype: torch.dtype, *, finite: bool = False) -> SearchStrategy[int]:
    """Bits of one weight: specials and a few values that tie often, or anything at all."""
    width, special = 8 * dtype.itemsize, special_bits(dtype)
    sign, limit = 1 << width - 1, special["inf"] if finite else 1 << width - 1
    common = [b for b in special.values() if b < limit]
    common += [special["one"], special["next after one"]] * 3
    common += [b | sign for b in common]
    anything = st.integers(0, 2 * limit - 1).map(lambda b: b if b < limit else b - limit + sign)
    return st.one_of(st.sampled_from(common), anything)


@st.composite
def patterns(draw: DrawFn, max_m: int = 64) -> Pattern:
    """All patterns 1 <= N <= M <= max_m, the usual ones more often."""
    usual = [m for m in (2, 4, 4, 8, 16, 32, 64) if m <= max_m] or [1]
    m = draw(
        st.one_of(st.sampled_from(usual), st.integers(1, min(max_m, 9)), st.integers(1, max_m))
    )
    n = draw(st.one_of(st.sampled_from([1, (m + 1) // 2, (m + 1) // 2, m]), st.integers(1, m)))
    return Pattern(n, m)


def lay_out(weight: Tensor, layout: str) -> Tensor:
    """The same values and shape with other strides; contiguous where a layout does not apply."""
    if layout == "transposed" and weight.ndim > 1:
        return weight.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and weight.ndim > 0:
        # Every other element of a larger tensor whose rest is NaN, which would win any group.
        wide = weight.new_full((*weight.shape[:-1], 2 * weight.shape[-1] + 1), math.nan)
        wide[..., 1::2].view(_FORMATS[weight.dtype][0]).copy_(
            weight.view(_FORMATS[weight.dtype][0])
        )
        return wide[..., 1::2]
    if layout == "channels_last" and weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight


class Case(NamedTuple):
    """A weight, and how to group it."""

    weight: Tensor
    pattern: Pattern
    dim: int


@st.composite
def cases(
    draw: DrawFn,
    *,
    finite: bool = False,
    ndim: int | None = None,
    dim: int | None = None,
    max_m: int = 64,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """Weights of 1 to 5 dimensions and at most about 150 elements, with a pattern that fits."""
    dtype, pattern = draw(st.sampled_from(dtypes)), draw(patterns(max_m))
    ndim = draw(st.integers(1, 5)) if ndim is None else ndim
    dim = draw(st.integers(0, ndim - 1)) if dim is None else dim
    room = max(1, 150 // pattern.m)
    shape = []
    for d in range(ndim):
        size = draw(st.integers(1, min(room, 5)))
        room = max(1, room // size)
        shape.append(size * pattern.m if d == dim else size)
    count = math.prod(shape)
    bits = draw(st.lists(element_bits(dtype, finite=finite), min_size=count, max_size=count))
    weight = from_bits(bits, dtype).view(shape)
    return Case(lay_out(weight, draw(st.sampled_from(LAYOUTS))), pattern, dim)


def bool_masks(shape: tuple[int, ...]) -> SearchStrategy[Tensor]:
    """Any bool mask of a shape."""
    count = math.prod(shape)
    flat = st.lists(st.booleans(), min_size=count, max_size=count)
    return flat.map(lambda values: torch.tensor(values, dtype=torch.bool).view(shape))
