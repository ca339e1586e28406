// Masks with AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

#include <cstring>

namespace {
constexpr int kBytes = 64;

template <class Vector>
inline bool any(const Vector& v) {
  __m512i bits;
  memcpy(&bits, &v, sizeof bits);
  return _mm512_test_epi64_mask(bits, bits) != 0;
}

inline void stream_vector(char* out, const char* in) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
}
inline void streamed() { _mm_sfence(); }
}  // namespace

#include "mask_kernels.h"

const nmfx::MaskKernels nmfx::masks_avx512 = {mask_items, mask_run};
