// The few-rows kernel: lane = output row, so a kept weight finds its activation by a permutation
// of its group, and nothing is summed across lanes.
//
//   index word  | field 15 .. 3 1 | field 14 .. 2 0 |   one word per lane, 2:4: 16 fields
//   slot s      values[s][lane] * permute(x[group], field s of lane), added to the row's sums
//
// Weights stream once: each block of 16 output rows is cut into runs of words that stay in the
// first-level cache while all activation rows pass over them.
//
// Included by one file per instruction set, which defines the struct V:
//   F, Ints          a vector of kLanes floats, of kLanes 32-bit integers
//   kHalves          vectors per block of 16
//   kRows            rows of activations in one pass; up to kWholeRows of them take whole blocks
//   load/store/zero/fma, load_values(const T*), load_index, shift<..>
//   Window<M>, window<M>(x), permute<M>(window, fields)
#pragma once
#include "epilogue.h"

namespace nmfx {
namespace {

#define NMFX_UNROLL _Pragma("GCC unroll 16")

template <int N, int M>
struct Steps {  // a step is the least number of groups with an even number of slots
  static constexpr int kBits = field_bits(M), kFields = fields_per_word(M);
  static constexpr int kGroups = N % 2 ? 2 : 1, kSlots = kGroups * N;
  static constexpr int kPerWord = kFields / kSlots;
  static_assert(kPerWord * kSlots == kFields, "a word holds whole steps");
};

// Adds words [w0, w1) of H vectors of lanes of a block to sums[ROWS][16]; `slots` ends the last
// word. The pointers start at the first of the lanes.
template <int N, int M, int ROWS, int H, class T>
inline __attribute__((always_inline)) void few_words(
    const T* values, const uint32_t* index, int64_t w0, int64_t w1, int64_t slots, const float* x,
    int64_t ldx, float* sums) {
  using S = Steps<N, M>;
  // With one row a single chain of additions per half would wait for itself.
  constexpr int CHAINS = ROWS * H <= 4 ? 2 : 1;
  typename V::F acc[CHAINS][ROWS][H];
  NMFX_UNROLL for (int r = 0; r < ROWS; r++) NMFX_UNROLL for (int h = 0; h < H; h++) {
    acc[0][r][h] = V::load(sums + r * kBlock + h * V::kLanes);
    if (CHAINS == 2) acc[CHAINS - 1][r][h] = V::zero();
  }
  const T* v = values + w0 * S::kFields * kBlock;
  const float* xs = x + w0 * (S::kFields / N) * M;
  const uint32_t* word = index + w0 * kBlock;
  for (int64_t w = w0; w < w1; w++, word += kBlock) {
    typename V::Ints even[H], odd[H];
    NMFX_UNROLL for (int h = 0; h < H; h++) {
      even[h] = V::load_index(word + h * V::kLanes);
      odd[h] = V::template shift<16>(even[h]);
    }
    __builtin_prefetch(word + 256);
    int64_t left = (slots - w * S::kFields) / S::kSlots;
    int steps = left < S::kPerWord ? int(left) : S::kPerWord;
    for (int step = 0; step < steps; step++) {
      NMFX_UNROLL for (int pair = 0; pair < S::kSlots / 2; pair++) {
        __builtin_prefetch(reinterpret_cast<const char*>(v) + 4096);
        if (sizeof(T) == 4) __builtin_prefetch(reinterpret_cast<const char*>(v) + 4096 + 64);
        const int g0 = 2 * pair / N, g1 = (2 * pair + 1) / N;
        NMFX_UNROLL for (int h = 0; h < H; h++) {
          typename V::F v0 = V::load_values(v + h * V::kLanes);
          typename V::F v1 = V::load_values(v + kBlock + h * V::kLanes);
          NMFX_UNROLL for (int r = 0; r < ROWS; r++) {
            auto window0 = V::template window<M>(xs + r * ldx + g0 * M);
            auto window1 = V::template window<M>(xs + r * ldx + g1 * M);
            acc[0][r][h] = V::fma(v0, V::template permute<M>(window0, even[h]), acc[0][r][h]);
            acc[CHAINS - 1][r][h] =
                V::fma(v1, V::template permute<M>(window1, odd[h]), acc[CHAINS - 1][r][h]);
          }
          even[h] = V::template shift<S::kBits>(even[h]);
          odd[h] = V::template shift<S::kBits>(odd[h]);
        }
        v += 2 * kBlock;
      }
      xs += S::kGroups * M;
    }
  }
  NMFX_UNROLL for (int r = 0; r < ROWS; r++) NMFX_UNROLL for (int h = 0; h < H; h++) {
    typename V::F total = acc[0][r][h];
    if (CHAINS == 2) total = V::add(total, acc[CHAINS - 1][r][h]);
    V::store(sums + r * kBlock + h * V::kLanes, total);
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

template <int N, int M, int ROWS, class T>
inline void few_rows(const T* values, const uint32_t* index, int64_t w0, int64_t w1, int64_t slots,
                     const float* x, int64_t ldx, int64_t rows, float* sums) {
  if constexpr (ROWS > 1)
    if (rows < ROWS)
      return few_rows<N, M, ROWS - 1, T>(values, index, w0, w1, slots, x, ldx, rows, sums);
  // All sums of a pass stay in registers: with many rows, half a block at a time.
  constexpr int H = ROWS <= V::kWholeRows ? V::kHalves : 1;
  for (int lane = 0; lane < kBlock; lane += H * V::kLanes)
    few_words<N, M, ROWS, H, T>(values + lane, index + lane, w0, w1, slots, x, ldx, sums + lane);
}

inline void few_store(const Call& c, float* sums, int64_t p0, int64_t rows, int64_t block) {
  const Weight& w = c.weight;
  int64_t o = block * kBlock;
  int64_t lanes = w.out - o < kBlock ? w.out - o : kBlock;
  for (int64_t r = 0; r < rows; r++) {
    float* sum = sums + r * kBlock;
    if (w.bias) {
      float bias[kBlock];
      to_floats(w.bias, o, lanes, w.dtype, bias);
      for (int64_t lane = 0; lane < lanes; lane++) sum[lane] += bias[lane];
    }
    activate(sum, kBlock, c.output.activation);
    from_floats(sum, lanes, w.dtype, c.output.data, (p0 + r) * c.output.step_position + o);
  }
}

constexpr int kFewTile = 64;  // rows whose sums are kept beside a block

template <int N, int M, class T>
void few_blocks(const Call& c, const void* input, int64_t ldx, int64_t p0, int64_t p1, int64_t b0,
                int64_t b1) {
  using S = Steps<N, M>;
  constexpr int R = V::kRows;
  const Weight& w = c.weight;
  const float* x = static_cast<const float*>(input);
  // About 8 KB of weights pass under all rows before the next 8 KB are read.
  constexpr int64_t word_bytes = (S::kFields * sizeof(T) + 4) * kBlock;
  const int64_t run = p1 - p0 <= V::kWholeRows ? w.words : (8192 + word_bytes - 1) / word_bytes;
  float sums[kFewTile * kBlock];
  for (int64_t b = b0; b < b1; b++) {
    const T* values = static_cast<const T*>(w.values) + b * w.slots * kBlock;
    const uint32_t* index = w.index + b * w.words * kBlock;
    for (int64_t q0 = p0; q0 < p1; q0 += kFewTile) {
      const int64_t q1 = q0 + kFewTile < p1 ? q0 + kFewTile : p1;
      memset(sums, 0, sizeof(float) * size_t(q1 - q0) * kBlock);
      for (int64_t w0 = 0; w0 < w.words; w0 += run) {
        int64_t w1 = w0 + run < w.words ? w0 + run : w.words;
        for (int64_t q = q0; q < q1; q += R)
          few_rows<N, M, R, T>(values, index, w0, w1, w.slots, x + q * ldx, ldx, q1 - q,
                               sums + (q - q0) * kBlock);
      }
      if (w.slots % S::kSlots)
        few_rest<N, M, T>(values, index, w.slots, x + q0 * ldx, ldx, q1 - q0, sums);
      few_store(c, sums, q0, q1 - q0, b);
    }
  }
}

using FewKernel = void (*)(const Call&, const void*, int64_t, int64_t, int64_t, int64_t, int64_t);

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

void few(const Call& c, const void* x, int64_t ldx, int64_t p0, int64_t p1, int64_t b0,
         int64_t b1) {
  few_kernel(c.weight.n, c.weight.m, c.weight.dtype)(c, x, ldx, p0, p1, b0, b1);
}

void few_input(const Call& c, void* x, int64_t ldx, int64_t p0, int64_t p1) {
  float* rows = static_cast<float*>(x);
  for (int64_t p = p0; p < p1; p++) {
    to_floats(c.input.data, p * c.input.row_stride, c.weight.columns, c.input.dtype,
              rows + p * ldx);
    memset(rows + p * ldx + c.weight.columns, 0, size_t(ldx - c.weight.columns) * 4);
  }
}

}  // namespace
}  // namespace nmfx
