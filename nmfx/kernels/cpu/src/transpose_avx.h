// 8x8 transposition in ymm registers, for the AVX2 and the AVX-512 file.
#pragma once
#include <immintrin.h>

#include "epilogue.h"

namespace nmfx {
namespace {

inline void transpose8(__m256 r[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    b[4 * i + 0] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

inline __m256 load8(const void* row, int64_t c, DType dtype) {
  if (dtype == DType::f32) return _mm256_loadu_ps(static_cast<const float*>(row) + c);
  const __m128i* half = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(row) + c);
  if (dtype == DType::f16) return _mm256_cvtph_ps(_mm_loadu_si128(half));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(half)), 16));
}

// See transpose_rows_plain in panel.h; what is left of whole 8x8 tiles is done one by one.
inline void transpose_rows_avx(const void* const* rows, DType dtype, int64_t count, int64_t c0,
                               int64_t c1, float* out, int64_t ld) {
  int64_t whole = c0 + (c1 - c0) / 8 * 8;
  for (int64_t t = 0; t < count; t += 8) {
    if (count - t < 8) {
      for (int64_t u = t; u < count; u++)
        for (int64_t c = c0; c < c1; c++)
          out[(c - c0) * ld + u] = rows[u] ? load_as_float(rows[u], c, dtype) : 0.0f;
      break;
    }
    for (int64_t c = c0; c < whole; c += 8) {
      __m256 r[8];
      for (int i = 0; i < 8; i++)
        r[i] = rows[t + i] ? load8(rows[t + i], c, dtype) : _mm256_setzero_ps();
      transpose8(r);
      for (int i = 0; i < 8; i++) _mm256_storeu_ps(out + (c - c0 + i) * ld + t, r[i]);
    }
    for (int64_t c = whole; c < c1; c++)
      for (int64_t u = t; u < t + 8; u++)
        out[(c - c0) * ld + u] = rows[u] ? load_as_float(rows[u], c, dtype) : 0.0f;
  }
}

// (16, ld) -> (ld, 16), ld a multiple of 8.
inline void transpose_block_avx(const float* sums, int64_t ld, float* out) {
  for (int64_t t = 0; t < ld; t += 8)
    for (int half = 0; half < 2; half++) {
      __m256 r[8];
      for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(sums + (8 * half + i) * ld + t);
      transpose8(r);
      for (int i = 0; i < 8; i++) _mm256_storeu_ps(out + (t + i) * kBlock + 8 * half, r[i]);
    }
}

}  // namespace
}  // namespace nmfx
