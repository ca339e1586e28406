// The panel kernel: lane = position. A panel holds the activations of some columns for a tile of
// positions, [column][position], in the first-level cache; a kept weight is broadcast and
// multiplied with the one row of the panel that its index names. No permutation, no pruned
// product, any N:M, and linear and convolution differ only in how the panel is filled.
//
//   panel  column 0 | p0 p1 p2 ... |      sums[lane][p] += values[slot][lane] * panel[column][p]
//          column 1 | p0 p1 p2 ... |
//          ...
//   for chunk of columns:  fill the panel;  for block: find the rows;  for lane: for slot: fma
//
// Included by one file per instruction set, which defines V (see few.h) and transpose_rows.
#pragma once
#include "epilogue.h"

namespace nmfx {
namespace {

// --- filling a panel -----------------------------------------------------------------------

// out[(c - c0) * ld + t] = rows[t][c] for c in [c0, c1); a null row is zeros.
inline void transpose_rows_plain(const void* const* rows, DType dtype, int64_t count, int64_t c0,
                                 int64_t c1, float* out, int64_t ld) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t c = c0; c < c1; c++)
      out[(c - c0) * ld + t] = rows[t] ? load_as_float(rows[t], c, dtype) : 0.0f;
}

inline const void* element(const Input& in, int64_t i) {
  return static_cast<const char*>(in.data) + i * (in.dtype == DType::f32 ? 4 : 2);
}

constexpr int64_t kMaxTile = 128;  // positions

inline void clear_positions(float* panel, int64_t columns, int64_t count, int64_t ld) {
  if (count == ld) return;
  for (int64_t k = 0; k < columns; k++)
    memset(panel + k * ld + count, 0, size_t(ld - count) * 4);
}

inline void fill_linear(const Input& in, int64_t k0, int64_t k1, int64_t p0, int64_t count,
                        float* panel, int64_t ld) {
  const void* rows[kMaxTile];
  for (int64_t t = 0; t < count; t++) rows[t] = element(in, (p0 + t) * in.row_stride);
  V::transpose_rows(rows, in.dtype, count, k0, k1, panel, ld);
}

// The input elements at the first kernel position of output pixels: which may be padding.
struct Pixel {
  int64_t image_offset, y, x;
};

// Output pixels of a tile: each, and in runs along a row of an image. Found once for all columns.
struct Pixels {
  struct Run {
    int64_t start, length;
    Pixel first;
  };
  Pixel all[kMaxTile];
  Run runs[kMaxTile];
  int64_t count, number;  // of `all`, of `runs`

  void find(const Input& in, int64_t group, int64_t p0, int64_t positions) {
    const int64_t size = in.out_height * in.out_width, image = p0 / size;
    int64_t y = p0 % size / in.out_width, x = p0 % in.out_width;
    Pixel pixel = {image * in.step_image + group * in.channels * in.step_channel,
                   y * in.stride_y - in.pad_y, x * in.stride_x - in.pad_x};
    count = positions, number = 0;
    for (int64_t t = 0; t < count;) {
      const int64_t length = in.out_width - x < count - t ? in.out_width - x : count - t;
      runs[number++] = {t, length, pixel};
      for (int64_t end = t + length; t < end; t++) {
        all[t] = pixel;
        pixel.x += in.stride_x;
      }
      x = 0, y++;
      pixel.x = -in.pad_x, pixel.y += in.stride_y;
      if (y == in.out_height) y = 0, pixel.y = -in.pad_y, pixel.image_offset += in.step_image;
    }
  }
};

// Channels [c0, c1) at one kernel position for channels-last input: rows again.
inline void fill_channels_last(const Input& in, const Pixels& pixels, int64_t ky, int64_t kx,
                               int64_t c0, int64_t c1, float* panel, int64_t ld) {
  const void* rows[kMaxTile];
  for (int64_t t = 0; t < pixels.count; t++) {
    const Pixel& p = pixels.all[t];
    const int64_t y = p.y + ky * in.dilation_y, x = p.x + kx * in.dilation_x;
    const bool inside = y >= 0 && y < in.height && x >= 0 && x < in.width;
    rows[t] = inside ? element(in, p.image_offset + y * in.step_y + x * in.step_x) : nullptr;
  }
  V::transpose_rows(rows, in.dtype, pixels.count, c0, c1, panel, ld);
}

