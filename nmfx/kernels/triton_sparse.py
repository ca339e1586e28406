"""2:4 and 1:4 weights as they are packed, on sparse tensor cores: for few rows of input.

Triton has no sparse product, so this is PTX inside Triton, written for one thread: every tensor has
as many elements as the program has threads, so element i lies in thread i (a test reads that in the
compiler's layouts). Weights are read once, 16 bytes per thread, and never expanded.

    a word of the index: 16 slots of one output        a warp takes 32 outputs (2 blocks) of a word

    values [slot][16 outputs]  --movmatrix-->  A (16 outputs x 32 columns, half of them kept)
    index  2 bits for a slot   --bit moves-->  metadata of A
    x      [row][column]       --shuffle--->   B (32 columns x 8 rows)      mma.sp adds A B

The product takes the groups of 4 of its 32 columns in any order, if A, B and metadata agree. Here
they are in the order 0 2 1 3 4 6 5 7: then a thread loads 8 adjacent columns of x at once, and a
word becomes metadata by one exchange of bits.

Fragments: PTX ISA, "Matrix fragments for sparse mma.m16n8k32"; g is a thread's group of four in its
warp, t its place there. Thread t even gives the metadata of quads 0 to 3, t odd of 4 to 7, for
outputs g (low half) and g + 8; t < 2 for the first product, t >= 2 for the second.
"""

import triton
import triton.language as tl

from .triton_linear import activate


