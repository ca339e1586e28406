// What the instruction-set files offer and what the driver asks of them. Plain C types only: a
// template of the standard library instantiated in one of those files would be a weak symbol, and
// the linker might then hand its AVX-512 code to everybody.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nmfx {

enum class DType : int { f32, bf16, f16, f64 };  // f64: only in run_f64
enum class Activation : int { none, relu, gelu, gelu_tanh, silu };

constexpr int kBlock = 16;  // output rows of a packed block, see nmfx/packing.py

// Bits of an index field, and fields of a 32-bit word.
constexpr int field_bits(int m) { return m <= 4 ? 2 : m <= 16 ? 4 : 8; }
constexpr int fields_per_word(int m) { return 32 / field_bits(m); }
// Bit of field k of its word: even fields fill the low half, odd fields the high half.
constexpr int field_shift(int k, int bits) { return 16 * (k & 1) + bits * (k >> 1); }

// A packed weight: `groups` convolution groups (1 for a linear) of `out` rows each, padded to
// whole blocks.
//   values (groups * blocks, slots, 16) of `dtype`, index (groups * blocks, words, 16) uint32
struct Weight {
  const void* values;
  const uint32_t* index;
  const void* bias;  // (groups * out) of `dtype`, or null
  DType dtype;
  int n, m;
  int64_t out, columns, groups;
  int64_t blocks, slots, words;  // per convolution group
};

// Activations: `positions` rows of a linear, or output pixels of a convolution. Column k of
// position p is what kept weight k of an output row is multiplied with.
struct Input {
  const void* data;
  DType dtype;
  int64_t positions;
  bool is_conv;
  int64_t row_stride;  // linear: position p starts at data + p * row_stride
  // convolution: columns are (ky, kx, channel), channels fastest
  int64_t channels;  // of one group
  int64_t height, width, out_height, out_width;
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
  int64_t step_image, step_channel, step_y, step_x;  // strides of the tensor, in elements
};

// Element (p, o): linear and channels-last: data + p * step_position + o * step_out;
// with image_size > 0 (contiguous convolution), p = image * image_size + q is at
// data + image * step_image + q * step_position.
struct Output {
  void* data;
  int64_t step_position, step_out;
  int64_t image_size, step_image;
  Activation activation;
};

struct Call {
  Weight weight;
  Input input;
  Output output;
};

// How the panel kernel cuts its work; see driver.cpp.
struct Tile {
  int vectors;          // positions of a tile, in vectors of the instruction set
  int64_t chunk_slots;  // slots of a block that one panel serves, a multiple of a word's fields
};

struct MaskKernels;  // masks.h

constexpr int64_t kFewRoom = 128;

struct Isa {
  const char* name;
  int lanes;                // floats per vector
  int max_vectors;          // largest Tile::vectors
  int few_tile;             // most positions of a call of the few-rows kernel, 0: there is none
  // Positions from which the panel kernel is faster: for groups of up to 4, 8 and 16, and where one
  // of up to 8 is kept (0: as the others).
  int panel_from[2][4];     // [f32, bf16]

  bool (*has_few)(int n, int m, DType dtype);
  // Parts into which it cuts the positions of a call; null: each position is one.
  int64_t (*few_units)(const Call&);
  // Writes outputs of blocks [b0, b1) for parts [u0, u1). `x`: activations as few_input wrote them.
  void (*few)(const Call&, const void* x, int64_t u0, int64_t u1, int64_t b0, int64_t b1);
  // Converts parts [u0, u1) to what `few` reads: `x` has room for kFewRoom more columns than there
  // are, of floats, and is aligned to 64 bytes.
  void (*few_input)(const Call&, void* x, int64_t u0, int64_t u1);
  // Blocks [b0, b1) of convolution group `group` for positions [p0, p0 + count).
  void (*panel)(const Call&, const Tile&, int64_t group, int64_t p0, int64_t count, int64_t b0,
                int64_t b1, float* scratch);
  // Floats of `scratch` for that many blocks.
  int64_t (*panel_scratch)(const Call&, const Tile&, int64_t blocks);
  const MaskKernels* masks;
};

extern const Isa isa_portable;
#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avx2_zen3;
extern const Isa isa_avx512, isa_avx512_amd;
extern const Isa isa_avx512_bf16, isa_avx512_bf16_amd;
extern const Isa isa_amx_bf16;
#endif

// The instruction set in use: the best of this machine, or the one NMFX_CPU_ISA names.
const Isa* isa_in_use();
// Null if the name is unknown or this machine lacks it.
const Isa* isa_by_name(const char* name);
// Changes it for the whole process; false if this machine lacks it.
bool use_isa(const char* name);

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody, void* context);

// Runs a call on the given instruction set; returns false when memory ran out.
bool run(const Call&, const Isa&, int threads, ParallelFor);

// The same for float64 tensors, in scalar code: for exact comparisons, not for speed.
void run_f64(const Call&, ParallelFor);

}  // namespace nmfx