// What one kernel position reads of a channel: elements `step` apart, or padding.
struct Parts {
  struct Part {
    int64_t start, length, offset;  // offset < 0: padding
  };
  Part parts[kMaxTile];
  int64_t number = 0, step;

  explicit Parts(int64_t step) : step(step) {}

  void add(int64_t start, int64_t length, int64_t offset) {
    if (length <= 0) return;
    if (number) {
      Part& last = parts[number - 1];
      const bool joins =
          offset < 0 ? last.offset < 0
                     : last.offset >= 0 && offset == last.offset + last.length * step;
      if (joins) {
        last.length += length;
        return;
      }
    }
    parts[number++] = {start, length, offset};
  }

  // Pixels of a run along a row: some at its ends may be padding.
  void add_run(const Input& in, const Pixels::Run& run, int64_t ky, int64_t kx) {
    const int64_t y = run.first.y + ky * in.dilation_y, x = run.first.x + kx * in.dilation_x;
    if (y < 0 || y >= in.height) return add(run.start, run.length, -1);
    int64_t from = 0, to = 0;  // of the run, inside the image
    if (in.stride_x == 1) {
      from = x < 0 ? -x : 0, to = in.width - x;
    } else {
      if (x < 0) from = (-x + in.stride_x - 1) / in.stride_x;
      if (x < in.width) to = (in.width - 1 - x) / in.stride_x + 1;
    }
    to = to < run.length ? to : run.length;
    if (from >= to) return add(run.start, run.length, -1);
    add(run.start, from, -1);
    add(run.start + from, to - from,
        run.first.image_offset + y * in.step_y + (x + from * in.stride_x) * in.step_x);
    add(run.start + to, run.length - to, -1);
  }
};

// For parts whose elements lie in one line but for padding, as those of a convolution that keeps
// the width of its images: each vector of a panel row is one load that leaves the padding out.
struct WholeVectors {
  static constexpr int kMost = kMaxTile / V::kLanes;
  int64_t offset[kMost] = {};
  uint32_t bits[kMost] = {};  // lanes that are not padding
  bool possible = true;

  explicit WholeVectors(const Parts& parts) {
    for (int64_t i = 0; i < parts.number && possible; i++) {
      const Parts::Part& part = parts.parts[i];
      const int64_t end = part.start + part.length;
      if (part.offset < 0) continue;
      for (int64_t v = part.start / V::kLanes; v * V::kLanes < end; v++) {
        const int64_t first = v * V::kLanes, from = part.offset + first - part.start;
        possible = possible && (bits[v] == 0 || offset[v] == from);
        offset[v] = from;
        const int64_t low = part.start > first ? part.start - first : 0;
        const int64_t high = end - first < V::kLanes ? end - first : V::kLanes;
        bits[v] |= ((1u << high) - 1) & ~((1u << low) - 1);
      }
    }
  }

  // Rows of `vectors` vectors for channels that lie `step` apart.
  void copy(const float* channel, int64_t step, int64_t channels, int64_t vectors, float* out,
            int64_t ld) const {
    typename V::Lanes lanes[kMost];
    for (int64_t v = 0; v < vectors; v++) lanes[v] = V::lanes_of(bits[v]);
    for (int64_t c = 0; c < channels; c++, channel += step, out += ld)
      for (int64_t v = 0; v < vectors; v++)
        V::store(out + v * V::kLanes, V::load_lanes(channel + offset[v], lanes[v]));
  }
};

// The same for any other layout. A part is written in whole vectors: what lies behind it is written
// after it, or is room at the end of the panel.
inline void fill_planes(const Input& in, const Pixels& pixels, int64_t ky, int64_t kx, int64_t c0,
                        int64_t c1, float* panel, int64_t ld) {
  Parts all(in.stride_x * in.step_x);
  for (int64_t i = 0; i < pixels.number; i++) all.add_run(in, pixels.runs[i], ky, kx);
  if (in.dtype == DType::f32 && all.step == 1) {
    const WholeVectors vectors(all);
    if (vectors.possible)
      return vectors.copy(static_cast<const float*>(in.data) + c0 * in.step_channel,
                          in.step_channel, c1 - c0, (pixels.count + V::kLanes - 1) / V::kLanes,
                          panel, ld);
  }
  for (int64_t c = c0; c < c1; c++, panel += ld)
    for (int64_t i = 0; i < all.number; i++) {
      const Parts::Part& part = all.parts[i];
      float* out = panel + part.start;
      const int64_t start = c * in.step_channel + part.offset;
      if (part.offset < 0) {
        for (int64_t j = 0; j < part.length; j += V::kLanes) V::store(out + j, V::zero());
      } else if (in.dtype == DType::f32 && all.step == 1) {
        V::copy(static_cast<const float*>(in.data) + start, part.length, out);
      } else if (in.dtype == DType::f32 && all.step == 2) {
        V::copy_every_second(static_cast<const float*>(in.data) + start, part.length, out);
      } else if (all.step == 1) {
        to_floats(in.data, start, part.length, in.dtype, out);
      } else {
        for (int64_t j = 0; j < part.length; j++)
          out[j] = load_as_float(in.data, start + j * all.step, in.dtype);
      }
    }
}

inline void fill_conv(const Input& in, const Pixels& pixels, int64_t k0, int64_t k1, float* panel,
                      int64_t ld) {
  for (int64_t k = k0; k < k1;) {
    int64_t tap = k / in.channels, c0 = k % in.channels;
    int64_t c1 = c0 + (k1 - k) < in.channels ? c0 + (k1 - k) : in.channels;
    auto fill = in.step_channel == 1 ? fill_channels_last : fill_planes;
    fill(in, pixels, tap / in.kernel_x, tap % in.kernel_x, c0, c1, panel + (k - k0) * ld, ld);
    k += c1 - c0;
  }
}

// --- the rows of a panel that a block reads --------------------------------------------------

// Slots [s0, s1) of a block: where their rows start in a panel with rows of LD floats, [slot][16].
// s0 is the first field of a word, and its group is the first of the panel.
template <int BITS, int LD>
void find_rows(const Weight& w, int64_t block, int64_t s0, int64_t s1, int32_t* offsets) {
  constexpr int kFields = 32 / BITS;
  const uint32_t* word = w.index + (block * w.words + s0 / kFields) * kBlock;
  int64_t in_group = s0 % w.n;
  int32_t start = 0;
  for (int64_t s = s0; s < s1; s += kFields, word += kBlock)
    NMFX_UNROLL for (int field = 0; field < kFields; field++, offsets += kBlock) {
      if (s + field == s1) return;
      NMFX_UNROLL for (int lane = 0; lane < kBlock; lane += V::kLanes)
        V::template offsets<BITS, LD>(word + lane, field_shift(field, BITS), start, offsets + lane);
      if (++in_group == w.n) in_group = 0, start += w.m * LD;
    }
}

template <int LD>
void find_rows(const Weight& w, int64_t block, int64_t s0, int64_t s1, int32_t* offsets) {
  switch (field_bits(w.m)) {
    case 2: return find_rows<2, LD>(w, block, s0, s1, offsets);
    case 4: return find_rows<4, LD>(w, block, s0, s1, offsets);
    case 8: return find_rows<8, LD>(w, block, s0, s1, offsets);
  }
}

// The values of these slots, [slot][16], widened into `floats` if need be.
inline const float* find_values(const Weight& w, int64_t block, int64_t s0, int64_t s1,
                                float* floats) {
  const int64_t first = (block * w.slots + s0) * kBlock;
  if (w.dtype == DType::f32) return static_cast<const float*>(w.values) + first;
  to_floats(w.values, first, (s1 - s0) * kBlock, w.dtype, floats);
  return floats;
}

// Which slots to ask of memory while a block is at work on [s0, s1): those of the second block from
// here, where the last of `blocks` is followed by the first with the next slots. They lie far
// apart, so the hardware does not ask for them by itself. Past the end of the weight they are not
// touched.
struct Ahead {
  const char* values;
  const char* index;

  Ahead(const Weight& w, int64_t block, int64_t left, int64_t blocks, int64_t s0, int64_t s1) {
    constexpr int64_t kBlocks = 2;
    int64_t next = block + kBlocks, slot = s0;
    for (left -= kBlocks; left <= 0; left += blocks) next -= blocks, slot += s1 - s0;
    const int64_t itemsize = w.dtype == DType::f32 ? 4 : 2;
    values = static_cast<const char*>(w.values) + (next * w.slots + slot) * kBlock * itemsize;
    index = reinterpret_cast<const char*>(
        w.index + (next * w.words + slot / fields_per_word(w.m)) * kBlock);
  }
};

