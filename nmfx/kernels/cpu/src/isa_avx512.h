// AVX-512 (F, BW, VL, DQ): sixteen lanes, one vector per block. Included by the files with and
// without the bf16 dot product.
#pragma once
#include "masks.h"
#include "transpose_avx.h"

namespace nmfx {

// What the others take over from isa_avx512.cpp: functions, as a table of pointers out of another
// table would be filled in an order that nobody promises.
bool has_few_avx512(int n, int m, DType dtype);
void panel_avx512(const Call&, const Tile&, int64_t group, int64_t p0, int64_t count, int64_t b0,
                  int64_t b1, float* scratch);
int64_t panel_avx512_scratch(const Call&, const Tile&, int64_t blocks);

namespace {

struct V {
  using F = __m512;
  using Ints = __m512i;
  static constexpr int kLanes = 16, kRegisters = 32;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F zero() { return _mm512_setzero_ps(); }
  static F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  template <int LANES>
  struct Spread {
    const float* values;
    explicit Spread(const float* p) : values(p) {}
    F at(int l) const { return broadcast(values + l); }
  };
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static F load_values(const float* p) { return _mm512_loadu_ps(p); }
  static F load_values(const uint16_t* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Ints load_index(const uint32_t* p) {
    return _mm512_loadu_si512(reinterpret_cast<const void*>(p));
  }
  // out[lane] = start + ((index[lane] >> shift) & (2^BITS - 1)) * STEP
  template <int BITS, int STEP>
  static void offsets(const uint32_t* index, int shift, int32_t start, int32_t* out) {
    Ints field = _mm512_srli_epi32(load_index(index), unsigned(shift)), offset;
    if constexpr (BITS <= 4) {  // looked up: the permutation reads the lowest 4 bits
      alignas(64) static constexpr int32_t kFirst[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                         8, 9, 10, 11, 12, 13, 14, 15};
      const Ints keep = _mm512_set1_epi32((1 << BITS) - 1), lanes = _mm512_load_si512(kFirst);
      const Ints table =
          _mm512_mullo_epi32(_mm512_and_si512(lanes, keep), _mm512_set1_epi32(STEP));
      offset = _mm512_permutexvar_epi32(field, table);
    } else {
      field = _mm512_and_si512(field, _mm512_set1_epi32((1 << BITS) - 1));
      offset = _mm512_mullo_epi32(field, _mm512_set1_epi32(STEP));
    }
    _mm512_storeu_si512(static_cast<void*>(out),
                        _mm512_add_epi32(offset, _mm512_set1_epi32(start)));
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
    for (int64_t i = 0; i < count; i += kLanes)
      store(out + i, _mm512_maskz_loadu_ps(first_lanes(count - i), in + i));
  }
  // The same with out[i] = in[2 i].
  static void copy_every_second(const float* in, int64_t count, float* out) {
    alignas(64) static constexpr int32_t kEven[16] = {0,  2,  4,  6,  8,  10, 12, 14,
                                                      16, 18, 20, 22, 24, 26, 28, 30};
    const Ints even = _mm512_load_si512(kEven);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = 2 * (count - i) - 1;
      const F low = _mm512_maskz_loadu_ps(first_lanes(left), in + 2 * i);
      const F high = _mm512_maskz_loadu_ps(first_lanes(left - kLanes), in + 2 * i + kLanes);
      store(out + i, _mm512_permutex2var_ps(low, even, high));
    }
  }
  using Lanes = __mmask16;
  static Lanes lanes_of(uint32_t bits) { return Lanes(bits); }
  static F load_lanes(const float* p, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
  static __mmask16 first_lanes(int64_t count) {
    return __mmask16(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
  }
};

// The table of an instruction set with AVX-512: the panel kernel takes over from so many positions.
constexpr Isa avx512_table(const char* name, int few_tile, int panel_from, int panel_from_bf16,
                           decltype(Isa::few_units) few_units, decltype(Isa::few) few,
                           decltype(Isa::few_input) few_input) {
  return {name,
          V::kLanes,
          8,
          few_tile,
          {{panel_from, panel_from, panel_from},
           {panel_from_bf16, panel_from_bf16, panel_from_bf16}},
          has_few_avx512,
          few_units,
          few,
          few_input,
          panel_avx512,
          panel_avx512_scratch,
          &masks_avx512};
}

}  // namespace
}  // namespace nmfx
