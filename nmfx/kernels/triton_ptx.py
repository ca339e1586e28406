"""PTX inside Triton, which has no sparse product, written for one thread.

Every tensor has as many elements as the program has threads, so element i lies in thread i (a test
reads that in the compiler's layouts). `tests/ptx.py` does the same in numpy.

Fragments: PTX ISA, "Matrix fragments for sparse mma.m16n8k32"; g is a thread's group of four in its
warp, t its place there. Thread t even gives the metadata of quads 0 to 3, t odd of 4 to 7, for
outputs g (low half) and g + 8; t < 2 for the first product, t >= 2 for the second.
"""

import triton
import triton.language as tl


@triton.jit
def load4(at, exists, ALL: tl.constexpr, ONCE: tl.constexpr):
    """16 bytes, zeros where not `exists` (with ALL they do); read ONCE, they are not cached."""
    load: tl.constexpr = "ld.global.nc.L1::no_allocate.v4.b32" if ONCE else "ld.global.nc.v4.b32"
    if ALL:
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
def load2(at, exists, ALL: tl.constexpr):
    """8 bytes, zeros where not `exists`."""
    if ALL:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [at],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0;"
        " @p ld.global.nc.v2.b32 {$0, $1}, [$2]; }",
        "=&r,=&r,l,r",
        [at, exists.to(tl.int32)],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def load1(at, exists, ALL: tl.constexpr):
    """4 bytes, zeros where not `exists`."""
    if ALL:
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
def transpose(a):
    """Four 8 x 8 matrices of 16-bit numbers, a row of 8 in the four threads of a group."""
    return tl.inline_asm_elementwise(
        """movmatrix.sync.aligned.m8n8.trans.b16 $0, $4;
        movmatrix.sync.aligned.m8n8.trans.b16 $1, $5;
        movmatrix.sync.aligned.m8n8.trans.b16 $2, $6;
        movmatrix.sync.aligned.m8n8.trans.b16 $3, $7;""",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [a[0], a[1], a[2], a[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def from_neighbour(a):
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
def pick_bytes(a, b, which):
    """PTX's prmt: four bytes out of the eight of b, a, one digit of `which` for each."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, which], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def multiply(a, b, c, e, BF16: tl.constexpr, SECOND: tl.constexpr):
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
def equal_halves(a, b):
    """Ones in the halves of 16 bits that are equal, as positive numbers."""
    return tl.inline_asm_elementwise(
        "set.eq.u32.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )
