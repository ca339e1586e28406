// The few-rows kernel of AVX-512: lane = output row, so a kept weight finds its activation by a
// permutation, and nothing is summed across lanes.
//
//   word     | field 15 .. 3 1 | field 14 .. 2 0 |   one per lane; 2:4: 16 fields, 32 columns
//   window   x[column] .. x[column + 15]             a register of activations, of one row
//   slot s   sums[lane] += values[s][lane] * permute(window, its group in the window | field)
//
// Up to 16 rows of activations make a pass. Their windows lie in the order they are read,
//
//   x   [window of columns][row of the pass][column of the window]
//
// so a window is a plain load. Repeating each group over a register instead takes a shuffle, which
// is what the permutations compete for: 16 rows of 2:4, fp32, all in the first-level cache of a
// Zen 5, did 3.9 G multiply-adds of a vector a second so, and 5.8 with windows.
//
//   few rows    a pass: weights stream once, two blocks at a time
//   more        chunk of columns: its windows of a pass stay in the first-level cache, its weights
//               of some blocks in the second-level cache, while all passes go over all these blocks
//
// Included by the files of instruction sets with AVX-512. P says what a product is:
//   Value, Element   of weights, of activations
//   kWidth, kUnit    columns of a window; slots that one instruction multiplies
//   kLine            slots whose values fill 64 bytes
//   values(p), index<..>(word, slot, slot of the window), window<W>(x), fma, copy
//   fma_last         where kUnit is 2: a slot without another
#pragma once
#include "blocks.h"

