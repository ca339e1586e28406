"""The GPU kernels of nmfx::sr_ste, in Triton's language; `triton.py` beside this file starts them.

Whatever the layout, a dense weight is [outer, place, inner] in memory: M places of a group, `inner`
elements apart. A program takes `GROUPS` groups as a tile [place, group]: with inner = 1 Triton's
coalescing lays threads along the places, else along the groups, so both read whole sectors. One
warp per program keeps a group within a warp: no kernel waits at a barrier.

Timed on an H200 (benchmarks/results/mask_nvidia-h200_202611.md): up to M = 8 memory is the limit,
from M = 16 (bfloat16) and M = 32 (float32) on instructions are. How many `project` has per element
for sm_90, tiles of 1024, 2-byte and 4-byte weights, inner = 1 (and inner = 9), by nvdisasm:

    M     counting                bisecting
    4     19, 21   (28, 26)       (not built)
    16    65, 61   (70, 66)       90, 179   (83, 140)
    32    109, 109 (124, 119)     90, 195   (78, 124)
    64    323, 209 (349, 342)     96, 206   (83, 137)
"""

import triton
import triton.language as tl


@triton.jit
def _magnitude(weight):
    """`mask.magnitude`: integers that sort like |weight|, of 32 bits for half precision."""
    if weight.dtype == tl.float64:
        key = weight.to(tl.int64, bitcast=True) & 0x7FFF_FFFF_FFFF_FFFF
        key = tl.minimum(key, 0x7FF0_0000_0000_0001)
    elif weight.dtype == tl.float32:
        key = weight.to(tl.int32, bitcast=True) & 0x7FFF_FFFF
        key = tl.minimum(key, 0x7F80_0001)
    else:  # GPUs have no 16-bit compare that is faster
        key = weight.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        key = tl.minimum(key, 0x7C01 if weight.dtype == tl.float16 else 0x7F81)
    return key


@triton.jit
def _kept_by_counting(key, n, PLACES: tl.constexpr):
    """Fewer than N rivals win. Ties: a rival in an earlier place wins with an equal key."""
    place = tl.arange(0, PLACES)
    # >= from an earlier rival; from a later one (and itself) >, which is >= one more.
    later = (place[None, :] >= place[:, None]).to(key.dtype)[:, :, None]
    wins = key[None, :, :] >= key[:, None, :] + later
    return tl.sum(wins.to(tl.int32), axis=1) < n


@triton.jit
def _kept_by_bisecting(key, n, BITS: tl.constexpr):
    """Finds the N-th largest key, highest bit first; of those equal to it the first are kept."""
    one = tl.full([1, 1], 1, key.dtype)
    least = tl.zeros([1, key.shape[1]], key.dtype)
    for bit in range(BITS):
        trial = least | (one << (BITS - 1 - bit))
        enough = tl.sum((key >= trial).to(tl.int32), axis=0, keep_dims=True) >= n
        least = tl.where(enough, trial, least)
    above = key > least
    tied = key == least
    room = n - tl.sum(above.to(tl.int32), axis=0, keep_dims=True)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))


@triton.jit
def _kept(weight, control, M: tl.constexpr, PLACES: tl.constexpr):
    """The mask of a tile [place, group] of weights."""
    # N is read here, on the device: a schedule changes it without a word to the host.
    n = tl.load(control + 1).to(tl.int32)
    # Places past M, where M is no power of two, lose against everything.
    key = tl.where((tl.arange(0, PLACES) < M)[:, None], _magnitude(weight), -1)
    BITS: tl.constexpr = weight.dtype.primitive_bitwidth - 1
    # M comparisons of an element against one per bit of the key (table above).
    if M <= 16 or (M <= 32 and BITS > 16):
        kept = _kept_by_counting(key, n, PLACES)
    else:
        kept = _kept_by_bisecting(key, n, BITS)
    return kept


@triton.jit
def _tile(groups, inner, M: tl.constexpr, PLACES: tl.constexpr, GROUPS: tl.constexpr, LONG):
    """Offsets of the tile [place, group] of this program, and which of them exist."""
    index = tl.int64 if LONG else tl.int32
    group = tl.program_id(0).to(index) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, PLACES)
    first = group // inner * M * inner + group % inner
    offset = first[None, :] + place.to(index)[:, None] * inner
    return offset, (group < groups)[None, :] & (place < M)[:, None]


@triton.jit
def _cast(value, dtype: tl.constexpr):
    """Rounds as torch does: from float64 to half precision by way of float32."""
    if value.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def project(
    weight,
    control,
    out,
    groups,
    inner,
    M: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    LONG: tl.constexpr,
):
    """Reads the weight once, writes the masked weight once, in the dtype of `out`."""
    offset, exists = _tile(groups, inner, M, PLACES, GROUPS, LONG)
    w = tl.load(weight + offset, mask=exists, other=0.0)
    kept = _kept(w, control, M, PLACES)
    tl.store(out + offset, _cast(tl.where(kept, w, 0.0), out.dtype.element_ty), mask=exists)


@triton.jit
def gradient(
    grad,
    weight,
    control,
    out,
    groups,
    inner,
    M: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    LONG: tl.constexpr,
):
    """Reads gradient and weight once, writes g + lambda * (1 - mask) * w once; out may be grad."""
    offset, exists = _tile(groups, inner, M, PLACES, GROUPS, LONG)
    w = tl.load(weight + offset, mask=exists, other=0.0)
    g = tl.load(grad + offset, mask=exists, other=0.0)
    WIDE: tl.constexpr = tl.float32 if w.dtype.primitive_bitwidth == 16 else w.dtype
    # Two roundings, as in eager torch: the host switches contraction to an fma off.
    decayed = g.to(WIDE) + tl.load(control).to(WIDE) * w.to(WIDE)
    # The gradient of a kept weight is its own, NaN payload included, so not by way of WIDE.
    plain = g if g.dtype == w.dtype else g.to(WIDE).to(w.dtype)
    result = tl.where(_kept(w, control, M, PLACES), plain, decayed.to(w.dtype))
    tl.store(out + offset, _cast(result, out.dtype.element_ty), mask=exists)
