"""The packed N:M format: the definition of what `nmfx.lower` stores and every packed kernel reads.

A weight of shape (rows, cols), cols a multiple of M, with at most N nonzeros in each group of M
consecutive columns, becomes two plain tensors:

    values  (rows, cols / M * N), dtype of the weight
            the N kept elements of each group, in ascending column order
    index   (rows, ceil(cols / M * N * B / 8)), uint8
            for each value its column within the group, 0..M-1, as a field of B bits;
            field k of a row sits in byte k*B // 8 at bit k*B % 8 (little end first);
            the bits after the last field are 0

    B = 1 for M <= 2, 2 for M <= 4, 4 for M <= 16, 8 for M <= 64

For example the 2:4 row  [0, 5, 0, 7,  1, 0, 0, 2]  is  values [5, 7, 1, 2]  and fields
[1, 3, 0, 3], one byte 0b11_00_11_01.

Where a group has fewer than N nonzeros, zeros are kept by the rule of `mask.py` (lowest index
first), so packing is a function of the weight alone. Everything not kept unpacks to +0.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import NMError
from .mask import DTYPES, as_bits, check_groups, is_nm, nm_mask
from .pattern import MAX_M, Pattern, PatternLike


def index_bits(m: int) -> int:
    """Width in bits of one index field for groups of `m`: the least of 1, 2, 4, 8 for m - 1."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