@triton.jit
def _load4(at, exists, EVEN: tl.constexpr, ONCE: tl.constexpr):
    """16 bytes, zeros where not `exists`; read ONCE, they need no place in the cache."""
    load: tl.constexpr = "ld.global.nc.L1::no_allocate.v4.b32" if ONCE else "ld.global.nc.v4.b32"
    if EVEN:
        return tl.inline_asm_elementwise(
            load + " {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [at],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0;"
        + " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; @p "
        + load
        + " {$0, $1, $2, $3}, [$4]; }",
        "=&r,=&r,=&r,=&r,l,r",
        [at, exists.to(tl.int32)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load1(at, exists, EVEN: tl.constexpr):
    """4 bytes, zeros where not `exists`."""
    if EVEN:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }",
        "=&r,l,r",
        [at, exists.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _transpose(a, b, c, d):
    """Four 8 x 8 matrices of 16-bit numbers, a row of 8 in the four threads of a group."""
    return tl.inline_asm_elementwise(
        """movmatrix.sync.aligned.m8n8.trans.b16 $0, $4;
        movmatrix.sync.aligned.m8n8.trans.b16 $1, $5;
        movmatrix.sync.aligned.m8n8.trans.b16 $2, $6;
        movmatrix.sync.aligned.m8n8.trans.b16 $3, $7;""",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [a, b, c, d],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _from_neighbour(a):
    """What thread t ^ 1 has."""
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;",
        "=r,r",
        [a],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _bytes(a, b, which):
    """PTX's prmt: four bytes out of the eight of b, a, one digit of `which` for each."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, which], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _multiply(a, b, c, e, BF16: tl.constexpr, SECOND: tl.constexpr):
    """A B + c, with the metadata of threads t < 2, or of the others for the second product."""
    types: tl.constexpr = "f32.bf16.bf16.f32" if BF16 else "f32.f16.f16.f32"
    which: tl.constexpr = "0x1" if SECOND else "0x0"
    return tl.inline_asm_elementwise(
        "mma.sp.sync.aligned.m16n8k32.row.col."
        + types
        + " {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, "
        + which
        + ";",
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], e],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _pair_metadata(w, v, t):
    """Metadata of two outputs' words, 2:4: the four quads that a thread gives, 16 bits of each."""
    # Byte t % 2 of both halves: the first indices of four groups, and their second ones.
    e = _bytes(w, v, tl.where(t % 2 == 0, 0x6420, 0x7531))
    # Fields (first 0..3, second 0..3) become (first, second) of groups 0 2 1 3.
    move = (e ^ (e >> 6)) & 0x00CC00CC
    return e ^ move ^ (move << 6)


@triton.jit
def _legal(e):
    """Metadata in which groups that do not exist, all zeros, keep places 0 and 1."""
    none = ~(e | (e >> 1) | (e >> 2) | (e >> 3)) & 0x11111111
    return e | (none << 2)


@triton.jit
def _single_metadata(w, v, t, HALF: tl.constexpr):
    """The same for 1:4: a kept value at place 0 or 1 of a quad (0100), or at 2 or 3 (1110)."""
    shift = 8 * HALF + 4 * (t % 2)
    w = (w >> shift) & 0x000A000A  # the high bits of two fields in each half
    v = (v >> shift) & 0x000A000A
    w = (w | (w << 2)) & 0x00220022
    v = (v | (v << 2)) & 0x00220022
    e = _bytes(w, v, 0x6420 + 0 * t)
    return 0x44444444 | e | (e << 2)


@triton.jit
def _single_values(pair, w, t, HALF: tl.constexpr):
    """1:4: two kept values as two pairs of which one is zero; a field's low bit says which."""
    field = w >> (16 * (t // 2) + 8 * HALF + 2 * (t % 2))
    low = _bytes(pair, 0 * pair, 0x4410 - (field & 1) * 0x33CC)
    high = _bytes(pair, 0 * pair, 0x4432 - ((field >> 4) & 1) * 0x11EE)
    return low, high


@triton.jit
def _columns(x, stride, rows, row, column, columns, exists, odd, EVEN: tl.constexpr):
    """B of 32 columns and 8 rows of x."""
    at = (x + (tl.minimum(row, rows - 1) * stride + column)).to(tl.int64)
    own = _load4(at, exists & (column < columns), EVEN, False)
    # Of two groups of 4, an even thread keeps places 0 and 1 and an odd one 2 and 3.
    first = _from_neighbour(tl.where(odd, own[0], own[1]))
    second = _from_neighbour(tl.where(odd, own[2], own[3]))
    return (
        tl.where(odd, first, own[0]),
        tl.where(odd, second, own[2]),
        tl.where(odd, own[1], first),
        tl.where(odd, own[3], second),
    )


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
    N: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """32 outputs of up to 8 * TILES rows, over one part of the words.

    Rows of x begin at multiples of `stride`, which 8 divides, and are zero from `columns` to there.
    """
    i = tl.arange(0, 32 * WARPS)
    warp, g, t = i // 32, i // 4 % 8, i % 4
    odd = t % 2 == 1
    last = (outputs - 1) // 16
    pair, part = tl.program_id(0), tl.program_id(1)
    # Row g of a matrix to be transposed: a slot, for thread t of 8 outputs. Rows 2t and 2t + 1
    # become what thread t holds of an output: for 2:4 a group, for 1:4 two.
    quad = g // 2 // 2 + g // 2 % 2 * 2  # 0 2 1 3
    slot = 2 * quad + g % 2 if N == 2 else quad + 4 * (g % 2)
    block = tl.minimum(2 * pair + t // 2, last).to(tl.int64)
    at_values = (values + (block * slots + slot) * 16 + 8 * (t % 2)).to(tl.int64)
    # Output g of fragment f is lane 2f + this, of this block.
    block = tl.minimum(2 * pair + g // 4, last).to(tl.int64)
    at_index = (index + block * words * 16 + g // 2 % 2 * 8 + g % 2).to(tl.int64)
    at_index += 16 * (t // 2) if N == 2 else 0 * t
    column = 16 * (t % 2) + 8 * (t // 2)
    zero = tl.zeros([32 * WARPS], tl.float32)
    total = (zero, zero, zero, zero, zero, zero, zero, zero) * TILES
    end = tl.minimum((part + 1) * per_part, words)
    for begin in range(part * per_part, end, WARPS):
        word = begin + warp
        inside = word < end
        near, far = inside & (word * 16 + slot < slots), inside & (word * 16 + slot + 8 < slots)
        a = _load4(at_values + word * 512, near, EVEN, True)
        b = _load4(at_values + word * 512 + 256, far, EVEN, True)
        w0 = _load1(at_index + word * 64, inside, EVEN)
        w1 = _load1(at_index + word * 64 + 8, inside, EVEN)
        a = _transpose(a[0], a[1], a[2], a[3])
        b = _transpose(b[0], b[1], b[2], b[3])
        if N == 2:
            e = _pair_metadata(w0, w1, t)
            if not EVEN:
                e = _legal(e)
            total = _add(
                total, (a[0], a[1], b[0], b[1]), (a[2], a[3], b[2], b[3]), e,
                x, stride, rows, g, word * 32 + column, columns, inside, odd, TILES, EVEN, BF16,
            )  # fmt: skip
        else:
            w2 = _load1(at_index + word * 64 + 16, inside, EVEN)
            w3 = _load1(at_index + word * 64 + 24, inside, EVEN)
            mine, other = tl.where(t < 2, w0, w2), tl.where(t < 2, w1, w3)
            for HALF in tl.static_range(2):
                v = a if HALF == 0 else b
                e = _single_metadata(mine, other, t, HALF)
                v0, u0 = _single_values(v[0], w0, t, HALF)
                v1, u1 = _single_values(v[1], w1, t, HALF)
                v2, u2 = _single_values(v[2], w2, t, HALF)
                v3, u3 = _single_values(v[3], w3, t, HALF)
                total = _add(
                    total, (v0, v1, u0, u1), (v2, v3, u2, u3), e,
                    x, stride, rows, g, word * 64 + 32 * HALF + column, columns, inside, odd,
                    TILES, EVEN, BF16,
                )  # fmt: skip
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


@triton.jit
def _add(
    total, first, second, e, x, stride, rows, g, column, columns, inside, odd,
    TILES: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """The totals, and the products of both fragments with 8 * TILES rows of 32 columns of x."""
    result = ()
    for k in tl.static_range(TILES):
        b = _columns(x, stride, rows, g + 8 * k, column, columns, inside, odd, EVEN)
        c = total[8 * k], total[8 * k + 1], total[8 * k + 2], total[8 * k + 3]
        d = total[8 * k + 4], total[8 * k + 5], total[8 * k + 6], total[8 * k + 7]
        result = result + _multiply(first, b, c, e, BF16, False)
        result = result + _multiply(second, b, d, e, BF16, True)
    return result
