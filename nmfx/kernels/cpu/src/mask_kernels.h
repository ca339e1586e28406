// The pieces of mask_groups.h and mask_apply.h put together, for the instruction set of the file
// that includes this one. It defines kBytes; any(vector); stream_vector(out, in), a store around the
// caches, and streamed(), which makes such stores visible to others; and, at its end, a MaskKernels.
#pragma once
#include "mask_apply.h"
#include "mask_groups.h"

namespace nmfx {
namespace {

// Elements of a chunk: weight, result and mask stay in a first-level cache of 32 KB.
constexpr int64_t kChunk = 2048;
// A run of columns of a row, read from one place: at least as long as what CPUs prefetch well.
constexpr int64_t kMinTile = 128;
// Slabs (m rows of `inner` elements) with fewer columns go together as one chunk.
constexpr int64_t kNarrow = 64;
constexpr int64_t kMaskElements = 64 * kMinTile + 64;  // m <= 64 rows; whole vectors at the end

struct Cut {
  int64_t items, elements;
  int64_t size;   // rows: groups of an item. Narrow columns: its slabs. Wide ones: its columns
  int64_t tiles;  // items of a slab, wide columns only
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Cut cut_of(const MaskCall& c) {
  const int64_t groups = c.outer * (c.columns / c.m);  // slabs, with columns
  Cut cut = {};
  if (c.inner <= kNarrow) {
    const int64_t elements = c.m * c.inner;
    cut.size = ceil_div(kChunk, elements);
    // Whole blocks of transposed vectors: 64 lanes at most.
    if (c.inner == 1) cut.size = ceil_div(cut.size, 64) * 64;
    cut.items = ceil_div(groups, cut.size);
    cut.elements = cut.size * elements;
  } else {
    cut.size = kChunk / c.m / 64 * 64;
    if (cut.size < kMinTile) cut.size = kMinTile;
    cut.tiles = ceil_div(c.inner, cut.size);
    cut.items = groups * cut.tiles;
    cut.elements = cut.size * c.m;
  }
  return cut;
}

// Results of this many bytes pass the caches by: nothing of them would be left in a second-level
// cache, and a line that is not read before it is written is a third less to move. Milliseconds as
// above, 2:4: 10.2 / 14.6 before, 6.5 / 12.5 past the caches.
constexpr int64_t kPastCaches = 16 << 20;

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// The elements from `first` on, as `mask` says.
template <class K>
void apply_to(const MaskCall& c, const K* mask, int64_t first, int64_t count, void* o) {
  using D = DType;
  const void* w = static_cast<const K*>(c.weight) + first;
  const void* g = static_cast<const char*>(c.grad) + first * bytes_of(c.other_type);
  if constexpr (sizeof(K) == 8) {
    if (!c.grad) return project<D::f64, D::f64>(w, mask, o, count);
    gradient<D::f64, D::f64>(w, g, mask, o, c.lambda, count);
  } else if constexpr (sizeof(K) == 4) {
    const float lambda = float(c.lambda);
    switch (c.other_type) {
      case D::bf16:
        if (!c.grad) return project<D::f32, D::bf16>(w, mask, o, count);
        return gradient<D::f32, D::bf16>(w, g, mask, o, lambda, count);
      case D::f16:
        if (!c.grad) return project<D::f32, D::f16>(w, mask, o, count);
        return gradient<D::f32, D::f16>(w, g, mask, o, lambda, count);
      default:
        if (!c.grad) return project<D::f32, D::f32>(w, mask, o, count);
        return gradient<D::f32, D::f32>(w, g, mask, o, lambda, count);
    }
  } else {
    const float lambda = float(c.lambda);
    if (!c.grad) return project<D::bf16, D::bf16>(w, mask, o, count);  // as bits: float16 too
    if (c.weight_type == D::bf16)
      gradient<D::bf16, D::bf16>(w, g, mask, o, lambda, count);
    else
      gradient<D::f16, D::f16>(w, g, mask, o, lambda, count);
  }
}

// Copies to memory around the caches; what is not aligned to a vector goes the usual way.
inline void stream(char* out, const char* in, int64_t bytes) {
  int64_t i = -reinterpret_cast<int64_t>(out) & (kBytes - 1);
  i = i < bytes ? i : bytes;
  memcpy(out, in, size_t(i));
  for (; i + kBytes <= bytes; i += kBytes) stream_vector(out + i, in + i);
  memcpy(out + i, in + i, size_t(bytes - i));
}

// How far ahead weights are asked for: within a few KB the CPU's own prefetching has hardly begun.
// Milliseconds, 4096 x 4096 float32 2:4, project / gradient, one thread of an AMD EPYC (Zen 4, AVX2),
// where memcpy took 6.5: 1 KB 8.2 / 10.0, 2 KB 8.4 / 10.0, 4 KB 9.1 / 11.0, 8 KB 9.3 / 11.5.
constexpr int64_t kAhead = 2048;

// Elements, at least, whose masks one call finds. A call for one vector of groups spends as much on
// itself: 0.44 ns per element of a weight in the cache (768 x 768 float32 2:4, one thread of an AMD
// EPYC with AVX2), 0.31 to 0.36 from 128 elements on; with 512 the gradients are asked for too late.
//
// The masks of contiguous groups are used at once, so that results are written while the next weights
// are on their way: 9.0 / 10.7 ms as above with 4 KB, and 10.0 / 13.1 where those of a chunk came first.
// Not those of narrow columns: rows of 9, say, end within a cache line, and written past the caches in
// such pieces a large weight took 1.4 times as long.
constexpr int64_t kBatch = 256;

NMFX_INLINE void fetch(const void* memory, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64)
    __builtin_prefetch(static_cast<const char*>(memory) + b);
}

// Asks for what meets the mask of `count` elements: their gradients, and the lines of the result,
// which the CPU would else read one store after the other when the mask is done. Milliseconds for
// 9.4 MB in a third-level cache of 32 MB, 2:4, one thread of an AMD EPYC with AVX2: 1.3 to 1.5
// without the result's lines, 0.8 to 0.95 with them; a copy 0.5 to 0.7.
NMFX_INLINE void fetch_others(const MaskCall& c, int64_t first, int64_t count, int64_t out_bytes,
                              bool past_caches) {
  const int64_t size = bytes_of(c.other_type);
  if (c.grad) fetch(static_cast<const char*>(c.grad) + first * size, count * size);
  if (past_caches || c.out == c.grad || c.out == c.weight) return;
  fetch(static_cast<const char*>(c.out) + first * out_bytes, count * out_bytes);
}

template <class K>
void run_items(const MaskCall& c, int64_t begin, int64_t end, K infinity) {
  const Cut cut = cut_of(c);
  const K limit = K(infinity + 1);
  const K* w = static_cast<const K*>(c.weight);
  const K* last = w + c.outer * c.columns * c.inner;
  const int64_t slab = c.m * c.inner, slabs = c.outer * (c.columns / c.m);
  const int64_t out_bytes = bytes_of(c.grad ? c.weight_type : c.other_type);
  const bool past_caches = c.out != c.weight && c.out != c.grad &&
                           c.outer * c.columns * c.inner * out_bytes >= kPastCaches;
  alignas(64) K mask[kMaskElements], result[kMaskElements];
  auto apply = [&](const K* kept, int64_t first, int64_t count) {
    char* out = static_cast<char*>(c.out) + first * out_bytes;
    apply_to(c, kept, first, count, past_caches ? static_cast<void*>(result) : out);
    if (past_caches) stream(out, reinterpret_cast<const char*>(result), count * out_bytes);
  };
  // Inlined: as calls they cost a 9.4 MB weight a third, and gradients of 64 MB 15 %.
  auto others = [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    fetch_others(c, first, count, out_bytes, past_caches);
  };
  auto soon = [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    fetch(reinterpret_cast<const char*>(w + first) + kAhead, count * int64_t(sizeof(K)));
    others(first, count);
  };
  for (int64_t i = begin; i < end; i++) {
    if (cut.tiles) {
      const int64_t column = i % cut.tiles * cut.size, first = i / cut.tiles * slab + column;
      const int64_t width = c.inner - column < cut.size ? c.inner - column : cut.size;
      // The weights of the next tile with them made it slower: 32 KB in flight.
      for (int k = 0; k < c.m; k++) others(first + k * c.inner, width);
      mask_columns(w + first, c.inner, last, mask, cut.size, width, 1, 0, c.m, c.n, limit);
      for (int k = 0; k < c.m; k++) apply(mask + k * cut.size, first + k * c.inner, width);
      continue;
    }
    const int64_t s = i * cut.size, count = slabs - s < cut.size ? slabs - s : cut.size;
    if (c.kept) {  // one column of groups of one
      for (int64_t k = 0; k < count; k += kBatch) {
        const int64_t few = count - k < kBatch ? count - k : kBatch, at = s + k;
        soon(at, few);
        for (int64_t j = 0; j < few; j++) mask[j] = K(-K(c.kept[at + j]));
        apply(mask, at, few);
      }
      continue;
    }
    const int64_t step = c.inner == 1 ? kLanes<K> * ceil_div(kBatch, kLanes<K> * c.m)
                                      : ceil_div(kBatch, slab);
    for (int64_t k = 0; k < count; k += step) {
      const int64_t few = count - k < step ? count - k : step, at = (s + k) * slab;
      soon(at, few * slab);
      if (c.inner == 1) {
        mask_rows(w + at, mask, few, c.m, c.n, limit);
        apply(mask, at, few * slab);
      } else {
        mask_columns(w + at, c.inner, last, mask + k * slab, c.inner, c.inner, few, slab, c.m, c.n,
                     limit);
      }
    }
    if (c.inner != 1) apply(mask, s * slab, count * slab);
  }
  if (past_caches) streamed();
}

int64_t mask_items(const MaskCall& c, int64_t* elements) {
  const Cut cut = cut_of(c);
  *elements = cut.elements;
  return cut.items;
}

void mask_run(const MaskCall& c, int64_t begin, int64_t end) {
  switch (c.weight_type) {
    case DType::f64: return run_items<int64_t>(c, begin, end, 0x7ff0000000000000);
    case DType::f32: return run_items<int32_t>(c, begin, end, 0x7f800000);
    case DType::f16: return run_items<int16_t>(c, begin, end, 0x7c00);
    case DType::bf16: return run_items<int16_t>(c, begin, end, 0x7f80);
  }
}

}  // namespace
}  // namespace nmfx
