// AVX-512 with the bf16 dot product, for bf16 weights and few rows; the rest is as in AVX-512.
//
// A lane of 32 bits is two consecutive kept values of one output row, and one 16-bit permutation
// finds both activations:
//
//   values   slot 2j   a0 a1 .. a15       interleaved   a0 b0 a1 b1 .. a15 b15
//            slot 2j+1 b0 b1 .. b15
//   index    low half of a lane: field 2j, high half: field 2j+1
//   sums[lane] += a * permute(x)[2 lane] + b * permute(x)[2 lane + 1]
//
// With an odd N the pair spans two groups: the window is 2M wide and the high half adds M.
#include "masks.h"
#include "isa_avx512.h"

namespace nmfx {
namespace {

template <int WIDTH>
inline __m512i window_bf16(const uint16_t* x) {
  if constexpr (WIDTH == 4) {
    int64_t four;
    memcpy(&four, x, 8);
    return _mm512_set1_epi64(four);
  }
  if constexpr (WIDTH == 8)
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  if constexpr (WIDTH == 16)
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_loadu_si512(reinterpret_cast<const void*>(x));
}

inline __m512i interleave_order() {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  return _mm512_load_si512(order);
}

template <int N, int M, int ROWS>
inline __attribute__((always_inline)) void dot_words(
    const uint16_t* values, const uint32_t* index, int64_t w0, int64_t w1, int64_t slots,
    const uint16_t* x, int64_t ldx, float* sums) {
  using S = Steps<N, M>;
  constexpr int WIDTH = S::kGroups * M;
  const __m512i order = interleave_order();
  const __m512i keep = _mm512_set1_epi32((M - 1) << 16 | (M - 1));
  const __m512i second = _mm512_set1_epi32(M << 16);
  constexpr int CHAINS = ROWS <= 4 ? 2 : 1;
  __m512 acc[CHAINS][ROWS];
  NMFX_UNROLL for (int r = 0; r < ROWS; r++) {
    acc[0][r] = _mm512_loadu_ps(sums + r * kBlock);
    if (CHAINS == 2) acc[CHAINS - 1][r] = _mm512_setzero_ps();
  }
  const uint16_t* v = values + w0 * S::kFields * kBlock;
  const uint16_t* xs = x + w0 * (S::kFields / N) * M;
  const uint32_t* word = index + w0 * kBlock;
  for (int64_t w = w0; w < w1; w++, word += kBlock) {
    __m512i fields = V::load_index(word);
    __builtin_prefetch(word + 256);
    int64_t left = (slots - w * S::kFields) / S::kSlots;
    int steps = left < S::kPerWord ? int(left) : S::kPerWord;
    for (int step = 0; step < steps; step++) {
      NMFX_UNROLL for (int pair = 0; pair < S::kSlots / 2; pair++) {
        __builtin_prefetch(reinterpret_cast<const char*>(v) + 4096);
        __m512i weights = _mm512_permutexvar_epi16(
            order, _mm512_loadu_si512(reinterpret_cast<const void*>(v)));
        __m512i which = fields;
        if constexpr (N % 2) which = _mm512_or_si512(_mm512_and_si512(fields, keep), second);
        NMFX_UNROLL for (int r = 0; r < ROWS; r++) {
          __m512i found = _mm512_permutexvar_epi16(which, window_bf16<WIDTH>(xs + r * ldx));
          acc[pair % CHAINS][r] =
              _mm512_dpbf16_ps(acc[pair % CHAINS][r], (__m512bh)weights, (__m512bh)found);
        }
        fields = _mm512_srli_epi32(fields, S::kBits);
        v += 2 * kBlock;
      }
      xs += WIDTH;
    }
  }
  NMFX_UNROLL for (int r = 0; r < ROWS; r++) {
    __m512 total = acc[0][r];
    if (CHAINS == 2) total = _mm512_add_ps(total, acc[CHAINS - 1][r]);
    _mm512_storeu_ps(sums + r * kBlock, total);
  }
}

template <int N, int M>
void dot_rest(const uint16_t* values, const uint32_t* index, int64_t slots, const uint16_t* x,
              int64_t ldx, int64_t rows, float* sums) {
  using S = Steps<N, M>;
  for (int64_t s = slots / S::kSlots * S::kSlots; s < slots; s++) {
    const uint32_t* word = index + s / S::kFields * kBlock;
    int shift = field_shift(int(s % S::kFields), S::kBits);
    for (int lane = 0; lane < kBlock; lane++) {
      int64_t column = s / N * M + ((word[lane] >> shift) & ((1 << S::kBits) - 1));
      float value = from_bf16(values[s * kBlock + lane]);
      for (int64_t r = 0; r < rows; r++)
        sums[r * kBlock + lane] += value * from_bf16(x[r * ldx + column]);
    }
  }
}

template <int N, int M, int ROWS>
inline void dot_rows(const uint16_t* values, const uint32_t* index, int64_t w0, int64_t w1,
                     int64_t slots, const uint16_t* x, int64_t ldx, int64_t rows, float* sums) {
  if constexpr (ROWS > 1)
    if (rows < ROWS)
      return dot_rows<N, M, ROWS - 1>(values, index, w0, w1, slots, x, ldx, rows, sums);
  dot_words<N, M, ROWS>(values, index, w0, w1, slots, x, ldx, sums);
}

// As few_blocks in few.h, on bf16 activations.
template <int N, int M>
void dot_blocks(const Call& c, const void* input, int64_t ldx, int64_t p0, int64_t p1, int64_t b0,
                int64_t b1) {
  using S = Steps<N, M>;
  constexpr int R = V::kRows;
  const Weight& w = c.weight;
  const uint16_t* x = static_cast<const uint16_t*>(input);
  constexpr int64_t word_bytes = (S::kFields * 2 + 4) * kBlock;
  const int64_t run = p1 - p0 <= R ? w.words : (8192 + word_bytes - 1) / word_bytes;
  float sums[kFewTile * kBlock];
  for (int64_t b = b0; b < b1; b++) {
    const uint16_t* values = static_cast<const uint16_t*>(w.values) + b * w.slots * kBlock;
    const uint32_t* index = w.index + b * w.words * kBlock;
    for (int64_t q0 = p0; q0 < p1; q0 += kFewTile) {
      const int64_t q1 = q0 + kFewTile < p1 ? q0 + kFewTile : p1;
      memset(sums, 0, sizeof(float) * size_t(q1 - q0) * kBlock);
      for (int64_t w0 = 0; w0 < w.words; w0 += run) {
        int64_t w1 = w0 + run < w.words ? w0 + run : w.words;
        for (int64_t q = q0; q < q1; q += R)
          dot_rows<N, M, R>(values, index, w0, w1, w.slots, x + q * ldx, ldx, q1 - q,
                            sums + (q - q0) * kBlock);
      }
      if (w.slots % S::kSlots)
        dot_rest<N, M>(values, index, w.slots, x + q0 * ldx, ldx, q1 - q0, sums);
      few_store(c, sums, q0, q1 - q0, b);
    }
  }
}

FewKernel dot_kernel(int n, int m) {
  switch (n * 100 + m) {
    case 204: return dot_blocks<2, 4>;
    case 104: return dot_blocks<1, 4>;
    case 408: return dot_blocks<4, 8>;
    case 208: return dot_blocks<2, 8>;
    case 108: return dot_blocks<1, 8>;
    case 116: return dot_blocks<1, 16>;
    case 216: return dot_blocks<2, 16>;
    case 416: return dot_blocks<4, 16>;
    case 816: return dot_blocks<8, 16>;
    default: return nullptr;
  }
}

void few_or_dot(const Call& c, const void* x, int64_t ldx, int64_t p0, int64_t p1, int64_t b0,
                int64_t b1) {
  if (c.weight.dtype == DType::bf16)
    dot_kernel(c.weight.n, c.weight.m)(c, x, ldx, p0, p1, b0, b1);
  else
    few(c, x, ldx, p0, p1, b0, b1);
}

void input_for_dot(const Call& c, void* x, int64_t ldx, int64_t p0, int64_t p1) {
  if (c.weight.dtype != DType::bf16) return few_input(c, x, ldx, p0, p1);
  uint16_t* rows = static_cast<uint16_t*>(x);
  const int64_t columns = c.weight.columns;
  for (int64_t p = p0; p < p1; p++) {
    memcpy(rows + p * ldx, static_cast<const uint16_t*>(c.input.data) + p * c.input.row_stride,
           size_t(columns) * 2);
    memset(rows + p * ldx + columns, 0, size_t(ldx - columns) * 2);
  }
}

}  // namespace

// bf16: every number of rows has its dot kernel, which does two multiply-adds where the panel
// kernel does one. On the Xeon of isa_avx512.cpp that is slower than widening from 16 rows on (2:4
// 3.9 against 2.8 ms), but it has tiles (isa_amx_bf16.cpp); CPUs without tiles were not at hand.
const Isa isa_avx512_bf16 = {"avx512_bf16",
                             V::kLanes,
                             8,
                             V::kRows,
                             kFewTile,
                             true,
                             {{33, 33, 33}, {1 << 30, 1 << 30, 1 << 30}},
                             has_few,
                             few_or_dot,
                             input_for_dot,
                             panel,
                             panel_scratch, &masks_avx512};

}  // namespace nmfx
