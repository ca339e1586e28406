// Masks with whatever vectors of 16 bytes the compiler has: SSE2, NEON, or none.
#include <cstring>

namespace {
constexpr int kBytes = 16;

template <class Vector>
inline bool any(const Vector& v) {
  unsigned long long halves[2];
  static_assert(sizeof halves == sizeof v);
  memcpy(halves, &v, sizeof v);
  return (halves[0] | halves[1]) != 0;
}

inline void stream_vector(char* out, const char* in) { memcpy(out, in, kBytes); }
inline void streamed() {}
}  // namespace

#include "mask_kernels.h"

const nmfx::MaskKernels nmfx::masks_portable = {mask_items, mask_run};
