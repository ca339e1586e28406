// Masks with AVX2.
#include <immintrin.h>

#include <cstring>

namespace {
constexpr int kBytes = 32;

template <class Vector>
inline bool any(const Vector& v) {
  __m256i bits;
  memcpy(&bits, &v, sizeof bits);
  return !_mm256_testz_si256(bits, bits);
}

inline void stream_vector(char* out, const char* in) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
}
inline void streamed() { _mm_sfence(); }
}  // namespace

#include "mask_kernels.h"

const nmfx::MaskKernels nmfx::masks_avx2 = {mask_items, mask_run};
