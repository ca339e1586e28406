// AVX2 with FMA and F16C: eight lanes, two vectors per block.
#include "masks.h"
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
  static constexpr int kLanes = 8, kRegisters = 16, kHalves = 2, kRows = 8, kWholeRows = 4;
  // AMD EPYC (Zen 4), 4096 x 4096, 1 row, ms, against 1024 and -1: 2:4 1.98 / 1.65, 1:4 1.11 / 0.99,
  // 2:8 1.10 / 0.93, 1:16 0.28 / 0.25.
  static constexpr int64_t kAhead = 2048, kIndexAhead = 512;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F zero() { return _mm256_setzero_ps(); }
  static F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  // LANES values, each in all lanes. In registers: a load of four of them and four permutations
  // leave the ports for loads to the panel.
  template <int LANES>
  struct Spread {
    F value[LANES];
    explicit Spread(const float* p) {
      if constexpr (LANES == 1) value[0] = broadcast(p);
      if constexpr (LANES == 2) {
        const F two = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)));
        value[0] = _mm256_moveldup_ps(two);
        value[1] = _mm256_movehdup_ps(two);
      }
      if constexpr (LANES >= 4)
        for (int l = 0; l < LANES; l += 4) {
          const F four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p + l));
          value[l] = _mm256_permute_ps(four, 0x00);
          value[l + 1] = _mm256_permute_ps(four, 0x55);
          value[l + 2] = _mm256_permute_ps(four, 0xaa);
          value[l + 3] = _mm256_permute_ps(four, 0xff);
        }
    }
    F at(int l) const { return value[l]; }
  };
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

  // out[lane] = start + ((index[lane] >> shift) & (2^BITS - 1)) * STEP
  template <int BITS, int STEP>
  static void offsets(const uint32_t* index, int shift, int32_t start, int32_t* out) {
    constexpr int kMask = (1 << BITS) - 1;
    const Ints words = load_index(index);
    Ints offset;
    if constexpr ((STEP & (STEP - 1)) == 0) {
      constexpr int kLog = __builtin_ctz(STEP);
      offset = shift < kLog ? _mm256_slli_epi32(words, kLog - shift)
                            : _mm256_srli_epi32(words, shift - kLog);
      offset = _mm256_and_si256(offset, _mm256_set1_epi32(kMask << kLog));
    } else {
      offset = _mm256_and_si256(_mm256_srli_epi32(words, shift), _mm256_set1_epi32(kMask));
      offset = _mm256_mullo_epi32(offset, _mm256_set1_epi32(STEP));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_add_epi32(offset, _mm256_set1_epi32(start)));
  }

  static void transpose_rows(const void* const* rows, DType dtype, int64_t count, int64_t c0,
                             int64_t c1, float* out, int64_t ld) {
    transpose_rows_avx(rows, dtype, count, c0, c1, out, ld);
  }
  static void transpose_block(const float* sums, int64_t ld, float* out) {
    transpose_block_avx(sums, ld, out);
  }

  // out[i] = in[i] for i in [0, count); writes whole vectors, reads no more than that.
  static void copy(const float* in, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
    if (i < count) store(out + i, _mm256_maskload_ps(in + i, first_lanes(count - i)));
  }
  // The same with out[i] = in[2 i].
  static void copy_every_second(const float* in, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = 2 * (count - i) - 1;
      const F low = _mm256_maskload_ps(in + 2 * i, first_lanes(left));
      const F high = _mm256_maskload_ps(in + 2 * i + kLanes, first_lanes(left - kLanes));
      const __m256d halves = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
      store(out + i, _mm256_castpd_ps(_mm256_permute4x64_pd(halves, 0xd8)));
    }
  }
  using Lanes = Ints;
  static Lanes lanes_of(uint32_t bits) {
    const Ints each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), each), each);
  }
  static F load_lanes(const float* p, Lanes lanes) { return _mm256_maskload_ps(p, lanes); }
  static Ints first_lanes(int64_t count) {
    const int lanes = count > kLanes ? kLanes : int(count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

}  // namespace
}  // namespace nmfx

#include "few.h"
#include "panel.h"

namespace nmfx {

// Where the kernels cross: 4096 x 4096 from memory, one thread, fp32, few / panel in ms.
//
// AMD EPYC (Zen 4, its AVX-512 hidden by the virtual machine), least of 12 to 15 passes: 2:4 at 28
// rows 9.5 / 9.9, at 32 rows 10.3 / 10.0; 2:8 at 20 rows 3.5 / 4.3, at 24 rows 4.3 / 4.4; 4:8 at 24
// rows 8.3 / 8.3; 1:4 at 14 rows 3.1 / 3.2, at 16 rows 3.4 / 3.1; 1:8 at 12 rows 1.3 / 1.7, at 16
// rows equal; 1:16 at 6 rows 0.62 / 0.63, at 7 rows 0.70 / 0.62.
//
// AMD before Zen 4 takes two operations to permute across 8 lanes. Zen 3, with a panel kernel that
// was up to 15 % slower for few rows: 2:4 at 20 rows 8.1 / 9.0, at 24 rows 9.8 / 9.0; 2:8 at 10 rows
// 3.3 / 3.7, at 12 rows 4.0 / 3.7; 1:16 at 3 rows 0.58 / 0.78, at 4 rows 0.73 / 0.75.
constexpr Isa with(const int (&f32)[4], const int (&bf16)[4]) {
  return {"avx2",
          V::kLanes,
          8,
          kFewTile,
          {{f32[0], f32[1], f32[2], f32[3]}, {bf16[0], bf16[1], bf16[2], bf16[3]}},
          has_few,
          nullptr,
          few,
          few_input,
          panel,
          panel_scratch,
          &masks_avx2};
}
const Isa isa_avx2 = with({30, 22, 7, 15}, {28, 20, 7, 15});
const Isa isa_avx2_zen3 = with({24, 12, 4, 0}, {32, 11, 5, 0});

}  // namespace nmfx
