"""Plain-Python oracles of the pure layer: no torch operator decides anything here.

Tensors enter as lists of Python floats (exact for every dtype) and leave as lists. Written from
the texts of `nmfx/mask.py` and `nmfx/packing.py`, not from their code.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

# dtype -> (struct codes of a float and of an integer of that width, bits to drop on the right)
_CODES = {
    torch.float64: ("<d", "<Q", 0),
    torch.float32: ("<f", "<I", 0),
    torch.float16: ("<e", "<H", 0),
    torch.bfloat16: ("<f", "<I", 16),  # the upper half of a float32
}


def bits_of(value: float, dtype: torch.dtype) -> int:
    """The bits of a Python float that `dtype` represents exactly (any NaN gives some NaN)."""
    code, integer, drop = _CODES[dtype]
    return struct.unpack(integer, struct.pack(code, value))[0] >> drop


def key(value: float, dtype: torch.dtype) -> float:
    """Sorts like |value|: +-0 < denormals < normals < Inf < NaN, all NaNs equal."""
    if math.isnan(value):
        return math.inf
    sign = 1 << (8 * dtype.itemsize - 1)
    return bits_of(value, dtype) & ~sign


def keep(group: Sequence[float], n: int, dtype: torch.dtype) -> list[bool]:
    """Which of one group are kept: the n largest, the lower index first among equals."""
    ranked = sorted(range(len(group)), key=lambda i: (-key(group[i], dtype), i))
    return [i in ranked[:n] for i in range(len(group))]


def best_choice(group: Sequence[float], n: int) -> tuple[int, ...]:
    """Of all C(M, N) choices the first, in lexicographic order, with the largest sum of |w|.

    `group` is finite. The sums are exact (Fraction), so that ties are ties.
    """
    choices = itertools.combinations(range(len(group)), n)
    return max(choices, key=lambda choice: sum(abs(Fraction(group[i])) for i in choice))


def groups_of(shape: Sequence[int], m: int, dim: int) -> Iterator[list[int]]:
    """The groups along `dim`: lists of m positions in the row-major order of `shape`."""
    step = math.prod(shape[dim + 1 :])
    for index in itertools.product(*map(range, shape)):
        if index[dim] % m == 0:
            first = 0
            for i, size in zip(index, shape, strict=True):
                first = first * size + i
            yield [first + k * step for k in range(m)]


def nm_mask(weight: Tensor, n: int, m: int, dim: int) -> list[bool]:
    """The mask of `weight` in row-major order."""
    values = weight.flatten().tolist()
    mask = [False] * len(values)
    for group in groups_of(weight.shape, m, dim):
        kept = keep([values[i] for i in group], n, weight.dtype)
        for i, is_kept in zip(group, kept, strict=True):
            mask[i] = is_kept
    return mask


def is_nm(weight: Tensor, n: int, m: int, dim: int) -> bool:
    """Whether no group has more than n values that are not +-0."""
    values = weight.flatten().tolist()
    return all(sum(values[i] != 0 for i in group) <= n for group in groups_of(weight.shape, m, dim))


def paper_groups(shape: Sequence[int], m: int, layout: str) -> list[list[int]]:
    """The groups of the paper's code on an (O, I, *kernel) weight, as row-major positions."""
    inputs, kernel = shape[1], math.prod(shape[2:])
    if layout == "flat":
        walk = list(range(math.prod(shape)))
    else:  # for each filter and kernel position, all input channels
        walk = [
            (o * inputs + i) * kernel + k
            for o, k, i in itertools.product(range(shape[0]), range(kernel), range(inputs))
        ]
    return [walk[start : start + m] for start in range(0, len(walk), m)]


def packed_width(m: int) -> int:
    """Bits of one index field."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def packed_field(words: Sequence[int], slot: int, width: int) -> int:
    """The index field of a slot, from the (signed) words of one lane of one block."""
    word, k = slot * width // 32, slot % (32 // width)
    bits = words[word] % 2**32  # as an unsigned number
    half = bits >> 16 if k % 2 else bits & 0xFFFF  # odd slots fill the high half
    return half >> (k // 2 * width) & ((1 << width) - 1)


def read_packed(
    values: Sequence[Sequence[Sequence[int]]],
    index: Sequence[Sequence[Sequence[int]]],
    rows: int,
    cols: int,
    n: int,
    m: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Reads the packed format, from the text at the top of `packing.py`.

    Args:
        values: [block][slot][lane], as bit patterns.
        index: [block][word][lane].
        rows, cols: of the dense weight.

    Returns:
        (dense, fields): the rows of bit patterns of the dense weight, and of the index fields.

    Raises:
        IndexError: a field that points outside its group.
    """
    dense, fields = [], []
    for r in range(rows):
        block, lane = r // 16, r % 16
        words = [word[lane] for word in index[block]]
        row, row_fields = [0] * cols, []
        for slot in range(cols // m * n):
            field = packed_field(words, slot, packed_width(m))
            if field >= m:
                raise IndexError(f"row {r}, slot {slot}: {field} is outside a group of {m}")
            row[slot // n * m + field] = values[block][slot][lane]
            row_fields.append(field)
        dense.append(row)
        fields.append(row_fields)
    return dense, fields


def raw_bits(tensor: Tensor) -> list[int]:
    """The bit pattern of every element in row-major order: tells NaN payloads and -0.0 apart."""
    width = 8 * tensor.element_size()
    integers = {16: torch.int16, 32: torch.int32, 64: torch.int64}
    flat = tensor.detach().contiguous().view(integers[width]).flatten().tolist()
    return [value & ((1 << width) - 1) for value in flat]


def rows_of(flat: Sequence[int], rows: int) -> list[list[int]]:
    """Cuts a row-major list into `rows` rows."""
    width = len(flat) // rows if rows else 0
    return [list(flat[r * width : (r + 1) * width]) for r in range(rows)]