namespace nmfx {
namespace {

constexpr int kPass = 16;  // most rows of a pass
constexpr int kPair = 8;   // most rows that two blocks are read for at once

// What stays near while a chunk is worked on.
struct Budget {
  int64_t windows;  // bytes of a pass over a chunk of columns
  int64_t weights;  // bytes of the chunk's blocks
};

// Milliseconds, 4096 x 4096 from memory, fp32. Zen 5 (48 KB, 1 MB): weights with and without a
// limit, 2:4 at 16 rows 2.1 / 4.4; windows of 16 KB against 32 KB, both without, at 32 rows 3.9 /
// 5.7, at 128 rows equal. Intel Xeon (AMX; 48 KB, 2 MB), its own budget against the other: 2:4 at
// 12 rows 3.05 / 3.40, at 32 rows 5.65 / 5.90, 1:16 .42 / .50 and .83 / .94; 32 and 128 KB in
// between.
constexpr Budget kAmd = {16 << 10, 128 << 10}, kIntel = {32 << 10, 32 << 10};
// Of the sums of these blocks. Zen 5, against 64 KB: 1:16 at 128 rows fp32 2.35 / 2.65, bf16 1.34 /
// 1.44, 2:4 equal.
constexpr int64_t kSumsBytes = 128 << 10;
constexpr int kWindowTile = 128;  // most rows that share them

template <int N, int M, class P>
struct Word {
  static constexpr int kFields = fields_per_word(M);
  static constexpr int kColumns = kFields / N * M;
  static constexpr int kWidth = P::kWidth < kColumns ? P::kWidth : kColumns;  // of a window
  static constexpr int kWindows = kColumns / kWidth;
  static constexpr int kSlots = kFields / kWindows;  // of a window
  static_assert(kFields % N == 0 && kColumns % kWidth == 0, "a word holds whole windows");
  static_assert(kSlots % P::kUnit == 0, "a window holds whole units");
};

// What a pass asks of memory: bytes from what it reads to what it asks for, and for how many with
// each 64 bytes of values.
struct Fetch {
  int64_t values, index, step;
};

// sums[STREAMS][ROWS][16] += words [w0, w1) of STREAMS blocks; `slots` ends the last word.
template <int N, int M, int ROWS, int STREAMS, class P>
void add_words(const Stream<typename P::Value>& blocks, int64_t w0, int64_t w1, int64_t slots,
               const typename P::Element* x, float* sums, int64_t sums_step, const Fetch& fetch) {
  using W = Word<N, M, P>;
  using T = typename P::Value;
  // With few sums a single chain of additions for each would wait for itself. This must not depend
  // on STREAMS: which blocks are paired depends on the threads, and results do not.
  constexpr int CHAINS = ROWS <= 2 ? 2 : 1;
  constexpr int UNITS = W::kSlots / P::kUnit;  // of a window
  constexpr int SHARE = UNITS > 1 ? 2 : 1;     // units that share the load of a window
  __m512 acc[STREAMS][CHAINS][ROWS];
  NMFX_UNROLL for (int b = 0; b < STREAMS; b++) NMFX_UNROLL for (int r = 0; r < ROWS; r++) {
    acc[b][0][r] = _mm512_loadu_ps(sums + b * sums_step + r * kBlock);
    if (CHAINS == 2) acc[b][CHAINS - 1][r] = _mm512_setzero_ps();
  }
  const T* v = blocks.values + w0 * W::kFields * kBlock;
  const uint32_t* word = blocks.index + w0 * kBlock;
  const char* ahead = reinterpret_cast<const char*>(v) + fetch.values;
  const int64_t step_ahead = blocks.values_step * int64_t(sizeof(T));
  x += w0 * W::kColumns * ROWS;
  const int64_t whole = slots / W::kFields < w1 ? slots / W::kFields : w1;
  for (int64_t w = w0; w < whole; w++, word += kBlock) {
    __m512i fields[STREAMS];
    NMFX_UNROLL for (int b = 0; b < STREAMS; b++) {
      const uint32_t* at = word + b * blocks.index_step;
      fields[b] = V::load_index(at);
      __builtin_prefetch(reinterpret_cast<const char*>(at) + fetch.index);
    }
    NMFX_UNROLL for (int window = 0; window < W::kWindows; window++)
        NMFX_UNROLL for (int unit = 0; unit < UNITS; unit += SHARE) {
      typename P::Values values[STREAMS][SHARE];
      __m512i index[STREAMS][SHARE];
      NMFX_UNROLL for (int b = 0; b < STREAMS; b++) NMFX_UNROLL for (int i = 0; i < SHARE; i++) {
        const int in_window = (unit + i) * P::kUnit, slot = window * W::kSlots + in_window;
        values[b][i] = P::values(v + b * blocks.values_step + slot * kBlock);
        index[b][i] = P::template index<N, M>(fields[b], slot, in_window);
        if (slot % P::kLine == 0)
          __builtin_prefetch(ahead + b * step_ahead + slot / P::kLine * fetch.step);
      }
      NMFX_UNROLL for (int r = 0; r < ROWS; r++) {
        auto part = P::template window<W::kWidth>(x + (window * ROWS + r) * W::kWidth);
        // Here and once. GCC loads it again for each use, or all early, and has no registers left.
        asm volatile("" : "+v"(part));
        NMFX_UNROLL for (int b = 0; b < STREAMS; b++) NMFX_UNROLL for (int i = 0; i < SHARE; i++) {
          __m512& sum = acc[b][(window * UNITS + unit + i) % CHAINS][r];
          sum = P::fma(values[b][i], part, index[b][i], sum);
        }
      }
    }
    v += W::kFields * kBlock;
    ahead += W::kFields / P::kLine * fetch.step;
    x += W::kColumns * ROWS;
  }
  const int left = whole < w1 ? int(slots - whole * W::kFields) : 0;  // of a last word
  for (int slot = 0; slot < left; slot += P::kUnit) {
    const int in_window = slot % W::kSlots;
    NMFX_UNROLL for (int b = 0; b < STREAMS; b++) {
      const T* at = v + b * blocks.values_step + slot * kBlock;
      const auto fields = V::load_index(word + b * blocks.index_step);
      const auto index = P::template index<N, M>(fields, slot, in_window);
      NMFX_UNROLL for (int r = 0; r < ROWS; r++) {
        const auto part =
            P::template window<W::kWidth>(x + (slot / W::kSlots * ROWS + r) * W::kWidth);
        __m512& sum = acc[b][0][r];
        sum = slot + P::kUnit <= left ? P::fma(P::values(at), part, index, sum)
                                      : P::fma_last(at, part, index, sum);
      }
    }
  }
  NMFX_UNROLL for (int b = 0; b < STREAMS; b++) NMFX_UNROLL for (int r = 0; r < ROWS; r++) {
    __m512 total = acc[b][0][r];
    if (CHAINS == 2) total = _mm512_add_ps(total, acc[b][CHAINS - 1][r]);
    _mm512_storeu_ps(sums + b * sums_step + r * kBlock, total);
  }
}

// The same for a number of rows that is not known before: up to kPair for two blocks, from there on
// for one.
template <int N, int M, int ROWS, int STREAMS, class P>
inline void add_pass(const Stream<typename P::Value>& blocks, int64_t w0, int64_t w1, int64_t slots,
                     const typename P::Element* x, int64_t rows, float* sums, int64_t sums_step,
                     const Fetch& fetch) {
  if constexpr (ROWS > (STREAMS == 2 ? 1 : kPair))
    if (rows < ROWS)
      return add_pass<N, M, ROWS - 1, STREAMS, P>(blocks, w0, w1, slots, x, rows, sums, sums_step,
                                                  fetch);
  add_words<N, M, ROWS, STREAMS, P>(blocks, w0, w1, slots, x, sums, sums_step, fetch);
}

// The rows of a call in passes that differ by one row at most: none has few, unless there are few.
struct Passes {
  int64_t positions, count;

