// The few-rows kernel of AVX2: lane = output row, so a kept weight finds its activation by a
// permutation of its group, and nothing is summed across lanes.
//
//   index word  | field 15 .. 3 1 | field 14 .. 2 0 |   one word per lane, 2:4: 16 fields
//   slot s      values[s][lane] * permute(x[group], field s of lane), added to the row's sums
//
// Weights stream once: each block of 16 output rows is cut into runs of words that stay in the
// first-level cache while all activation rows pass over them.
//
// Included by isa_avx2.cpp, which defines the struct V:
//   F, Ints          a vector of kLanes floats, of kLanes 32-bit integers
//   kHalves          vectors per block of 16
//   kRegisters       vectors that the CPU holds
//   kRows            rows of activations in one pass; up to kWholeRows of them take whole blocks
//   kAhead, kIndexAhead  bytes that two streams ask for ahead, of values and index
//   load/store/zero/fma, load_values(const T*), load_index, shift<..>
//   Window<M>, window<M>(x), permute<M>(window, fields)
#pragma once
#include "blocks.h"

namespace nmfx {
namespace {

template <int N, int M>
struct Steps {  // a step is the least number of groups with an even number of slots
  static constexpr int kBits = field_bits(M), kFields = fields_per_word(M);
  static constexpr int kGroups = N % 2 ? 2 : 1, kSlots = kGroups * N;
  static constexpr int kPerWord = kFields / kSlots;
  static_assert(kPerWord * kSlots == kFields, "a word holds whole steps");
};

// What a pass over a run of weights asks of memory. The only pass: what comes a fixed distance
// later. The first of several finds its run asked for already, by the passes over the run before
// it, each of them a part: so memory is at work during all passes.
struct Fetch {
  int64_t values, index;  // bytes from what is read to what is asked for
  int64_t step;           // bytes to ask for with each two slots

