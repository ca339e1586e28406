// float64, one multiply-add after the other: what the packed format means, as a program.
#include <cmath>

#include "kernel.h"

namespace nmfx {
namespace {

double activate(double x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x < 0 ? 0 : x;
    case Activation::gelu: return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Activation::silu: return x / (1 + std::exp(-x));
  }
  return x;
}

// Column k at position p for a convolution group; padding is 0.
double activation_at(const Input& in, int64_t group, int64_t p, int64_t k) {
  const double* data = static_cast<const double*>(in.data);
  if (!in.is_conv) return data[p * in.row_stride + k];
  int64_t size = in.out_height * in.out_width, q = p % size, tap = k / in.channels;
  int64_t y = q / in.out_width * in.stride_y - in.pad_y + tap / in.kernel_x * in.dilation_y;
  int64_t x = q % in.out_width * in.stride_x - in.pad_x + tap % in.kernel_x * in.dilation_x;
  if (y < 0 || y >= in.height || x < 0 || x >= in.width) return 0;
  int64_t channel = group * in.channels + k % in.channels;
  return data[p / size * in.step_image + channel * in.step_channel + y * in.step_y + x * in.step_x];
}

void position(const Call& c, int64_t p) {
  const Weight& w = c.weight;
  const Output& out = c.output;
  const int bits = field_bits(w.m), fields = 32 / bits;
  for (int64_t o = 0; o < w.groups * w.out; o++) {
    int64_t group = o / w.out, row = o % w.out, lane = row % kBlock;
    int64_t block = group * w.blocks + row / kBlock;
    double sum = w.bias ? static_cast<const double*>(w.bias)[o] : 0;
    for (int64_t s = 0; s < w.slots; s++) {
      uint32_t word = w.index[(block * w.words + s / fields) * kBlock + lane];
      int64_t field = (word >> field_shift(int(s % fields), bits)) & ((1u << bits) - 1);
      if (field >= w.m) continue;  // a corrupted index names no column
      double value = static_cast<const double*>(w.values)[(block * w.slots + s) * kBlock + lane];
      sum += value * activation_at(c.input, group, p, s / w.n * w.m + field);
    }
    int64_t at = p * out.step_position;
    if (out.image_size)
      at = p / out.image_size * out.step_image + p % out.image_size * out.step_position;
    static_cast<double*>(out.data)[at + o * out.step_out] = activate(sum, out.activation);
  }
}

}  // namespace

void run_f64(const Call& c, ParallelFor parallel_for) {
  parallel_for(
      0, c.input.positions, 16,
      [](int64_t begin, int64_t end, void* call) {
        for (int64_t p = begin; p < end; p++) position(*static_cast<const Call*>(call), p);
      },
      const_cast<Call*>(&c));
}

}  // namespace nmfx
