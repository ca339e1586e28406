"""The packed N:M format: the definition of what `nmfx.lower` stores and every packed kernel reads.

A weight of shape (rows, cols), cols a multiple of M, with at most N nonzeros in each group of M
consecutive columns, becomes two plain tensors. Sixteen rows form a block (the last is filled up
with zeros); the kept elements of a row, N per group in ascending column order, are its slots:

    values  (blocks, slots, 16), dtype of the weight        slots = cols / M * N
            values[b, s, lane] is slot s of row 16 b + lane
    index   (blocks, words, 16), int32 (bits, not a number) words = ceil(slots * B / 32)
            for each slot its column within the group, 0..M-1, as a field of B bits;
            field k of a word belongs to slot word * 32 / B + k and sits at bit
            16 * (k % 2) + B * (k // 2): even slots fill the low half, odd slots the high half;
            fields after the last slot, and rows after the last row, are 0

    B = 2 for M <= 4, 4 for M <= 16, 8 for M <= 64

A linear layer's (out, in) weight is packed as it is, one stored as (in, out) (Hugging Face's
Conv1D, `dim` 0) transposed. A convolution's (out, in / groups, *kernel) weight has the columns
(*kernel position, channel), channels fastest, and each of its groups fills whole blocks of its own,
one after the other. In a file they are the tensors `<weight>_values` and `<weight>_index`,
little-endian; shape, dim, groups and pattern are in the entry `<weight>` of "layers" in the JSON
text "nmfx" of the file's metadata (`storage/spec.py`). `tests/test_packed_reader.py` reads it
without torch.

Why so: a vector of 16 lanes holds 16 output rows, so that kernels add nothing across lanes and read
both tensors front to back; a shift by B brings the next field to the bottom of its lane; the halves
are two 16-bit indices side by side, as the permutation of bfloat16 pairs wants them.

For example the 2:4 row  [0, 5, 0, 7,  1, 0, 0, 2]  has the slots 5, 7, 1, 2 and the fields
1, 3, 0, 3: one word, 0b0011 in the low half (slots 0 and 2), 0b1111 in the high half (1 and 3).

Where a group has fewer than N nonzeros, zeros are kept by the rule of `mask.py` (lowest index
first), so packing is a function of the weight alone. Everything not kept unpacks to +0.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import NMError
from .mask import DTYPES, as_bits, check_groups, is_nm, magnitude, nm_mask
from .pattern import MAX_M, Pattern, PatternLike

BLOCK = 16  # rows of a block
_LINES = 16  # that `detect_pattern` looks at first: of 4096 columns 1024 groups of the largest M
# Elements that it looks at together: what is made of them stays in the cache. 2:4 in 4096 x 11008,
# float32, takes one thread of an AMD EPYC 90 ms so, and 530 ms all at once. `check_packed` too.
_PART = 2**19
_PADDED = "the rows after the last of {} in a packed weight are not 0"

Shape = tuple[int, int, int]


def index_bits(m: int) -> int:
    """Width in bits of one index field for groups of `m`: the least of 2, 4, 8 for m - 1."""
    return next(bits for bits in (2, 4, 8) if m <= 1 << bits)


def packed_shapes(rows: int, cols: int, pattern: Pattern) -> tuple[Shape, Shape]:
    """Shapes of `values` and `index` for a weight of shape (rows, cols)."""
    blocks, slots = -(-rows // BLOCK), cols // pattern.m * pattern.n
    return (blocks, slots, BLOCK), (blocks, -(-slots * index_bits(pattern.m) // 32), BLOCK)


def packed_bytes(rows: int, cols: int, pattern: Pattern, itemsize: int) -> int:
    """Bytes of a packed (rows, cols) weight whose elements take `itemsize` bytes."""
    values, index = packed_shapes(rows, cols, pattern)
    return torch.Size(values).numel() * itemsize + torch.Size(index).numel() * 4


def makes_smaller(columns: int, pattern: Pattern, itemsize: int) -> bool:
    """Whether rows take fewer bytes packed; what fills up the last block is not counted."""
    return packed_bytes(BLOCK, columns, pattern, itemsize) < BLOCK * columns * itemsize


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
    (blocks, slots, _), _ = packed_shapes(rows, cols, pattern)
    # As integers: copies of half-precision floats may rewrite the payload of a NaN.
    bits = as_bits(weight)[mask].view(rows, slots)
    column = torch.arange(cols, device=weight.device) % pattern.m
    fields = column.to(torch.uint8).expand(rows, cols)[mask].view(rows, slots)
    values = _to_blocks(bits, blocks).view(weight.dtype)
    return values, _pack_fields(_to_blocks(fields, blocks), index_bits(pattern.m))


def unpack(values: Tensor, index: Tensor, rows: int, cols: int, pattern: PatternLike) -> Tensor:
    """The dense (rows, cols) weight of a packed one; the exact inverse of `pack`.

    Args:
        values: (blocks, slots, 16), any float dtype.
        index: (blocks, words, 16), int32.
        rows, cols: of the dense weight.
        pattern: the pattern it was packed with.

    Returns:
        A new tensor (rows, cols) of the dtype of `values`, +0.0 where nothing was kept.

    The index is trusted here, because this runs on every call of the reference kernel: check
    foreign tensors once with `check_packed`.
    """
    pattern = Pattern.parse(pattern)
    groups = (rows, cols // pattern.m, pattern.n)
    slots = values.shape[1]
    fields = _from_blocks(_unpack_fields(index, slots, index_bits(pattern.m)), rows)
    bits = _from_blocks(as_bits(values), rows)
    dense = bits.new_zeros(rows, cols // pattern.m, pattern.m)
    fields = fields.reshape(groups).long()
    dense = dense.scatter(2, fields, bits.reshape(groups))
    return dense.view(rows, cols).view(values.dtype)


def matrix_shape(shape: Sequence[int], dim: int = 1) -> tuple[int, int]:
    """(rows, columns) of a weight of `shape` as the matrix that is stored: see `as_matrix`."""
    if len(shape) == 2:
        return shape[1 - dim], shape[dim]
    if dim == 2:
        return shape[0] * shape[1], shape[2]
    return shape[0], torch.Size(shape[1:]).numel()


def as_matrix(weight: Tensor, dim: int = 1) -> Tensor:
    """A weight as (outputs, inputs): a convolution's columns are (*kernel position, channel).

    Args:
        weight: of a linear layer or a convolution, or a stack (experts, out, in) of linear ones,
            which is one matrix with the outputs of all.
        dim: the dimension that a linear layer sums over; 1 for a convolution, 2 for a stack.
    """
    if weight.ndim == 2:
        return weight if dim == 1 else weight.t()
    if dim == 2:
        return weight.flatten(0, 1)
    return weight.movedim(1, -1).flatten(1)


def from_matrix(matrix: Tensor, shape: Sequence[int], dim: int = 1) -> Tensor:
    """The weight of `shape` that `as_matrix` took apart; that of a convolution is contiguous."""
    if len(shape) == 2:
        return matrix if dim == 1 else matrix.t()
    if dim == 2:
        return matrix.view(tuple(shape))
    return matrix.unflatten(1, (*shape[2:], shape[1])).movedim(-1, 1).contiguous()


def pack_conv(weight: Tensor, groups: int, pattern: PatternLike) -> tuple[Tensor, Tensor]:
    """Packs a convolution's weight along its input channels.

    Its columns are (*kernel position, channel), channels fastest, so that a group is M neighbouring
    channels at one kernel position. Each convolution group fills whole blocks of its own.

    Args:
        weight: (out_channels, channels / groups, *kernel_size).
        groups: of the convolution.
        pattern: the pattern that holds along dimension 1.

    Returns:
        (values, index) as from `pack`, with groups * ceil(out_channels / groups / 16) blocks.

    Raises:
        NMError: as `pack`, and M does not divide the channels.
    """
    check_groups(weight, Pattern.parse(pattern), 1)
    packed = [pack(part, pattern) for part in as_matrix(weight).chunk(groups)]
    values, index = (torch.cat(parts) for parts in zip(*packed, strict=True))
    return values, index


def unpack_conv(
    values: Tensor, index: Tensor, shape: Sequence[int], groups: int, pattern: PatternLike
) -> Tensor:
    """The dense weight of `shape` (out_channels, channels / groups, *kernel_size), contiguous."""
    rows, columns = shape[0] // groups, torch.Size(shape[1:]).numel()
    parts = [
        unpack(v, i, rows, columns, pattern)
        for v, i in zip(values.chunk(groups), index.chunk(groups), strict=True)
    ]
    return from_matrix(torch.cat(parts), shape)


def detect_pattern(weight: Tensor, dim: int = 1) -> Pattern | None:
    """The pattern that packs a weight into the fewest bytes, found in the weight itself.

    Args:
        weight: a weight, pruned by anyone.
        dim: the grouped dimension.

    Returns:
        The pattern, or None if no N:M with M <= 64 holds that makes the weight smaller.
    """
    if not weight.numel():
        return None
    if weight.ndim == 3 and dim == 2:
        weight, dim = weight.flatten(0, 1), 1
    size, itemsize = weight.shape[dim], weight.dtype.itemsize
    columns = size * weight.shape[2:].numel()  # of a convolution: all kernel positions
    sizes = [m for m in range(2, min(size, MAX_M) + 1) if size % m == 0]

    def cost(pattern: Pattern) -> tuple[int, int]:
        """Bytes of a block, as all blocks are alike; of equals the smallest M wins."""
        return packed_bytes(BLOCK, columns, pattern, itemsize), pattern.m

    # No pattern of the whole weight costs less than that of some of its lines. So these tell which
    # are worth a pass over all of it: in a dense weight none, in a pruned one as a rule the first.
    weight, across = weight.detach(), 0 if dim else 1
    some = weight.narrow(across, 0, min(_LINES, weight.shape[across]))
    best, least = None, (BLOCK * columns * itemsize, 0)
    for bound in sorted(cost(_tightest(some, m, dim)) for m in sizes):
        if bound >= least:
            break
        pattern = _tightest(weight, bound[1], dim)
        if cost(pattern) < least:
            best, least = pattern, cost(pattern)
    return best


def _tightest(weight: Tensor, m: int, dim: int) -> Pattern:
    """The N:M with the least N that holds for groups of `m`."""
    across = 0 if dim else 1
    lines = max(1, _PART * weight.shape[across] // weight.numel())
    most = []
    for part in weight.split(lines, across):
        # By bits: with the flush-denormal flag set, `weight != 0` calls a denormal zero.
        groups = (magnitude(part) != 0).view(torch.uint8).unflatten(dim, (-1, m))
        most.append(groups.sum(dim + 1, dtype=torch.uint8).amax())
    return Pattern(max(1, int(torch.stack(most).amax())), m)


def check_packed(values: Tensor, index: Tensor, rows: int, cols: int, pattern: PatternLike) -> None:
    """Checks tensors that claim to be a packed weight, so that no kernel reads out of bounds.

    Raises:
        NMError: shapes or dtypes that do not fit `rows`, `cols` and `pattern`, an index outside its
            group, indices of a group that do not increase, or anything but zeros in the fields and
            rows that only fill up a word or a block.
    """
    pattern = Pattern.parse(pattern)
    if cols % pattern.m:
        raise NMError(f"cols={cols} is not a multiple of {pattern.m}, as {pattern} needs")
    if rows < 0:
        raise NMError(f"rows={rows} is negative")
    if values.dtype not in DTYPES or index.dtype != torch.int32:
        raise NMError(
            f"packed values are float16, bfloat16, float32 or float64 and the index is int32, "
            f"got {values.dtype} and {index.dtype}"
        )
    expected = packed_shapes(rows, cols, pattern)
    if (tuple(values.shape), tuple(index.shape)) != expected:
        raise NMError(
            f"a packed weight with {rows} rows, {cols} columns and {pattern} has shapes "
            f"{expected[0]} and {expected[1]}, got {tuple(values.shape)} and {tuple(index.shape)}"
        )
    slots = values.shape[1]
    padding = rows - values.shape[0] * BLOCK
    if padding and as_bits(values)[-1, :, padding:].any():
        raise NMError(_PADDED.format(rows))
    blocks = max(1, _PART // (max(slots, 1) * BLOCK))
    for i, part in enumerate(index.split(blocks)):
        here = min(rows - i * blocks * BLOCK, part.shape[0] * BLOCK)
        _check_index(part, slots, here, rows, pattern)


def _check_index(index: Tensor, slots: int, here: int, rows: int, pattern: Pattern) -> None:
    """Checks some blocks of an index, which hold `here` of `rows` rows."""
    bits = index_bits(pattern.m)
    fields = _unpack_fields(index, slots, bits)
    if not torch.equal(_pack_fields(fields, bits), index):
        raise NMError("the bits after the last field of a packed index are not 0")
    padding = here - index.shape[0] * BLOCK
    if padding and fields[-1, :, padding:].any():
        raise NMError(_PADDED.format(rows))
    flat = _from_blocks(fields, here).unflatten(1, (-1, pattern.n)) if fields.numel() else fields
    if (flat >= pattern.m).any():
        raise NMError(f"a packed index is {int(flat.max())}, outside its group of {pattern.m}")
    if (flat[..., 1:] <= flat[..., :-1]).any():
        raise NMError("the packed indices of a group do not increase")


def _to_blocks(slots_of_rows: Tensor, blocks: int) -> Tensor:
    """(rows, slots) -> (blocks, slots, 16), filled up with zeros."""
    rows, slots = slots_of_rows.shape
    filled = torch.nn.functional.pad(slots_of_rows, (0, 0, 0, blocks * BLOCK - rows))
    return filled.view(blocks, BLOCK, slots).transpose(1, 2).contiguous()


def _from_blocks(blocked: Tensor, rows: int) -> Tensor:
    """(blocks, slots, 16) -> (rows, slots)."""
    return blocked.transpose(1, 2).flatten(0, 1)[:rows]


def _shifts(bits: int, device: torch.device) -> Tensor:
    """The bit of each field of a word, (32 / bits, 1)."""
    k = torch.arange(32 // bits, device=device, dtype=torch.int32)
    return (16 * (k % 2) + bits * (k // 2))[:, None]


def _pack_fields(fields: Tensor, bits: int) -> Tensor:
    """(blocks, slots, 16) uint8 fields -> (blocks, words, 16) int32."""
    per_word = 32 // bits
    padding = -fields.shape[1] % per_word
    fields = torch.nn.functional.pad(fields, (0, 0, 0, padding)).unflatten(1, (-1, per_word))
    # Fields do not overlap, so the sum is the union; it wraps like the bits of the word.
    return (fields.int() << _shifts(bits, fields.device)).sum(2, dtype=torch.int32)


def _unpack_fields(index: Tensor, slots: int, bits: int) -> Tensor:
    """(blocks, words, 16) int32 -> (blocks, slots, 16) uint8."""
    fields = (index[:, :, None] >> _shifts(bits, index.device)) & ((1 << bits) - 1)
    return fields.to(torch.uint8).flatten(1, 2)[:, :slots]
