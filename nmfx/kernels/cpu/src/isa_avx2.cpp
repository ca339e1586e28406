// AVX2 with FMA and F16C: eight lanes, two vectors per block.
#include "transpose_avx.h"

namespace nmfx {
namespace {

template <int M>
struct Window256 {
  __m256 part[(M + 7) / 8];
};

struct V {
  using F = __m256;
  using Ints = __m256i;
  static constexpr int kLanes = 8, kHalves = 2, kRows = 8, kWholeRows = 4;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F zero() { return _mm256_setzero_ps(); }
  static F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  static F load_values(const float* p) { return _mm256_loadu_ps(p); }
  static F load_values(const uint16_t* p) { return load8(p, 0, DType::bf16); }
  static float one(const float* p) { return *p; }
  static float one(const uint16_t* p) { return from_bf16(*p); }

  static Ints load_index(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  template <int BITS>
  static Ints shift(Ints v) {
    return _mm256_srli_epi32(v, BITS);
  }

  template <int M>
  static Window256<M> window(const float* x) {
    Window256<M> w;
    if constexpr (M == 4)
      w.part[0] = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
    else
      for (int i = 0; i < M / 8; i++) w.part[i] = _mm256_loadu_ps(x + 8 * i);
    return w;
  }
  // The bits above a field are the next fields': each form reads only the bits it needs.
  template <int M>
  static F permute(const Window256<M>& w, Ints field) {
    if constexpr (M == 4) return _mm256_permutevar_ps(w.part[0], field);
    F low = _mm256_permutevar8x32_ps(w.part[0], field);
    if constexpr (M == 8) return low;
    F high = _mm256_permutevar8x32_ps(w.part[(M + 7) / 8 - 1], field);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(field, 28)));
  }

  // out[lane] = start + ((index[lane] >> shift) & mask) * step
  static void offsets(const uint32_t* index, int shift, uint32_t mask, int32_t step, int32_t start,
                      int32_t* out) {
    for (int lane = 0; lane < kBlock; lane += kLanes) {
      Ints field = _mm256_srl_epi32(load_index(index + lane), _mm_cvtsi32_si128(shift));
      field = _mm256_and_si256(field, _mm256_set1_epi32(int(mask)));
      Ints offset = _mm256_mullo_epi32(field, _mm256_set1_epi32(step));
      offset = _mm256_add_epi32(offset, _mm256_set1_epi32(start));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + lane), offset);
    }
  }

  static void transpose_rows(const void* const* rows, DType dtype, int64_t count, int64_t c0,
                             int64_t c1, float* out, int64_t ld) {
    transpose_rows_avx(rows, dtype, count, c0, c1, out, ld);
  }
  static void transpose_block(const float* sums, int64_t ld, float* out) {
    transpose_block_avx(sums, ld, out);
  }
};

}  // namespace
}  // namespace nmfx

#include "few.h"
#include "panel.h"

namespace nmfx {

// Where the kernels cross: AMD EPYC (Zen 3), 2048 x 2048 from memory, one thread, least of 7
// alternating runs on a machine that was busy with tests:
// few / panel in ms at 16 rows 2:4 1.70 / 2.68, at 64 rows 6.6 / 5.5; 2:8 at 8 rows 0.97 / 1.48, at
// 16 rows 2.05 / 1.64; 1:16 at 4 rows 0.22 / 0.29, at 8 rows 0.40 / 0.29.
const Isa isa_avx2 = {"avx2",  V::kLanes, 8,         V::kRows, false, {{32, 13, 6}, {32, 11, 5}},
                      has_few, few,       few_input, panel,    panel_scratch};

}  // namespace nmfx
