"""nmfx::linear_nm on GPUs for any N:M, in Triton's language; `triton_packed.py` starts this.

A program of `gather` computes 16 outputs of up to 8 rows, over one part of the columns: every kept
weight fetches its activations by address. Where one part is enough it finishes them itself; else
`finish` adds the parts in order, so results do not depend on which program comes first.
`unpack` writes the dense weight for a product with many rows. For 2:4, and for one of 4, 8 or 16,
there are faster ways, in `triton_sparse.py` and `triton_single.py`; another, which made dense tiles
of groups in registers for tensor cores, was slower than dense on an H200 and is gone.
"""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation, in float32."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # keeps NaN
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh by way of exp(-2|t|), which cannot overflow
        small = tl.exp(-2.0 * tl.abs(inner))
        tanh = (1.0 - small) / (1.0 + small)
        x = 0.5 * x * (1.0 + tl.where(inner < 0, -tanh, tanh))
    return x


@triton.jit
def gather(
    x,
    values,
    index,
    bias,
    out,
    sums,
    rows,
    slots,
    words,
    outputs,
    columns,
    per_part,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One block of 16 outputs of up to ROWS rows, over one part of the words."""
    PER: tl.constexpr = 32 // BITS
    block, part, above = tl.program_id(0), tl.program_id(1), tl.program_id(2) * ROWS
    # One dimension, so that all loads get one layout and no barrier is needed: the words of its
    # outputs, which 16 bytes hold 4 of, every thread loads for itself.
    i = tl.arange(0, WORDS * PER * 16)
    lane, k, w = i % 16, i // 16 % PER, i // (16 * PER)
    shift = 16 * (k % 2) + BITS * (k // 2)  # see `nmfx.packing`
    values += block.to(tl.int64) * slots * 16
    index += block.to(tl.int64) * words * 16
    total = (tl.zeros([WORDS * PER * 16], tl.float32),) * ROWS
    for begin in range(part * per_part, tl.minimum((part + 1) * per_part, words), WORDS):
        slot = begin * PER + i // 16
        if EVEN:
            value = tl.load(values + (begin * PER * 16 + i))
            bits = tl.load(index + (begin * 16 + w * 16 + lane))
        else:
            value = tl.load(values + (begin * PER * 16 + i), mask=slot < slots, other=0.0)
            bits = tl.load(index + (begin * 16 + w * 16 + lane), mask=slot < slots, other=0)
        value = value.to(tl.float32)
        column = slot // N * M + ((bits >> shift) & ((1 << BITS) - 1))
        result = ()
        for row in tl.static_range(ROWS):
            at = x + tl.minimum(rows - 1, above + row) * columns + column
            if EVEN:
                inputs = tl.load(at)
            else:
                inputs = tl.load(at, mask=slot < slots, other=0.0)
            result = result + (total[row] + value * inputs.to(tl.float32),)
        total = result
    lane = tl.arange(0, 16)
    output = block * 16 + lane
    exists = output < outputs
    for row in tl.static_range(ROWS):
        y = tl.sum(tl.reshape(total[row], [WORDS * PER, 16]), axis=0)
        if SPLIT:
            at = (part * tl.num_programs(2) * ROWS + above + row) * outputs + output
            tl.store(sums + at, y, mask=exists)
        else:
            if BIAS:
                y += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)
            y = activate(y, ACTIVATION).to(out.dtype.element_ty)
            exists &= above + row + 0 * output < rows
            tl.store(out + (above + row) * outputs + output, y, mask=exists)


@triton.jit
def _four_places(
    values,
    index,
    at_values,
    at_words,
    group,
    exists,
    SHAPE: tl.constexpr,
    FIRST: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    M: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The dense weights at places FIRST to FIRST + 3 of each group, SHAPE + (2, 2)."""
    PER: tl.constexpr = 32 // BITS
    kind: tl.constexpr = values.dtype.element_ty
    HALF: tl.constexpr = kind.primitive_bitwidth == 16
    d0 = tl.zeros(SHAPE, kind)
    d1, d2, d3 = d0, d0, d0
    four = tl.zeros(SHAPE, tl.uint64)
    for n in tl.static_range(N):
        slot = group * N + n
        if EVEN:
            value = tl.load(values + at_values + slot * 16)
            word = tl.load(index + at_words + slot // PER * 16)
        else:
            value = tl.load(values + at_values + slot * 16, mask=exists, other=0.0)
            word = tl.load(index + at_words + slot // PER * 16, mask=exists, other=0)
        k = slot % PER
        field = (word >> (16 * (k % 2) + BITS * (k // 2))) & ((1 << BITS) - 1)
        if HALF:  # a shift puts a value in its place: half the instructions of four selections
            bits = value.to(tl.uint16, bitcast=True)
            if M > 4:
                bits = tl.where(field // 4 * 4 == FIRST, bits, 0)
            four |= bits.to(tl.uint64) << (field % 4 * 16).to(tl.uint64)
        else:
            d0 = tl.where(field == FIRST, value, d0)
            d1 = tl.where(field == FIRST + 1, value, d1)
            d2 = tl.where(field == FIRST + 2, value, d2)
            d3 = tl.where(field == FIRST + 3, value, d3)
    if HALF:
        low, high = four.to(tl.uint32), (four >> 32).to(tl.uint32)
        d0 = low.to(tl.uint16).to(kind, bitcast=True)
        d1 = (low >> 16).to(tl.uint16).to(kind, bitcast=True)
        d2 = high.to(tl.uint16).to(kind, bitcast=True)
        d3 = (high >> 16).to(tl.uint16).to(kind, bitcast=True)
    return tl.join(tl.join(d0, d2), tl.join(d1, d3))  # the last axis counts in steps of 2


@triton.jit
def finish(
    sums,
    bias,
    out,
    parts,
    rows,
    outputs,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One row, WIDE outputs: adds parts and bias, and applies the activation, in float32."""
    row = tl.program_id(1)
    output = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    exists = output < outputs
    total = tl.zeros([WIDE], tl.float32)
    for part in range(parts):
        total += tl.load(sums + (part * ROWS + row) * outputs + output, mask=exists, other=0.0)
    if BIAS:
        total += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    place = row.to(tl.int64) * outputs + output
    tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)


@triton.jit
def unpack(
    values,
    index,
    out,
    slots,
    words,
    outputs,
    columns,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The dense weight: 16 outputs, GROUPS groups."""
    block, begin = tl.program_id(0), tl.program_id(1) * GROUPS
    lane = tl.arange(0, 16)
    at_values = block.to(tl.int64) * (slots * 16) + lane[None, :]
    at_words = block.to(tl.int64) * (words * 16) + lane[None, :]
    groups = columns // M
    group = (begin + tl.arange(0, GROUPS))[:, None]
    exists = (group < groups) & (lane >= 0)[None, :]
    output = (block * 16 + lane)[:, None]
    each = tl.arange(0, 4 * GROUPS)[None, :]
    for quad in tl.static_range((M + 3) // 4):
        dense = _four_places(
            values, index, at_values, at_words, group, exists,
            [GROUPS, 16], 4 * quad, N, BITS, M, EVEN,
        )  # fmt: skip
        matrix = tl.reshape(tl.permute(dense, [1, 0, 2, 3]), [16, 4 * GROUPS])
        column = begin * 4 + each if M == 4 else (begin + each // 4) * M + 4 * quad + each % 4
        real = (begin + each // 4 < groups) & (4 * quad + each % 4 < M)
        tl.store(
            out + output.to(tl.int64) * columns + column, matrix, mask=(output < outputs) & real
        )
