"""The GPU kernels of nmfx::linear_nm, in Triton's language; `triton_packed.py` starts them.

A program computes 16 x BLOCKS outputs for all rows of the input, over one part of the columns;
`finish` adds the parts in order, so results do not depend on which program comes first. Two ways:

    gather    up to 8 rows: every kept weight fetches its activations by address, all rows of one
              column side by side. Bytes of the packed weight are the limit, whatever N:M.
    expand    up to 64 rows: N:M groups become dense tiles in registers, which tensor cores
              multiply. M / N times the arithmetic, once for all rows.
"""

import triton
import triton.language as tl


@triton.jit
def _field(word, slot, BITS: tl.constexpr):
    """The index field of a slot in its word; see `nmfx.packing` for where it sits."""
    k = slot % (32 // BITS)
    return (word >> (16 * (k % 2) + BITS * (k // 2))) & ((1 << BITS) - 1)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
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
    xt,
    values,
    index,
    sums,
    slots,
    words,
    outputs,
    per_part,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """sums[part, row, output] of xt (columns, ROWS): one block of 16 outputs, one part."""
    PER: tl.constexpr = 32 // BITS
    block, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, 16)
    k = tl.arange(0, PER)
    row = tl.arange(0, ROWS)
    total = tl.zeros([WORDS, PER, 16, ROWS], tl.float32)
    first = block.to(tl.int64) * slots * 16
    for begin in range(part * per_part, tl.minimum((part + 1) * per_part, words), WORDS):
        word = begin + tl.arange(0, WORDS)
        at = (block.to(tl.int64) * words + word[:, None]) * 16 + lane[None, :]
        bits = tl.load(index + at, mask=(word < words)[:, None], other=0)
        slot = word[:, None] * PER + k[None, :]
        exists = (slot < slots)[:, :, None]
        value = tl.load(
            values + first + slot[:, :, None] * 16 + lane[None, None, :], mask=exists, other=0.0
        )
        field = _field(bits[:, None, :], slot[:, :, None], BITS)
        column = (slot // N * M)[:, :, None] + field
        x = tl.load(
            xt + column[:, :, :, None] * ROWS + row[None, None, None, :],
            mask=exists[:, :, :, None],
            other=0.0,
        )
        total += value[:, :, :, None].to(tl.float32) * x.to(tl.float32)
    result = tl.sum(tl.sum(total, axis=0), axis=0)  # (16, ROWS)
    output = block * 16 + lane
    place = (part * ROWS + row[None, :]) * outputs + output[:, None]
    tl.store(sums + place, result, mask=(output < outputs)[:, None])


@triton.jit
def expand(
    x,
    values,
    index,
    sums,
    rows,
    slots,
    words,
    outputs,
    columns,
    per_part,
    N: tl.constexpr,
    M: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """sums[part, row, output] of x (rows, columns): 16 x BLOCKS outputs, one part."""
    PER: tl.constexpr = 32 // BITS
    WIDE: tl.constexpr = 16 * BLOCKS
    tile, part = tl.program_id(0), tl.program_id(1)
    wide = tl.arange(0, WIDE)
    output = tile * WIDE + wide
    block = (output // 16).to(tl.int64)
    lane = output % 16
    filled = output < tl.cdiv(outputs, 16) * 16  # blocks that exist
    place = tl.arange(0, PLACES)
    k = tl.arange(0, GROUPS * PLACES)
    row = tl.arange(0, ROWS)
    groups = columns // M
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for begin in range(part * per_part, tl.minimum((part + 1) * per_part, groups), GROUPS):
        group = begin + tl.arange(0, GROUPS)
        exists = (group < groups)[:, None] & filled[None, :]
        dense = tl.zeros([GROUPS, PLACES, WIDE], values.dtype.element_ty)
        for n in tl.static_range(N):
            slot = group * N + n
            at = block[None, :] * slots + slot[:, None]
            value = tl.load(values + at * 16 + lane[None, :], mask=exists, other=0.0)
            at = block[None, :] * words + (slot // PER)[:, None]
            word = tl.load(index + at * 16 + lane[None, :], mask=exists, other=0)
            field = _field(word, slot[:, None], BITS)
            here = field[:, None, :] == place[None, :, None]
            dense = tl.where(here, value[:, None, :], dense)
        # Places past M, where M is no power of two, meet zeros of the input.
        column = (begin + k // PLACES) * M + k % PLACES
        real = (k % PLACES < M) & (column < columns)
        inputs = tl.load(
            x + row[:, None] * columns + column[None, :],
            mask=(row < rows)[:, None] & real[None, :],
            other=0.0,
        )
        matrix = tl.reshape(dense, [GROUPS * PLACES, WIDE])
        total = tl.dot(inputs, matrix, total, input_precision="ieee")
    at = (part * ROWS + row[:, None]) * outputs + output[None, :]
    tl.store(sums + at, total, mask=(output < outputs)[None, :])


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
    total = _activate(total, ACTIVATION)
    place = row.to(tl.int64) * outputs + output
    tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)
