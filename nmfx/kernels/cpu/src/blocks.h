// What the few-rows kernels share: where blocks of weights lie, and how their sums become outputs.
#pragma once
#include "epilogue.h"

namespace nmfx {
namespace {

// Where a block lies, and how far away the next of the blocks that are read beside it.
template <class T>
struct Stream {
  const T* values;
  const uint32_t* index;
  int64_t values_step, index_step;
};

// Sums [rows][16] of a block, with bias and activation, become rows of the output from p0 on.
inline void store_sums(const Call& c, float* sums, int64_t p0, int64_t rows, int64_t block) {
  const Weight& w = c.weight;
  const int64_t o = block * kBlock, lanes = w.out - o < kBlock ? w.out - o : kBlock;
  float bias[kBlock] = {};
  if (w.bias) to_floats(w.bias, o, lanes, w.dtype, bias);
  for (int64_t r = 0; r < rows; r++) {
    float* sum = sums + r * kBlock;
    if (w.bias)
      for (int lane = 0; lane < kBlock; lane++) sum[lane] += bias[lane];
    activate(sum, kBlock, c.output.activation);
    from_floats(sum, lanes, w.dtype, c.output.data, (p0 + r) * c.output.step_position + o);
  }
}

}  // namespace
}  // namespace nmfx
