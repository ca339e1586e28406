// AVX-512 without a bf16 dot product: bf16 weights are widened to floats.
#include "isa_avx512.h"
#include "panel.h"
#include "windows.h"

namespace nmfx {
namespace {

// Products of single slots, of type VALUE, with floats.
template <class VALUE>
struct Floats {
  using Value = VALUE;
  using Element = float;
  using Values = __m512;
  static constexpr int kWidth = 16, kUnit = 1, kLine = 4 / sizeof(VALUE);

  static Values values(const VALUE* p) { return V::load_values(p); }
  template <int N, int M>
  static __m512i index(__m512i word, int slot, int in_window) {
    const __m512i field = _mm512_srli_epi32(word, unsigned(field_shift(slot, field_bits(M))));
    if (M == kWidth) return field;  // the permutation reads the lowest 4 bits
    constexpr int kAndOr = 0xea;  // (field & last) | start of the group
    return _mm512_ternarylogic_epi32(field, _mm512_set1_epi32(M - 1),
                                     _mm512_set1_epi32(in_window / N * M), kAndOr);
  }
  template <int W>
  static __m512 window(const float* x) {
    static_assert(W == kWidth, "every word has as many columns");
    return _mm512_loadu_ps(x);
  }
  static __m512 fma(Values values, __m512 window, __m512i index, __m512 sum) {
    return _mm512_fmadd_ps(values, _mm512_permutexvar_ps(index, window), sum);
  }
  static __m512 fma_last(const VALUE* p, __m512 window, __m512i index, __m512 sum) {
    return fma(values(p), window, index, sum);
  }
  // W columns of which `left` are there, the others zero.
  template <int W>
  static void copy(const Input& in, int64_t from, int64_t left, float* out) {
    const __mmask16 there = V::first_lanes(left);
    if (in.dtype == DType::f32) {
      const float* row = static_cast<const float*>(in.data) + from;
      _mm512_storeu_ps(out, _mm512_maskz_loadu_ps(there, row));
    } else {
      const uint16_t* row = static_cast<const uint16_t*>(in.data) + from;
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row));
      _mm512_storeu_si512(static_cast<void*>(out), _mm512_slli_epi32(wide, 16));
    }
  }
};

WindowKernel kernel(int n, int m, DType dtype) {
  if (dtype == DType::f16) return {nullptr, nullptr};
  return dtype == DType::f32 ? window_kernel<Floats<float>>(n, m)
                             : window_kernel<Floats<uint16_t>>(n, m);
}
template <const Budget& BUDGET>
void few(const Call& c, const void* x, int64_t u0, int64_t u1, int64_t b0, int64_t b1) {
  kernel(c.weight.n, c.weight.m, c.weight.dtype).run(c, BUDGET, x, u0, u1, b0, b1);
}
void few_input(const Call& c, void* x, int64_t u0, int64_t u1) {
  kernel(c.weight.n, c.weight.m, c.weight.dtype).prepare(c, x, u0, u1);
}

// Crossings, 4096 x 4096 from memory, one thread, few / panel in ms.
//
// Intel Xeon, fp32: 2:4 at 40 rows 7.2 / 8.0, at 48 rows 8.2 / 7.2; 1:4 at 24 rows 2.3 / 2.8, at 32
// rows 2.85 / 2.78, at 40 rows 3.5 / 3.7; 1:16 at 32 rows .83 / .82, at 40 rows 1.05 / 1.31. Of 48
// KB and more, an earlier form of the kernel.
//
// AMD EPYC (Zen 5): none. 2:4 at 128 rows 13.3 / 14.0, 1:4 7.2 / 7.8, 1:16 2.4 / 2.8. No Zen 4 that
// shows its AVX-512 was at hand.
constexpr int kAny = 1 << 30;
constexpr Isa with(decltype(Isa::few) few, int panel_from) {
  return avx512_table("avx512", kWindowTile, panel_from, panel_from, passes_of, few, few_input);
}

}  // namespace

bool has_few_avx512(int n, int m, DType dtype) { return kernel(n, m, dtype).run != nullptr; }
void panel_avx512(const Call& c, const Tile& tile, int64_t group, int64_t p0, int64_t count,
                  int64_t b0, int64_t b1, float* scratch) {
  panel(c, tile, group, p0, count, b0, b1, scratch);
}
int64_t panel_avx512_scratch(const Call& c, const Tile& tile, int64_t blocks) {
  return panel_scratch(c, tile, blocks);
}

const Isa isa_avx512 = with(few<kIntel>, 41);
const Isa isa_avx512_amd = with(few<kAmd>, kAny);

}  // namespace nmfx
