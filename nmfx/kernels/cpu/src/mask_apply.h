// What is done with a mask: plain loops, which the compiler vectorizes. Half precision is computed
// in float32 and rounded once. Compiled without fused multiply-adds: g + lambda * w is what torch
// and Inductor compute, bit for bit.
#pragma once
#include <type_traits>

#include "epilogue.h"
#include "masks.h"

namespace nmfx {
namespace {

// The result may lie where an operand does, and nowhere else beside it: no iteration reads what
// another writes.
#define NMFX_SAME_PLACE _Pragma("GCC ivdep")

template <DType D>
using Bits = typename std::conditional<
    D == DType::f64, uint64_t,
    typename std::conditional<D == DType::f32, uint32_t, uint16_t>::type>::type;

template <DType D>
inline auto widened(Bits<D> bits) {
  if constexpr (D == DType::f64) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
  } else if constexpr (D == DType::f32) {
    return bits_to_float(bits);
  } else {
    return D == DType::bf16 ? from_bf16(bits) : from_f16(bits);
  }
}

template <DType D, class F>
inline Bits<D> narrowed(F value) {
  if constexpr (D == DType::f64) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
  } else if constexpr (D == DType::f32) {
    return float_to_bits(value);
  } else {
    return D == DType::bf16 ? to_bf16(value) : to_f16(value);
  }
}

// Kept elements are copied as bits where the dtype stays: NaN payloads survive.
template <DType W, DType OUT, class K>
void project(const void* weight, const K* mask, void* out, int64_t count) {
  const Bits<W>* w = static_cast<const Bits<W>*>(weight);
  Bits<OUT>* o = static_cast<Bits<OUT>*>(out);
  NMFX_SAME_PLACE for (int64_t i = 0; i < count; i++) {
    const Bits<W> kept = w[i] & Bits<W>(mask[i]);
    if constexpr (W == OUT)
      o[i] = kept;
    else
      o[i] = narrowed<OUT>(widened<W>(kept));
  }
}

template <DType W, DType G, class K, class F>
void gradient(const void* weight, const void* grad, const K* mask, void* out, F lambda,
              int64_t count) {
  const Bits<W>* w = static_cast<const Bits<W>*>(weight);
  const Bits<G>* g = static_cast<const Bits<G>*>(grad);
  Bits<W>* o = static_cast<Bits<W>*>(out);
  NMFX_SAME_PLACE for (int64_t i = 0; i < count; i++) {
    const Bits<W> plain = W == G ? Bits<W>(g[i]) : narrowed<W>(widened<G>(g[i]));
    const Bits<W> decayed = narrowed<W>(widened<G>(g[i]) + lambda * widened<W>(w[i]));
    // Not a choice: compilers sink the arithmetic into one, and then make no vectors of it.
    const Bits<W> keep = Bits<W>(mask[i]);
    o[i] = Bits<W>((plain & keep) | (decayed & Bits<W>(~keep)));
  }
}

}  // namespace
}  // namespace nmfx