  static Fetch near(bool two_streams, int64_t pair) {
    return {two_streams ? V::kAhead : 4096, two_streams ? V::kIndexAhead : 1024, pair};
  }
  static Fetch part(int64_t pass, int64_t passes, int64_t values, int64_t index, int64_t pair) {
    return {values + pass * values / passes, pass ? -1 : index, pair / passes};
  }
};

// Adds words [w0, w1) of H vectors of lanes of STREAMS blocks to sums[STREAMS][ROWS][16]; `slots`
// ends the last word. The pointers start at the first of the lanes.
template <int N, int M, int ROWS, int H, int STREAMS, class T>
inline __attribute__((always_inline)) void few_words(const Stream<T>& blocks, int64_t w0,
                                                     int64_t w1, int64_t slots, const float* x,
                                                     int64_t ldx, float* sums, int64_t sums_step,
                                                     const Fetch& fetch) {
  using S = Steps<N, M>;
  // With few sums a single chain of additions for each would wait for itself. This must not depend
  // on STREAMS: which blocks are paired depends on the threads, and results do not.
  constexpr int CHAINS = H == 1 && ROWS <= 2 ? 2 : 1;
  typename V::F acc[STREAMS][CHAINS][ROWS][H];
  NMFX_UNROLL for (int b = 0; b < STREAMS; b++) NMFX_UNROLL for (int r = 0; r < ROWS; r++)
      NMFX_UNROLL for (int h = 0; h < H; h++) {
    acc[b][0][r][h] = V::load(sums + b * sums_step + r * kBlock + h * V::kLanes);
    if (CHAINS == 2) acc[b][CHAINS - 1][r][h] = V::zero();
  }
  const T* v = blocks.values + w0 * S::kFields * kBlock;
  const float* xs = x + w0 * (S::kFields / N) * M;
  const uint32_t* word = blocks.index + w0 * kBlock;
  const char* ahead = reinterpret_cast<const char*>(v) + fetch.values;
  for (int64_t w = w0; w < w1; w++, word += kBlock) {
    typename V::Ints even[STREAMS][H], odd[STREAMS][H];
    NMFX_UNROLL for (int b = 0; b < STREAMS; b++) NMFX_UNROLL for (int h = 0; h < H; h++) {
      even[b][h] = V::load_index(word + b * blocks.index_step + h * V::kLanes);
      odd[b][h] = V::template shift<16>(even[b][h]);
    }
    if (fetch.index >= 0)
      NMFX_UNROLL for (int b = 0; b < STREAMS; b++) __builtin_prefetch(
          reinterpret_cast<const char*>(word + b * blocks.index_step) + fetch.index);
    int64_t left = (slots - w * S::kFields) / S::kSlots;
    int steps = left < S::kPerWord ? int(left) : S::kPerWord;
    for (int step = 0; step < steps; step++) {
      NMFX_UNROLL for (int pair = 0; pair < S::kSlots / 2; pair++) {
        const int g0 = 2 * pair / N, g1 = (2 * pair + 1) / N;
        NMFX_UNROLL for (int b = 0; b < STREAMS; b++) {
          const T* values = v + b * blocks.values_step;
          const char* line = ahead + b * blocks.values_step * int64_t(sizeof(T));
          __builtin_prefetch(line);
          if (fetch.step > 64) __builtin_prefetch(line + 64);
          NMFX_UNROLL for (int h = 0; h < H; h++) {
            typename V::F v0 = V::load_values(values + h * V::kLanes);
            typename V::F v1 = V::load_values(values + kBlock + h * V::kLanes);
            NMFX_UNROLL for (int r = 0; r < ROWS; r++) {
              auto window0 = V::template window<M>(xs + r * ldx + g0 * M);
              auto window1 = V::template window<M>(xs + r * ldx + g1 * M);
              typename V::F &even_sum = acc[b][0][r][h], &odd_sum = acc[b][CHAINS - 1][r][h];
              even_sum = V::fma(v0, V::template permute<M>(window0, even[b][h]), even_sum);
              odd_sum = V::fma(v1, V::template permute<M>(window1, odd[b][h]), odd_sum);
            }
            even[b][h] = V::template shift<S::kBits>(even[b][h]);
            odd[b][h] = V::template shift<S::kBits>(odd[b][h]);
          }
        }
        v += 2 * kBlock;
        ahead += fetch.step;
      }
      xs += S::kGroups * M;
    }
  }
  NMFX_UNROLL for (int b = 0; b < STREAMS; b++) NMFX_UNROLL for (int r = 0; r < ROWS; r++)
      NMFX_UNROLL for (int h = 0; h < H; h++) {
    typename V::F total = acc[b][0][r][h];
    if (CHAINS == 2) total = V::add(total, acc[b][CHAINS - 1][r][h]);
    V::store(sums + b * sums_step + r * kBlock + h * V::kLanes, total);
  }
}

// The slots after the last whole step: one group of a pattern with odd N.
template <int N, int M, class T>
inline void few_rest(const T* values, const uint32_t* index, int64_t slots, const float* x,
                     int64_t ldx, int64_t rows, float* sums) {
  using S = Steps<N, M>;
  for (int64_t s = slots / S::kSlots * S::kSlots; s < slots; s++) {
    const uint32_t* word = index + s / S::kFields * kBlock;
    int shift = field_shift(int(s % S::kFields), S::kBits);
    for (int lane = 0; lane < kBlock; lane++) {
      int64_t column = s / N * M + ((word[lane] >> shift) & ((1 << S::kBits) - 1));
      float value = V::one(values + s * kBlock + lane);
      for (int64_t r = 0; r < rows; r++) sums[r * kBlock + lane] += value * x[r * ldx + column];
    }
  }
}

template <int N, int M, int ROWS, int STREAMS, class T>
inline void few_rows(const Stream<T>& blocks, int64_t w0, int64_t w1, int64_t slots,
                     const float* x, int64_t ldx, int64_t rows, float* sums, int64_t sums_step,
                     const Fetch& fetch) {
  if constexpr (ROWS > 1)
    if (rows < ROWS)
      return few_rows<N, M, ROWS - 1, STREAMS, T>(blocks, w0, w1, slots, x, ldx, rows, sums,
                                                  sums_step, fetch);
  // All sums of a pass stay in registers: with many rows, half a block at a time.
  constexpr int H = ROWS <= V::kWholeRows ? V::kHalves : 1;
  for (int lane = 0; lane < kBlock; lane += H * V::kLanes) {
    Stream<T> lanes = {blocks.values + lane, blocks.index + lane, blocks.values_step,
                       blocks.index_step};
    few_words<N, M, ROWS, H, STREAMS, T>(lanes, w0, w1, slots, x, ldx, sums + lane, sums_step,
                                           fetch);
  }
}

// Floats from one row of activations to the next: it is zero for 64 columns past the last.
inline int64_t few_stride(const Call& c) { return c.weight.columns + 64; }

constexpr int kFewTile = 64;  // rows whose sums are kept beside a block

// Whether many rows pass over two blocks at once. With groups of 4 a pass has 8 rows of one block
// instead, see few_blocks.
template <int M>
constexpr bool kPairs = M > 4;

// Blocks b and, with STREAMS == 2, b + gap, for rows [p0, p1) in passes of R.
template <int N, int M, int R, int STREAMS, class T>
void few_streams(const Call& c, const float* x, int64_t ldx, int64_t p0, int64_t p1, int64_t b,
                 int64_t gap) {
  using S = Steps<N, M>;
  const Weight& w = c.weight;
  const int64_t values_step = w.slots * kBlock, index_step = w.words * kBlock;
  const Stream<T> blocks = {static_cast<const T*>(w.values) + b * values_step,
                            w.index + b * index_step, gap * values_step, gap * index_step};
  // About 8 KB of weights pass under all rows before the next 8 KB are read: of two blocks where
  // there are pairs, and as much of a block that is left over, so that it sums in the same order.
  constexpr int64_t word_bytes = (S::kFields * sizeof(T) + 4) * kBlock * (kPairs<M> ? 2 : 1);
  const int64_t run = p1 - p0 <= V::kWholeRows ? w.words : (8192 + word_bytes - 1) / word_bytes;
  constexpr int64_t pair = 2 * kBlock * sizeof(T);  // bytes of two slots
  constexpr int64_t sums_step = kFewTile * kBlock;
  float sums[STREAMS * sums_step];
  for (int64_t q0 = p0; q0 < p1; q0 += kFewTile) {
    const int64_t q1 = q0 + kFewTile < p1 ? q0 + kFewTile : p1;
    for (int i = 0; i < STREAMS; i++)
      memset(sums + i * sums_step, 0, sizeof(float) * size_t(q1 - q0) * kBlock);
    for (int64_t w0 = 0; w0 < w.words; w0 += run) {
      int64_t w1 = w0 + run < w.words ? w0 + run : w.words;
      for (int64_t q = q0; q < q1; q += R)
        few_rows<N, M, R, STREAMS, T>(
            blocks, w0, w1, w.slots, x + q * ldx, ldx, q1 - q, sums + (q - q0) * kBlock, sums_step,
            run == w.words ? Fetch::near(STREAMS == 2, pair)
                           : Fetch::part((q - q0) / R, (q1 - q0 + R - 1) / R,
                                         run * S::kFields * pair / 2, run * kBlock * 4, pair));
    }
    for (int i = 0; i < STREAMS; i++) {
      if (w.slots % S::kSlots)
        few_rest<N, M, T>(blocks.values + i * blocks.values_step,
                          blocks.index + i * blocks.index_step, w.slots, x + q0 * ldx, ldx,
                          q1 - q0, sums + i * sums_step);
      store_sums(c, sums + i * sums_step, q0, q1 - q0, b + i * gap);
    }
  }
}

// Two blocks far apart are two streams of memory, which are read faster than one, and share the
// windows of activations. Milliseconds, AMD EPYC (Zen 3), 4096 x 4096 from memory, one thread,
// least of 3, the machine busy with tests; one block at a time, prefetched 4 KB ahead where it was
// faster so, against two: fp32 2:4 2.2 / 1.6 at 1 row, 2.6 / 1.7 at 4, no gain at 8; 2:8 2.1 / 1.3
// at 4, 3.4 / 2.8 at 8; bf16 2:4 1.0 / 0.8 at 1, 2.0 / 1.9 at 4.
template <int N, int M, class T>
void few_blocks(const Call& c, const void* input, int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
  const float* x = static_cast<const float*>(input);
  const int64_t ldx = few_stride(c);
  const bool whole = p1 - p0 <= V::kWholeRows;
  const int64_t half = (b1 - b0) / 2;
  constexpr int R = M == 4 ? V::kRows : V::kWholeRows;  // where permuting costs more than loading
  int64_t b = b0;
  if (kPairs<M> || whole)
    for (; b < b0 + half; b++)
      few_streams<N, M, V::kWholeRows, 2, T>(c, x, ldx, p0, p1, b, half);
  for (b += b - b0; b < b1; b++) few_streams<N, M, R, 1, T>(c, x, ldx, p0, p1, b, 0);
}

using FewKernel = void (*)(const Call&, const void*, int64_t, int64_t, int64_t, int64_t);

template <class T>
FewKernel few_of(int n, int m) {
  switch (n * 100 + m) {
    case 204: return few_blocks<2, 4, T>;
    case 104: return few_blocks<1, 4, T>;
    case 408: return few_blocks<4, 8, T>;
    case 208: return few_blocks<2, 8, T>;
    case 108: return few_blocks<1, 8, T>;
    case 116: return few_blocks<1, 16, T>;
    case 216: return few_blocks<2, 16, T>;
    case 416: return few_blocks<4, 16, T>;
    case 816: return few_blocks<8, 16, T>;
    default: return nullptr;
  }
}

FewKernel few_kernel(int n, int m, DType dtype) {
  if (dtype == DType::f16) return nullptr;
  return dtype == DType::f32 ? few_of<float>(n, m) : few_of<uint16_t>(n, m);
}

bool has_few(int n, int m, DType dtype) { return few_kernel(n, m, dtype) != nullptr; }

void few(const Call& c, const void* x, int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
  few_kernel(c.weight.n, c.weight.m, c.weight.dtype)(c, x, p0, p1, b0, b1);
}

void few_input(const Call& c, void* x, int64_t p0, int64_t p1) {
  const int64_t ldx = few_stride(c);
  float* rows = static_cast<float*>(x);
  for (int64_t p = p0; p < p1; p++) {
    to_floats(c.input.data, p * c.input.row_stride, c.weight.columns, c.input.dtype,
              rows + p * ldx);
    memset(rows + p * ldx + c.weight.columns, 0, size_t(ldx - c.weight.columns) * 4);
  }
}

}  // namespace
}  // namespace nmfx