def packed_shapes(
    rows: int, cols: int, pattern: Pattern
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `values` and `index` for a weight of shape (rows, cols)."""
    kept = cols // pattern.m * pattern.n
    return (rows, kept), (rows, -(-kept * index_bits(pattern.m) // 8))


def packed_bytes(rows: int, cols: int, pattern: Pattern, itemsize: int) -> int:
    """Bytes of a packed (rows, cols) weight whose elements take `itemsize` bytes."""
    values, index = packed_shapes(rows, cols, pattern)
    return values[0] * values[1] * itemsize + index[0] * index[1]


def pack(weight: Tensor, pattern: PatternLike) -> tuple[Tensor, Tensor]:
    """Packs a (rows, cols) weight that satisfies N:M along its columns.

    It never drops a value: a weight that breaks the pattern is refused, not pruned.

    Args:
        weight: float16/32/64 or bfloat16 of shape (rows, cols), any strides.
        pattern: "2:4", (2, 4) or a Pattern.

    Returns:
        (values, index), new contiguous tensors on the device of `weight`, see the module's text.

    Raises:
        NMError: not 2-D, cols not a multiple of M, or a group with more than N nonzeros.
    """
    pattern = Pattern.parse(pattern)
    if weight.ndim != 2:
        raise NMError(f"a packed weight is 2-D (rows, cols), got shape {tuple(weight.shape)}")
    check_groups(weight, pattern, 1)
    if not is_nm(weight, pattern, 1):
        raise NMError(
            f"a group has more than {pattern.n} nonzeros, which breaks {pattern}; packing would "
            f"drop values, so prune first (nmfx.fold) or choose another pattern"
        )
    weight = weight.detach()
    mask = nm_mask(weight, pattern, 1)
    rows, cols = weight.shape
    shape, _ = packed_shapes(rows, cols, pattern)
    # As integers: copies of half-precision floats may rewrite the payload of a NaN.
    values = as_bits(weight)[mask].view(shape).view(weight.dtype)
    column = torch.arange(cols, device=weight.device) % pattern.m
    fields = column.to(torch.uint8).expand(rows, cols)[mask].view(shape)
    return values, _pack_fields(fields, index_bits(pattern.m))


def unpack(values: Tensor, index: Tensor, cols: int, pattern: PatternLike) -> Tensor:
    """The dense (rows, cols) weight of a packed one; the exact inverse of `pack`.

    Args:
        values: (rows, cols / M * N), any float dtype.
        index: (rows, ceil(cols / M * N * B / 8)), uint8.
        cols: columns of the dense weight.
        pattern: the pattern it was packed with.

    Returns:
        A new tensor (rows, cols) of the dtype of `values`, +0.0 where nothing was kept.

    The index is trusted here, because this runs on every call of the reference kernel: check
    foreign tensors once with `check_packed`.
    """
    pattern = Pattern.parse(pattern)
    rows = values.shape[0]
    groups = (rows, cols // pattern.m, pattern.n)
    fields = _unpack_fields(index, values.shape[1], index_bits(pattern.m)).view(groups)
    bits = as_bits(values)
    dense = bits.new_zeros(rows, cols // pattern.m, pattern.m)
    return dense.scatter(2, fields.long(), bits.view(groups)).view(rows, cols).view(values.dtype)


def detect_pattern(weight: Tensor, dim: int = 1) -> Pattern | None:
    """The pattern that packs a weight into the fewest bytes, found in the weight itself.

    Args:
        weight: a 2-D weight, pruned by anyone.
        dim: the grouped dimension.

    Returns:
        The pattern, or None if no N:M with M <= 64 holds that makes the weight smaller.
    """
    nonzero = weight.detach() != 0
    size, itemsize = weight.shape[dim], weight.dtype.itemsize
    best, best_bytes = None, weight.numel() * itemsize
    # A pattern that saves anything keeps fewer than all: a dense weight is out after one pass.
    if not weight.numel() or int(nonzero.sum()) == weight.numel():
        return None
    for m in range(2, min(size, MAX_M) + 1):
        if size % m == 0:
            n = max(1, int(nonzero.unflatten(dim, (-1, m)).sum(dim + 1).max()))
            size_in_bytes = packed_bytes(weight.numel() // size, size, Pattern(n, m), itemsize)
            if size_in_bytes < best_bytes:
                best, best_bytes = Pattern(n, m), size_in_bytes
    return best


def check_packed(values: Tensor, index: Tensor, cols: int, pattern: PatternLike) -> None:
    """Checks tensors that claim to be a packed weight, so that no kernel reads out of bounds.

    Raises:
        NMError: shapes or dtypes that do not fit `cols` and `pattern`, an index outside its
            group, indices of a group that do not increase, or bits set after the last field.
    """
    pattern = Pattern.parse(pattern)
    if cols % pattern.m:
        raise NMError(f"cols={cols} is not a multiple of {pattern.m}, as {pattern} needs")
    if values.ndim != 2 or index.ndim != 2:
        raise NMError(f"packed tensors are 2-D, got {tuple(values.shape)}, {tuple(index.shape)}")
    if values.dtype not in DTYPES or index.dtype != torch.uint8:
        raise NMError(
            f"packed values are float16, bfloat16, float32 or float64 and the index is uint8, "
            f"got {values.dtype} and {index.dtype}"
        )
    expected = packed_shapes(values.shape[0], cols, pattern)
    if (tuple(values.shape), tuple(index.shape)) != expected:
        raise NMError(
            f"a packed weight with {values.shape[0]} rows, {cols} columns and {pattern} has shapes "
            f"{expected[0]} and {expected[1]}, got {tuple(values.shape)} and {tuple(index.shape)}"
        )
    bits = index_bits(pattern.m)
    flat = _unpack_fields(index, values.shape[1], bits)
    if not torch.equal(_pack_fields(flat, bits), index):
        raise NMError("the bits after the last field of a packed index row are not 0")
    fields = flat.unflatten(1, (-1, pattern.n))
    if (fields >= pattern.m).any():
        raise NMError(f"a packed index is {int(fields.max())}, outside its group of {pattern.m}")
    if (fields[..., 1:] <= fields[..., :-1]).any():
        raise NMError("the packed indices of a group do not increase")


def _pack_fields(fields: Tensor, bits: int) -> Tensor:
    """(rows, k) uint8 fields -> (rows, ceil(k * bits / 8)) uint8, little end first."""
    per_byte = 8 // bits
    padding = -fields.shape[1] % per_byte
    fields = torch.nn.functional.pad(fields, (0, padding)).unflatten(1, (-1, per_byte))
    packed = fields[..., 0].clone()
    for slot in range(1, per_byte):
        packed |= fields[..., slot] << (slot * bits)
    return packed


def _unpack_fields(index: Tensor, count: int, bits: int) -> Tensor:
    """(rows, ceil(count * bits / 8)) uint8 -> (rows, count) uint8."""
    per_byte = 8 // bits
    slots = [(index >> (slot * bits)) & ((1 << bits) - 1) for slot in range(per_byte)]
    return torch.stack(slots, dim=-1).flatten(1)[:, :count]
