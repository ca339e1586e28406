"""The three places where a model meets the packed format: pack, unpack, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mask import as_bits
from ..ops.linear_nm import linear_nm
from ..packing import pack, unpack
from ..pattern import Pattern


def pack_weight(weight: Tensor, dim: int, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """(values, index) of a dense 2-D weight that is grouped along `dim`; checked bit for bit.

    Raises:
        NMError: the weight breaks the pattern.
    """
    weight = weight.detach()
    rows = weight if dim == 1 else weight.t()
    packed = pack(rows, pattern)
    if not torch.equal(as_bits(_unpack(packed, rows.shape[1], pattern)), _bits(rows)):
        raise AssertionError("packing is not exact, please report this")
    return packed


def unpack_weight(
    values: Tensor, index: Tensor, shape: tuple[int, ...], dim: int, pattern: Pattern
) -> Tensor:
    """The dense weight of shape `shape`; the inverse of `pack_weight`."""
    rows = _unpack((values, index), shape[dim], pattern)
    return rows if dim == 1 else rows.t()


def linear_packed(
    input: Tensor,
    packed: tuple[Tensor, Tensor],
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    pattern: Pattern,
) -> Tensor:
    """`input` times a packed weight, as a lowered layer computes it."""
    values, index = packed
    return linear_nm(input, values, index, bias, in_features, pattern.n, pattern.m)


def _unpack(packed: tuple[Tensor, Tensor], cols: int, pattern: Pattern) -> Tensor:
    return unpack(*packed, cols, pattern)


def _bits(rows: Tensor) -> Tensor:
    # A -0.0 that somebody else's pruning left unpacks to +0.0, and that is the only change allowed.
    return as_bits(torch.where(rows == 0, 0.0, rows))
