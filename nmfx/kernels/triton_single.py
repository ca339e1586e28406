"""1:4, 1:8 and 1:16 weights as they are packed, on sparse tensor cores: for few rows of input.

As `triton_sparse.py`, in steps of 8 slots, which are 8 groups with one kept value each:

    values [slot][16 outputs]  --movmatrix-->  v, in thread t: slots 2t (low half) and 2t + 1
    index  BITS for a slot     --masks----->   A, M / 4 times: v where it is of this product, or 0
                               --bit moves->   metadata, the same for all products
    x      [row][slot t, 4+t]  ----------->    B, M / 4 times                mma.sp adds A B

A quad of a product is not 4 adjacent columns: its places 0 and 1 are two columns of an even slot,
places 2 and 3 two columns of the next. So a register of A holds one value of each, and what a
thread needs of x lies side by side. The low bit of a value's place in its group is that in the
quad; the others say which quad: product i has quads t (columns 2i, 2i + 1 of thread t's slots) and
t + 4 (those M / 2 further on).
"""

import triton
import triton.language as tl

from .triton_ptx import equal_halves, load1, load2, load4, multiply, pick_bytes, transpose
from .triton_sparse import four, write


@triton.jit
def single(
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
    M: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """32 outputs of up to 8 * TILES rows, over one part of the words. Arguments as of `sparse`."""
    thread = tl.arange(0, 32 * WARPS)
    warp, g, t = thread // 32, thread // 4 % 8, thread % 4
    last = (outputs - 1) // 16
    pair, part = tl.program_id(0), tl.program_id(1)
    # Row g of a matrix to be transposed is slot g, of 8 outputs in thread t.
    block = tl.minimum(2 * pair + t // 2, last).to(tl.int64)
    at_values = (values + (block * slots + g) * 16 + 8 * (t % 2)).to(tl.int64)
    # Output g of matrix j is lane 2j + this, of this block.
    block = tl.minimum(2 * pair + g // 4, last).to(tl.int64)
    at_index = (index + block * words * 16 + g // 2 % 2 * 8 + g % 2).to(tl.int64)
    zero = tl.zeros([32 * WARPS], tl.float32)
    total = (zero, zero, zero, zero, zero, zero, zero, zero) * TILES
    end = tl.minimum((part + 1) * per_part, words)
    word = part * per_part + warp
    if STAGES == 2:
        ready = _fetch(
            at_values, at_index, word, end, slots, x, stride, rows, g, t, M, TILES, EVEN, False,
        )  # fmt: skip
    for _ in range(part * per_part, end, WARPS):
        if STAGES == 2:
            found = ready
            ready = _fetch(
                at_values, at_index, word + WARPS, end, slots, x, stride, rows, g, t,
                M, TILES, EVEN, False,
            )  # fmt: skip
        else:
            found = _fetch(
                at_values, at_index, word, end, slots, x, stride, rows, g, t,
                M, TILES, EVEN, EVEN,
            )  # fmt: skip
        total = _add(total, found, t, M, TILES, BF16)
        word += WARPS
    write(total, bias, out, sums, pair, part, rows, outputs, TILES, WARPS, SPLIT, BIAS, ACTIVATION)


@triton.jit
def _fetch(
    at_values, at_index, word, end, slots, x, stride, rows, g, t,
    M: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """What a thread reads of a word, as registers; EVEN and ALL as in `triton_sparse.py`.

    Its 4 fields, then for 8 slots of it (of which M = 4 has two) 4 of values and M of x per tile.
    """
    STEPS: tl.constexpr = 2 if M == 4 else 1
    inside = word < end
    found = ()
    for j in tl.static_range(4):
        found = found + (load1(at_index + word * 64 + 8 * j, inside, ALL),)
    for s in tl.static_range(STEPS):
        slot = word * (8 * STEPS) + 8 * s
        near, far, some = inside, inside, inside
        if not EVEN:
            some = inside & (slot + g < slots)
            near, far = inside & (slot + t < slots), inside & (slot + 4 + t < slots)
        found = found + load4(at_values + slot * 32, some, ALL, True)
        for k in tl.static_range(TILES):
            row = tl.minimum(g + 8 * k, rows - 1) * stride
            at = (x + (row + (slot + t) * M)).to(tl.int64)
            if M == 4:
                found = found + load2(at, near, ALL) + load2(at + 32, far, ALL)
            else:
                found = found + load4(at, near, ALL, False)
                if M == 16:
                    found = found + load4(at + 16, near, ALL, False)
                found = found + load4(at + 8 * M, far, ALL, False)
                if M == 16:
                    found = found + load4(at + 8 * M + 16, far, ALL, False)
    return found


@triton.jit
def _add(total, found, t, M: tl.constexpr, TILES: tl.constexpr, BF16: tl.constexpr):
    """The totals, and the products of a word's fragments with 8 * TILES rows of x."""
    STEPS: tl.constexpr = 2 if M == 4 else 1
    w0, w1, w2, w3 = four(found, 0)
    w, u = tl.where(t < 2, w0, w2), tl.where(t < 2, w1, w3)
    for s in tl.static_range(STEPS):
        v = transpose(four(found, 4 + s * (4 + M * TILES)))
        e = _metadata(w, u, s, M)
        f0, f1 = _fields(w0, t, s, M), _fields(w1, t, s, M)
        f2, f3 = _fields(w2, t, s, M), _fields(w3, t, s, M)
        a = ()
        for i in tl.static_range(M // 4):
            near, far = 0x20002 * i + 0 * t, 0x20002 * (i + M // 4) + 0 * t
            a = a + (
                v[0] & equal_halves(f0, near), v[1] & equal_halves(f1, near),
                v[0] & equal_halves(f0, far), v[1] & equal_halves(f1, far),
                v[2] & equal_halves(f2, near), v[3] & equal_halves(f3, near),
                v[2] & equal_halves(f2, far), v[3] & equal_halves(f3, far),
            )  # fmt: skip
        result = ()
        for k in tl.static_range(TILES):
            c, d = four(total, 8 * k), four(total, 8 * k + 4)
            for i in tl.static_range(M // 4):
                b = _columns(found, 8 + s * (4 + M * TILES) + M * k + i, M)
                c = multiply(four(a, 8 * i), b, c, e, BF16, False)
                d = multiply(four(a, 8 * i + 4), b, d, e, BF16, True)
            result = result + c + d
        total = result
    return total


@triton.jit
def _columns(found, i: tl.constexpr, M: tl.constexpr):
    """B: two columns of slot t, two of slot 4 + t, and the same M / 2 columns further on."""
    return found[i], found[i + M // 2], found[i + M // 4], found[i + 3 * M // 4]


@triton.jit
def _fields(w, t, s: tl.constexpr, M: tl.constexpr):
    """Places of thread t's two slots, one in each half, without their low bits."""
    BITS: tl.constexpr = 2 if M == 4 else 4
    return (w >> (BITS * (4 * s + t))) & ((M - 2) * 0x10001)


@triton.jit
def _metadata(w, v, s: tl.constexpr, M: tl.constexpr):
    """Metadata of two outputs' words, 16 bits of each: for all quads, of even and odd threads.

    A quad keeps places p (low bit of its even slot) and 2 + q (low bit of the odd one).
    """
    even, odd = pick_bytes(w, v, 0x5410 + 0 * w), pick_bytes(w, v, 0x7632 + 0 * w)
    if M == 4:  # 2 bits for a slot: spread to 4
        low = ((even >> (8 * s)) & 0x00550055) | (((odd >> (8 * s)) & 0x00550055) << 1)
        low = (low | (low << 4)) & 0x0F0F0F0F
        low = (low | (low << 2)) & 0x33333333
        even, odd = low, low >> 1
    return (even & 0x11111111) | ((odd & 0x11111111) << 2) | -0x77777778  # 0x88888888
