"""2:4 weights as they are packed, on sparse tensor cores: for few rows of input.

Weights are read once, 16 bytes per thread, and never expanded.

    a word of the index: 16 slots of one output        a warp takes 32 outputs (2 blocks) of a word

    values [slot][16 outputs]  --movmatrix-->  A (16 outputs x 32 columns, half of them kept)
    index  2 bits for a slot   --bit moves-->  metadata of A
    x      [row][column]       --shuffle--->   B (32 columns x 8 rows)      mma.sp adds A B

The product takes the groups of 4 of its 32 columns in any order, if A, B and metadata agree. Here
they are in the order 0 2 1 3 4 6 5 7: then a thread loads 8 adjacent columns of x at once, and a
word becomes metadata by one exchange of bits.

Fragments and metadata as in `triton_ptx.py`.
"""

import triton
import triton.language as tl

from .triton_linear import activate
from .triton_ptx import from_neighbour, load1, load4, multiply, pick_bytes, transpose


@triton.jit
def sparse(
    x,
    values,
    index,
    bias,
    out,
    sums,
    rows,
    stride,
    slots,
    words,
    outputs,
    columns,
    per_part,
    PAIRS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """32 * PAIRS outputs of up to 8 * TILES rows, over one part of the words.

    Rows of x begin at multiples of `stride`, which 8 divides, and are zero from `columns` to there.
    With 2 STAGES a warp waits for one word while it has asked for the next.
    """
    thread = tl.arange(0, 32 * WARPS)
    warp, g, t = thread // 32, thread // 4 % 8, thread % 4
    last = (outputs - 1) // 16
    pair, part = tl.program_id(0) * PAIRS, tl.program_id(1)
    # Row g of a matrix to be transposed: a slot, for thread t of 8 outputs. Rows 2t and 2t + 1
    # become what thread t holds of an output: a group.
    slot = g // 4 * 2 + g // 2 % 2 * 4 + g % 2  # 0 1 4 5 2 3 6 7
    at_values, at_index = (), ()
    for p in tl.static_range(PAIRS):
        block = tl.minimum(2 * (pair + p) + t // 2, last).to(tl.int64)
        at = (values + (block * slots + slot) * 16 + 8 * (t % 2)).to(tl.int64)
        at_values = at_values + (at,)
        # Output g of fragment f is lane 2f + this, of this block.
        block = tl.minimum(2 * (pair + p) + g // 4, last).to(tl.int64)
        at = (index + block * words * 16 + g // 2 % 2 * 8 + g % 2 + t // 2 * 4).to(tl.int64)
        at_index = at_index + (at,)
    zero = tl.zeros([32 * WARPS], tl.float32)
    total = (zero, zero, zero, zero, zero, zero, zero, zero) * (TILES * PAIRS)
    end = tl.minimum((part + 1) * per_part, words)
    word = part * per_part + warp
    if STAGES == 2:
        ready = _fetch(
            at_values, at_index, word, end, slot, slots, x, stride, rows, g, t, columns,
            PAIRS, TILES, EVEN, False,
        )  # fmt: skip
    for _ in range(part * per_part, end, WARPS):
        if STAGES == 2:
            found = ready
            ready = _fetch(
                at_values, at_index, word + WARPS, end, slot, slots, x, stride, rows, g, t,
                columns, PAIRS, TILES, EVEN, False,
            )  # fmt: skip
        else:
            found = _fetch(
                at_values, at_index, word, end, slot, slots, x, stride, rows, g, t, columns,
                PAIRS, TILES, EVEN, EVEN,
            )  # fmt: skip
        total = _add(total, found, t, PAIRS, TILES, EVEN, BF16)
        word += WARPS
    for p in tl.static_range(PAIRS):
        mine = ()
        for k in tl.static_range(8 * TILES):
            mine = mine + (total[k // 8 * 8 * PAIRS + 8 * p + k % 8],)
        write(
            mine, bias, out, sums, pair + p, part, rows, outputs,
            TILES, WARPS, SPLIT, BIAS, ACTIVATION,
        )  # fmt: skip


@triton.jit
def _fetch(
    at_values, at_index, word, end, slot, slots, x, stride, rows, g, t, columns,
    PAIRS: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """What a thread reads of a word: 10 registers of weights for each pair, 4 of x for each tile.

    EVEN: all of a word exists, if the word does; ALL: all words do.
    """
    inside = word < end
    near, far = inside, inside
    if not EVEN:
        near, far = inside & (word * 16 + slot < slots), inside & (word * 16 + slot + 8 < slots)
    found = ()
    for p in tl.static_range(PAIRS):
        found = found + load4(at_values[p] + word * 512, near, ALL, True)
        found = found + load4(at_values[p] + word * 512 + 256, far, ALL, True)
        w = load1(at_index[p] + word * 64, inside, ALL)
        found = found + (w, load1(at_index[p] + word * 64 + 8, inside, ALL))
    column = word * 32 + 16 * (t % 2) + 8 * (t // 2)
    if not EVEN:
        inside &= column < columns
    for k in tl.static_range(TILES):
        at = (x + (tl.minimum(g + 8 * k, rows - 1) * stride + column)).to(tl.int64)
        found = found + load4(at, inside, ALL, False)
    return found


@triton.jit
def _add(
    total, found, t,
    PAIRS: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """The totals, and the products of a word's fragments with 8 * TILES rows of x."""
    a, e = (), ()
    for p in tl.static_range(PAIRS):
        v, u = transpose(four(found, 10 * p)), transpose(four(found, 10 * p + 4))
        a = a + (v[0], v[1], u[0], u[1], v[2], v[3], u[2], u[3])
        meta = _metadata(found[10 * p + 8], found[10 * p + 9], t)
        if not EVEN:
            meta = _legal(meta)
        e = e + (meta,)
    result = ()
    for k in tl.static_range(TILES):
        b = _exchange(four(found, 10 * PAIRS + 4 * k), t % 2 == 1)
        for p in tl.static_range(PAIRS):
            c, d = four(total, 8 * (k * PAIRS + p)), four(total, 8 * (k * PAIRS + p) + 4)
            result = result + multiply(four(a, 8 * p), b, c, e[p], BF16, False)
            result = result + multiply(four(a, 8 * p + 4), b, d, e[p], BF16, True)
    return result


@triton.jit
def _metadata(w, v, t):
    """Metadata of two outputs' words: the four quads that a thread gives, 16 bits of each."""
    # Byte t % 2 of both halves: the first indices of four groups, and their second ones.
    e = pick_bytes(w, v, tl.where(t % 2 == 0, 0x6420, 0x7531))
    # Fields (first 0..3, second 0..3) become (first, second) of groups 0 2 1 3.
    move = (e ^ (e >> 6)) & 0x00CC00CC
    return e ^ move ^ (move << 6)


@triton.jit
def _legal(e):
    """Metadata in which groups that do not exist, all zeros, keep places 0 and 1."""
    none = ~(e | (e >> 1) | (e >> 2) | (e >> 3)) & 0x11111111
    return e | (none << 2)


@triton.jit
def _exchange(own, odd):
    """B of 32 columns and 8 rows: of two groups of 4, an even thread keeps places 0 and 1."""
    first = from_neighbour(tl.where(odd, own[0], own[1]))
    second = from_neighbour(tl.where(odd, own[2], own[3]))
    return (
        tl.where(odd, first, own[0]),
        tl.where(odd, second, own[2]),
        tl.where(odd, own[1], first),
        tl.where(odd, own[3], second),
    )


@triton.jit
def four(of, i: tl.constexpr):
    """Four of a tuple, from i on."""
    return of[i], of[i + 1], of[i + 2], of[i + 3]


@triton.jit
def write(
    total, bias, out, sums, pair, part, rows, outputs, TILES: tl.constexpr, WARPS: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Adds what the warps have of 32 outputs and 8 * TILES rows, and finishes or stores it."""
    for k in tl.static_range(TILES):
        c0, c1, c2, c3 = total[8 * k], total[8 * k + 1], total[8 * k + 2], total[8 * k + 3]
        d0, d1, d2, d3 = total[8 * k + 4], total[8 * k + 5], total[8 * k + 6], total[8 * k + 7]
        # The last axes: product, half (outputs g + 8), and which of two rows.
        even = tl.join(tl.join(c0, d0), tl.join(c2, d2))
        y = tl.join(even, tl.join(tl.join(c1, d1), tl.join(c3, d3)))
        y = tl.sum(tl.reshape(y, [WARPS, 32, 8]), axis=0)
        lane, j = tl.arange(0, 32)[:, None], tl.arange(0, 8)[None, :]
        fragment = j // 4 * 2 + j // 2 % 2
        output = pair * 32 + lane // 16 * 16 + lane // 8 % 2 * 8 + 2 * fragment + lane // 4 % 2
        row = 8 * k + lane % 4 * 2 + j % 2
        exists = (output < outputs) & (row < rows)
        if SPLIT:
            tl.store(sums + (part * 8 * TILES + row) * outputs + output, y, mask=exists)
        else:
            if BIAS:
                y += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)
            y = activate(y, ACTIVATION)
            tl.store(out + row * outputs + output, y.to(out.dtype.element_ty), mask=exists)
