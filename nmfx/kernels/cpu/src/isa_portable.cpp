// Any CPU: the panel kernel on eight floats at a time, in the vector extension that GCC and Clang
// lower to whatever there is (SSE, NEON, or scalar code). Also the definition the others are read
// against.
#include "masks.h"
#include "epilogue.h"

namespace nmfx {
namespace {

struct V {
  typedef float F __attribute__((vector_size(32), aligned(4)));
  static constexpr int kLanes = 8, kRegisters = 16;

  static F load(const float* p) { return *reinterpret_cast<const F*>(p); }
  static void store(float* p, F v) { *reinterpret_cast<F*>(p) = v; }
  static F zero() { return F{}; }
  static F broadcast(const float* p) { return F{} + *p; }
  template <int LANES>
  struct Spread {
    const float* values;
    explicit Spread(const float* p) : values(p) {}
    F at(int l) const { return broadcast(values + l); }
  };
  static F fma(F a, F b, F c) { return a * b + c; }

  // out[lane] = start + ((index[lane] >> shift) & (2^BITS - 1)) * STEP
  template <int BITS, int STEP>
  static void offsets(const uint32_t* __restrict index, int shift, int32_t start,
                      int32_t* __restrict out) {
    for (int lane = 0; lane < kLanes; lane++)
      out[lane] = start + int32_t((index[lane] >> shift) & ((1 << BITS) - 1)) * STEP;
  }

  static inline void transpose_rows(const void* const* rows, DType dtype, int64_t count,
                                    int64_t c0, int64_t c1, float* out, int64_t ld);
  using Lanes = uint32_t;
  static Lanes lanes_of(uint32_t bits) { return bits; }
  static F load_lanes(const float* p, Lanes lanes) {
    F v = {};
    for (int lane = 0; lane < kLanes; lane++)
      if (lanes >> lane & 1) v[lane] = p[lane];
    return v;
  }
  static void copy(const float* in, int64_t count, float* out) {
    memcpy(out, in, size_t(count) * 4);
  }
  static void copy_every_second(const float* in, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) out[i] = in[2 * i];
  }
  static void transpose_block(const float* sums, int64_t ld, float* out) {
    for (int64_t t = 0; t < ld; t++)
      for (int lane = 0; lane < kBlock; lane++) out[t * kBlock + lane] = sums[lane * ld + t];
  }
};

}  // namespace
}  // namespace nmfx

#include "panel.h"

namespace nmfx {

void V::transpose_rows(const void* const* rows, DType dtype, int64_t count, int64_t c0, int64_t c1,
                       float* out, int64_t ld) {
  transpose_rows_plain(rows, dtype, count, c0, c1, out, ld);
}

const Isa isa_portable = {"portable", V::kLanes, 8, 0, {{1, 1, 1}, {1, 1, 1}},
                          nullptr,    nullptr,   nullptr, nullptr, panel, panel_scratch, &masks_portable};

}  // namespace nmfx