// From this many vectors on values are asked for before the lanes that take as long as they do to
// come, not with every weight. All those of a block at once fill the queue to memory, and the rest
// waits for it: Intel Xeon (AVX-512), 4096 x 4096 from memory, 128 rows, ms, 2:4 17.4 / 19.5, 1:4
// 8.6 / 9.2.
constexpr int kLong = 5;

// sums[lane][p] += sum over slots of values[slot][lane] * panel[offsets[slot][lane] + p] for LANES
// lanes at once, so that short tiles have enough independent chains of additions. Meanwhile asks
// for memory from `ahead` on, `ahead_step` bytes per slot. A function of its own: as a part of
// panel_tile its inner loop was up to 10 % slower (GCC 12, AVX-512, 8 vectors).
template <int R, int LANES>
__attribute__((noinline)) void add_lanes(const int32_t* offsets, const float* values, int64_t slots,
                      const float* panel, float* sums, bool first, const char* ahead,
                      int64_t ahead_step) {
  typename V::F acc[LANES][R];
  NMFX_UNROLL for (int l = 0; l < LANES; l++) NMFX_UNROLL for (int r = 0; r < R; r++)
    acc[l][r] = first ? V::zero() : V::load(sums + (l * R + r) * V::kLanes);
  for (int64_t s = 0; s < slots; s++, offsets += kBlock, values += kBlock, ahead += ahead_step) {
    if (R < kLong) __builtin_prefetch(ahead);
    const typename V::template Spread<LANES> spread(values);
    NMFX_UNROLL for (int l = 0; l < LANES; l++) {
      const float* row = panel + offsets[l];
      const typename V::F value = spread.at(l);
      NMFX_UNROLL for (int r = 0; r < R; r++)
        acc[l][r] = V::fma(value, V::load(row + r * V::kLanes), acc[l][r]);
    }
  }
  NMFX_UNROLL for (int l = 0; l < LANES; l++) NMFX_UNROLL for (int r = 0; r < R; r++)
    V::store(sums + (l * R + r) * V::kLanes, acc[l][r]);
}

// --- results -----------------------------------------------------------------------------------

inline void store_block(const Call& c, float* sums, int64_t ld, int64_t group, int64_t block,
                        int64_t p0, int64_t count) {
  const Weight& w = c.weight;
  const Output& out = c.output;
  int64_t o0 = block * kBlock, lanes = w.out - o0 < kBlock ? w.out - o0 : kBlock;
  int64_t channel = group * w.out + o0;
  for (int64_t lane = 0; lane < lanes; lane++) {
    float* sum = sums + lane * ld;
    if (w.bias) {
      float bias = load_as_float(w.bias, channel + lane, w.dtype);
      for (int64_t t = 0; t < ld; t++) sum[t] += bias;
    }
    activate(sum, ld, out.activation);
  }
  if (out.image_size == 0) {  // rows: linear and channels-last
    float turned[kMaxTile * kBlock];
    V::transpose_block(sums, ld, turned);
    for (int64_t t = 0; t < count; t++)
      from_floats(turned + t * kBlock, lanes, w.dtype, out.data,
                  (p0 + t) * out.step_position + channel);
    return;
  }
  for (int64_t lane = 0; lane < lanes; lane++)
    for (int64_t t = 0; t < count;) {  // a tile may end in another image than it began
      int64_t image = (p0 + t) / out.image_size, q = (p0 + t) % out.image_size;
      int64_t run = out.image_size - q < count - t ? out.image_size - q : count - t;
      from_floats(sums + lane * ld + t, run, w.dtype, out.data,
                  image * out.step_image + (channel + lane) * out.step_out + q);
      t += run;
    }
}

// --- a tile --------------------------------------------------------------------------------------

inline int64_t chunk_columns(const Weight& w, const Tile& tile) {
  return ((tile.chunk_slots + w.n - 1) / w.n + 1) * w.m;
}

// An index that names no column of its group, out of a corrupted file, must not leave `scratch`: a
// field reaches at most (1 << bits) - 1 columns past the start of its group. Filling the panel may
// write a vector past its end.
inline int64_t panel_floats(const Weight& w, const Tile& tile) {
  return (chunk_columns(w, tile) + (1 << field_bits(w.m))) * tile.vectors * V::kLanes;
}