  explicit Passes(const Call& c)
      : positions(c.input.positions), count((positions + kPass - 1) / kPass) {}
  int64_t start(int64_t pass) const { return pass * positions / count; }
};

int64_t passes_of(const Call& c) { return Passes(c).count; }

template <int N, int M, class P>
struct Windows {
  using W = Word<N, M, P>;
  using T = typename P::Value;
  using Element = typename P::Element;

  const Call& c;
  const Weight& w;
  const Budget& budget;
  const Element* x;

  Windows(const Call& call, const Budget& budget, const void* input)
      : c(call), w(call.weight), budget(budget), x(static_cast<const Element*>(input)) {}

  Stream<T> block(int64_t b, int64_t gap = 0) const {
    const int64_t values_step = w.slots * kBlock, index_step = w.words * kBlock;
    return {static_cast<const T*>(w.values) + b * values_step, w.index + b * index_step,
            gap * values_step, gap * index_step};
  }

  // Blocks [b0, b1) for up to kPair rows. Two blocks far apart are two streams of memory, and share
  // the windows. One without another is taken twice.
  void stream(int64_t rows, int64_t b0, int64_t b1) const {
    alignas(64) float sums[2 * kPair * kBlock];
    const int64_t half = (b1 - b0 + 1) / 2;
    for (int64_t b = b0; b < b0 + half; b++) {
      const int64_t gap = b + half < b1 ? half : 0;
      memset(sums, 0, size_t(2 * rows) * kBlock * 4);
      add_pass<N, M, kPair, 2, P>(block(b, gap), 0, w.words, w.slots, x, rows, sums, rows * kBlock,
                                  {2048, 1024, 64});
      store_sums(c, sums, 0, rows, b);
      if (gap) store_sums(c, sums + rows * kBlock, 0, rows, b + gap);
    }
  }

