// Activation functions on contiguous floats, and conversions. Plain loops without branches: the
// compiler vectorizes them for whatever instruction set includes this file.
#pragma once
#include <cstring>

#include "kernel.h"

#define NMFX_UNROLL _Pragma("GCC unroll 16")

namespace nmfx {
namespace {

inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float from_bf16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }
inline uint16_t to_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u = float_to_bits(f);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return uint16_t(f != f ? 0x7fc0 : rounded);
}

inline float from_f16(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16;
  uint32_t rest = uint32_t(h & 0x7fff) << 13;
  // Shift the exponent's bias by a multiplication: exact, and right for subnormals too.
  uint32_t u = float_to_bits(bits_to_float(rest) * 0x1p112f);
  u = (h & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : u;
  return bits_to_float(u | sign);
}
inline uint16_t to_f16(float f) {
  uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  uint32_t subnormal = float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000;
  uint32_t normal = (u + 0xc8000fff + ((u >> 13) & 1)) >> 13;
  uint32_t r = u < 0x38800000 ? subnormal : normal;
  r = u >= 0x477ff000 ? 0x7c00 : r;  // rounds to 65536 or more
  r = u > 0x7f800000 ? 0x7e00 : r;
  return uint16_t(r | sign);
}

// exp to about 1 ulp: 2^k * p(r) with |r| <= ln(2) / 2 (coefficients as in Cephes' expf).
inline float exp_f32(float x) {
  x = x > 88.72f ? 88.72f : x;
  x = x < -87.33f ? -87.33f : x;  // a NaN fails both comparisons and stays
  float k = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  uint32_t exponent = float_to_bits(k) << 23;
  k -= 12582912.0f;
  float r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return bits_to_float(float_to_bits(p) + exponent);
}

// 1 - erf(z) for z >= 0, absolute error below 1.5e-7 (Abramowitz and Stegun 7.1.26).
inline float erfc_f32(float z) {
  float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return p * t * exp_f32(-z * z);
}

inline float relu_f32(float x) { return x < 0.0f ? 0.0f : x; }
inline float gelu_f32(float x) {
  float half_tail = 0.5f * erfc_f32((x < 0.0f ? -x : x) * 0.70710678f);
  return x * (x < 0.0f ? half_tail : 1.0f - half_tail);
}
inline float gelu_tanh_f32(float x) {
  // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
  float u = 0.79788456f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp_f32(-2.0f * u));
}
inline float silu_f32(float x) { return x / (1.0f + exp_f32(-x)); }

template <float (*F)(float)>
inline void map(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i++) x[i] = F(x[i]);
}

inline void activate(float* x, int64_t count, Activation activation) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return map<relu_f32>(x, count);
    case Activation::gelu: return map<gelu_f32>(x, count);
    case Activation::gelu_tanh: return map<gelu_tanh_f32>(x, count);
    case Activation::silu: return map<silu_f32>(x, count);
  }
}

inline float load_as_float(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  uint16_t h = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::bf16 ? from_bf16(h) : from_f16(h);
}

inline void to_floats(const void* data, int64_t start, int64_t count, DType dtype, float* out) {
  if (dtype == DType::f32) {
    memcpy(out, static_cast<const float*>(data) + start, size_t(count) * 4);
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(data) + start;
  if (dtype == DType::bf16)
    for (int64_t i = 0; i < count; i++) out[i] = from_bf16(half[i]);
  else
    for (int64_t i = 0; i < count; i++) out[i] = from_f16(half[i]);
}

inline void from_floats(const float* in, int64_t count, DType dtype, void* data, int64_t start) {
  if (dtype == DType::f32) {
    float* out = static_cast<float*>(data) + start;
    if (count == kBlock)  // a number the compiler knows: no call
      memcpy(out, in, kBlock * 4);
    else
      memcpy(out, in, size_t(count) * 4);
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(data) + start;
  if (dtype == DType::bf16)
    for (int64_t i = 0; i < count; i++) half[i] = to_bf16(in[i]);
  else
    for (int64_t i = 0; i < count; i++) half[i] = to_f16(in[i]);
}

}  // namespace
}  // namespace nmfx
