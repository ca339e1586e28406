// AVX-512 with the bf16 dot product, for bf16 weights and few rows; the rest is as in AVX-512.
// Intel CPUs do it for two rows at most: a permutation and a dot product take them 3.1 cycles, and
// two permutations and multiply-adds of floats 2.2 (Xeon with AMX). Zen 5 does two permutations, or
// two dot products, in a cycle.
//
// A lane of 32 bits is two consecutive kept values of one output row, and one 16-bit permutation
// finds both activations in a window of 32 columns:
//
//   values   slot 2j   a0 a1 .. a15       interleaved   a0 b0 a1 b1 .. a15 b15
//            slot 2j+1 b0 b1 .. b15
//   index    low half of a lane: field 2j, high half: field 2j+1
//   sums[lane] += a * permute(window)[2 lane] + b * permute(window)[2 lane + 1]
//
// With an odd N the two are of different groups.
#include "isa_avx512.h"
#include "windows.h"

namespace nmfx {
namespace {

struct Dot {
  using Value = uint16_t;
  using Element = uint16_t;
  using Values = __m512i;
  static constexpr int kWidth = 32, kUnit = 2, kLine = 2;

  static Values values(const uint16_t* p) {
    alignas(64) static constexpr uint16_t kOrder[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder),
                                    _mm512_loadu_si512(static_cast<const void*>(p)));
  }
  template <int N, int M>
  static __m512i index(__m512i word, int slot, int in_window) {
    const __m512i fields = _mm512_srli_epi32(word, unsigned(field_bits(M) * slot / 2));
    const int first = in_window / N * M, second = (in_window + 1) / N * M;
    constexpr int kAndOr = 0xea;  // (field & last) | start of the group
    return _mm512_ternarylogic_epi32(fields, _mm512_set1_epi32((M - 1) << 16 | (M - 1)),
                                     _mm512_set1_epi32(second << 16 | first), kAndOr);
  }
  template <int W>
  static __m512i window(const uint16_t* x) {
    if constexpr (W == 32) return _mm512_loadu_si512(static_cast<const void*>(x));
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static __m512 fma(Values values, __m512i window, __m512i index, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)values,
                            (__m512bh)_mm512_permutexvar_epi16(index, window));
  }
  // A slot without another, whose column would lie behind the last, where activations are zero.
  static __m512 fma_last(const uint16_t* p, __m512i window, __m512i index, __m512 sum) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return fma(_mm512_cvtepu16_epi32(half), window, index, sum);
  }
  // W columns of which `left` are there, the others zero.
  template <int W>
  static void copy(const Input& in, int64_t from, int64_t left, uint16_t* out) {
    const uint16_t* row = static_cast<const uint16_t*>(in.data) + from;
    const __mmask32 there = left >= W ? ~__mmask32(0) : left <= 0 ? 0 : (__mmask32(1) << left) - 1;
    if constexpr (W == 32)
      _mm512_storeu_si512(static_cast<void*>(out), _mm512_maskz_loadu_epi16(there, row));
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                          _mm256_maskz_loadu_epi16(__mmask16(there), row));
  }
};

template <int MOST>
bool takes_dot(const Call& c) {
  return c.weight.dtype == DType::bf16 && c.input.positions <= MOST;
}
template <int MOST, const Budget& BUDGET, const Isa& FLOATS>
void few(const Call& c, const void* x, int64_t u0, int64_t u1, int64_t b0, int64_t b1) {
  if (!takes_dot<MOST>(c)) return FLOATS.few(c, x, u0, u1, b0, b1);
  window_kernel<Dot>(c.weight.n, c.weight.m).run(c, BUDGET, x, u0, u1, b0, b1);
}
template <int MOST>
void few_input(const Call& c, void* x, int64_t u0, int64_t u1) {
  if (!takes_dot<MOST>(c)) return isa_avx512.few_input(c, x, u0, u1);
  window_kernel<Dot>(c.weight.n, c.weight.m).prepare(c, x, u0, u1);
}

template <int MOST, const Budget& BUDGET, const Isa& FLOATS>
constexpr Isa with(int panel_from) {
  return avx512_table("avx512_bf16", kWindowTile, panel_from, panel_from, passes_of,
                      few<MOST, BUDGET, FLOATS>, few_input<MOST>);
}

}  // namespace

// Crossings: see isa_avx512.cpp. Where every number of rows has the dot kernel, that does two
// multiply-adds where the panel kernel does one.
constexpr int kAny = 1 << 30;
const Isa isa_avx512_bf16 = with<2, kIntel, isa_avx512>(41);
const Isa isa_avx512_bf16_amd = with<kAny, kAmd, isa_avx512_amd>(kAny);

}  // namespace nmfx