  // Blocks [b0, b1) for passes [u0, u1).
  void chunks(const Passes& passes, int64_t u0, int64_t u1, int64_t b0, int64_t b1) const {
    alignas(64) float sums[kSumsBytes / 4];
    const int64_t p0 = passes.start(u0), rows = passes.start(u1) - p0;
    const int64_t chunk = at_least_1(budget.windows / (kPass * W::kColumns * int64_t(sizeof(*x))));
    const int64_t chunk_values = chunk * W::kFields * kBlock * int64_t(sizeof(T));
    const int64_t most = at_least_1(budget.weights / (chunk_values + chunk * kBlock * 4));
    const int64_t fit = kSumsBytes / 4 / kBlock / rows, range = fit < most ? fit : most;
    for (int64_t r0 = b0; r0 < b1; r0 += range) {
      const int64_t r1 = r0 + range < b1 ? r0 + range : b1;
      memset(sums, 0, size_t((r1 - r0) * rows) * kBlock * 4);
      for (int64_t w0 = 0; w0 < w.words; w0 += chunk) {
        const int64_t w1 = w0 + chunk < w.words ? w0 + chunk : w.words;
        // The words after these, of the next blocks after the last; each pass asks for a part.
        const int64_t words = w1 < w.words ? w1 - w0 : range * w.words - w0;
        const int64_t slots = w1 < w.words ? words * W::kFields
                                           : range * w.slots - w0 * W::kFields;
        for (int64_t u = u0; u < u1; u++) {
          const int64_t p = passes.start(u), count = passes.start(u + 1) - p;
          const int64_t part = (u - u0) * chunk_values / (u1 - u0);
          const Fetch fetch = {slots * kBlock * int64_t(sizeof(T)) + part,
                               u == u0 ? words * kBlock * 4 : 0, 64 / (u1 - u0)};
          for (int64_t b = r0; b < r1; b++)
            add_pass<N, M, kPass, 1, P>(block(b), w0, w1, w.slots,
                                        x + p * w.words * W::kColumns, count,
                                        sums + ((b - r0) * rows + p - p0) * kBlock, 0, fetch);
        }
      }
      for (int64_t b = r0; b < r1; b++)
        store_sums(c, sums + (b - r0) * rows * kBlock, p0, rows, b);
    }
  }

  static int64_t at_least_1(int64_t n) { return n < 1 ? 1 : n; }

  static void run(const Call& c, const Budget& budget, const void* x, int64_t u0, int64_t u1,
                  int64_t b0, int64_t b1) {
    const Windows windows(c, budget, x);
    const Passes passes(c);
    if (passes.positions <= kPair) return windows.stream(passes.positions, b0, b1);
    windows.chunks(passes, u0, u1, b0, b1);
  }

  // Rows of passes [u0, u1) in the order that they are read, filled up with zeros.
  static void prepare(const Call& c, void* x, int64_t u0, int64_t u1) {
    const Passes passes(c);
    const int64_t all = c.weight.words * W::kColumns;
    for (int64_t u = u0; u < u1; u++) {
      const int64_t p0 = passes.start(u), rows = passes.start(u + 1) - p0;
      Element* out = static_cast<Element*>(x) + p0 * all;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < all; k += W::kWidth)
          P::template copy<W::kWidth>(c.input, (p0 + r) * c.input.row_stride + k,
                                      c.weight.columns - k, out + k * rows + r * W::kWidth);
    }
  }
};

struct WindowKernel {
  void (*run)(const Call&, const Budget&, const void* x, int64_t u0, int64_t u1, int64_t b0,
              int64_t b1);
  void (*prepare)(const Call&, void* x, int64_t u0, int64_t u1);
};

template <int N, int M, class P>
constexpr WindowKernel window_kernel() {
  return {Windows<N, M, P>::run, Windows<N, M, P>::prepare};
}

template <class P>
WindowKernel window_kernel(int n, int m) {
  switch (n * 100 + m) {
    case 204: return window_kernel<2, 4, P>();
    case 104: return window_kernel<1, 4, P>();
    case 408: return window_kernel<4, 8, P>();
    case 208: return window_kernel<2, 8, P>();
    case 108: return window_kernel<1, 8, P>();
    case 116: return window_kernel<1, 16, P>();
    case 216: return window_kernel<2, 16, P>();
    case 416: return window_kernel<4, 16, P>();
    case 816: return window_kernel<8, 16, P>();
    default: return {nullptr, nullptr};
  }
}

}  // namespace
}  // namespace nmfx