int64_t panel_scratch(const Call& c, const Tile& tile, int64_t blocks) {
  return panel_floats(c.weight, tile) + blocks * kBlock * tile.vectors * V::kLanes +
         2 * tile.chunk_slots * kBlock;
}

// Into the second-level cache: the first is full of activations.
inline void prefetch(const char* start, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(start + i, 0, 2);
}

// Half of the registers hold sums. In a loop of its own (Intel Xeon, AVX-512, all in the
// first-level cache) 8 vectors of 1 / 2 lanes made 148 / 156 GFLOP/s, 4 of 2 / 4 lanes 142 / 150, 2
// of 4 / 8 lanes 127 / 132.
constexpr int lanes_at_once(int vectors) {
  int lanes = 1;
  while (2 * lanes * vectors <= V::kRegisters / 2 && lanes < 8) lanes *= 2;
  return lanes;
}

template <int R>
void panel_tile(const Call& c, const Tile& tile, int64_t group, int64_t p0, int64_t count,
                int64_t b0, int64_t b1, float* scratch) {
  constexpr int64_t ld = R * V::kLanes;
  constexpr int LANES = lanes_at_once(R);
  const Weight& w = c.weight;
  float* panel = scratch;
  float* sums = panel + panel_floats(w, tile);
  int32_t* offsets = reinterpret_cast<int32_t*>(sums + (b1 - b0) * kBlock * ld);
  float* floats = reinterpret_cast<float*>(offsets) + tile.chunk_slots * kBlock;
  const int64_t itemsize = w.dtype == DType::f32 ? 4 : 2, fields = fields_per_word(w.m);
  Pixels pixels;
  if (c.input.is_conv) pixels.find(c.input, group, p0, count);
  if (w.slots == 0) memset(sums, 0, size_t((b1 - b0) * kBlock * ld) * 4);
  for (int64_t s0 = 0; s0 < w.slots; s0 += tile.chunk_slots) {
    const int64_t s1 = s0 + tile.chunk_slots < w.slots ? s0 + tile.chunk_slots : w.slots;
    const int64_t k0 = s0 / w.n * w.m, k1 = ((s1 - 1) / w.n + 1) * w.m;
    if (c.input.is_conv)
      fill_conv(c.input, pixels, k0, k1, panel, ld);
    else
      fill_linear(c.input, k0, k1, p0, count, panel, ld);
    clear_positions(panel, k1 - k0, count, ld);
    for (int64_t b = b0; b < b1; b++) {
      const int64_t block = group * w.blocks + b;
      const Ahead ahead(w, block, b1 - b, b1 - b0, s0, s1);
      prefetch(ahead.index, (s1 - s0 + fields - 1) / fields * kBlock * 4);
      find_rows<ld>(w, block, s0, s1, offsets);
      const float* values = find_values(w, block, s0, s1, floats);
      float* sum = sums + (b - b0) * kBlock * ld;
      for (int lane = 0; lane < kBlock; lane += LANES) {
        const char* part = ahead.values + lane * (s1 - s0) * itemsize;
        if (R >= kLong) prefetch(part, LANES * (s1 - s0) * itemsize);
        add_lanes<R, LANES>(offsets + lane, values + lane, s1 - s0, panel, sum + lane * ld,
                            s0 == 0, part, LANES * itemsize);
      }
    }
  }
  for (int64_t b = b0; b < b1; b++)
    store_block(c, sums + (b - b0) * kBlock * ld, ld, group, b, p0, count);
}

void panel(const Call& c, const Tile& tile, int64_t group, int64_t p0, int64_t count, int64_t b0,
           int64_t b1, float* scratch) {
  switch (tile.vectors) {
    case 1: return panel_tile<1>(c, tile, group, p0, count, b0, b1, scratch);
    case 2: return panel_tile<2>(c, tile, group, p0, count, b0, b1, scratch);
    case 3: return panel_tile<3>(c, tile, group, p0, count, b0, b1, scratch);
    case 4: return panel_tile<4>(c, tile, group, p0, count, b0, b1, scratch);
    case 5: return panel_tile<5>(c, tile, group, p0, count, b0, b1, scratch);
    case 6: return panel_tile<6>(c, tile, group, p0, count, b0, b1, scratch);
    case 7: return panel_tile<7>(c, tile, group, p0, count, b0, b1, scratch);
    case 8: return panel_tile<8>(c, tile, group, p0, count, b0, b1, scratch);
  }
}

}  // namespace
}  // namespace nmfx
