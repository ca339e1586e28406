// AMX, for bf16 weights and more than a few rows; the rest is as in AVX-512 with bf16.
//
// A tile instruction multiplies 16 rows of 32 activations with 32 x 16 weights, zeros included, at
// sixteen times the rate of a dot product. So what pays here is not skipping zeros but reading
// fewer bytes: packed weights are expanded into the first-level cache while tiles of the weights
// before them are at work.
//
//   packed   slot s  v0 .. v15   (one output row a lane)       values and fields of N:M
//   tile     row j   c0 c0' c1 c1' .. c15 c15'                 columns 2j and 2j + 1 of 16 rows
//   sums     [16 rows of activations][16 output rows] += activations [16][32] * tile
//
// A zero times an infinite activation is NaN, where the other kernels skip the zero. Rows with
// activations that are not finite are therefore computed again, one by one.
#include "epilogue.h"
#include "isa_avx512.h"

namespace nmfx {
namespace {

constexpr int kColumns = 32;         // of a tile of activations: 64 bytes
constexpr int kTile = 16 * kColumns;  // elements of a tile
// What stays in the caches while up to 256 rows pass. Intel Xeon (AMX; 48 KB, 2 MB), one thread,
// ms:
//
// near   all activations in the second-level cache, chunks of 16 KB of expanded weights, against 32
//        KB: 4096 x 4096 from memory, 128 rows, 2:4 2.5 / 2.9, 1:4 2.2 / 2.5, 1:16 equal
// far    a chunk of columns passes over a range of blocks whose sums lie in the second-level cache;
//        chunks of 32 KB, to read sums less often, against near with 128 rows at a time: 512
//        rows, 2:4 10.2 / 11.8, 1:4 8.8 / 9.4, 1:16 equal; 128 rows of 4096 x 11008, where 64 at a
//        time expanded all weights twice, 7.9 / 14.6. With 512 rows at a time 2:4 takes 10.6.
constexpr int kChunk = 16;           // tiles along the columns, of two blocks
constexpr int kMostRows = 256;       // positions of a call, a multiple of two tiles
constexpr int64_t kNear = 1 << 20;   // bytes of activations
constexpr int64_t kSums = 128 << 10;  // floats, on the stack

// --- from slots to tiles -------------------------------------------------------------------------

inline __m512i halves(int low, int high) {
  return _mm512_set1_epi32(int(uint32_t(high) << 16 | uint32_t(low & 0xffff)));
}

// Both halves of each lane become its low or its high half.
inline __m512i both_low(__m512i v) {
  return _mm512_or_si512(_mm512_slli_epi32(v, 16), _mm512_and_si512(v, halves(-1, 0)));
}
inline __m512i both_high(__m512i v) {
  return _mm512_or_si512(_mm512_srli_epi32(v, 16), _mm512_and_si512(v, halves(0, 0xffff)));
}

// A group of one slot: its value goes to the column its field names, the rest is zero.
template <int PAIRS>
inline __attribute__((always_inline)) void place(__m512i value, __m512i at, uint16_t* out) {
  NMFX_UNROLL for (int j = 0; j < PAIRS; j++)
    _mm512_store_si512(out + j * 2 * kBlock,
                       _mm512_maskz_mov_epi16(
                           _mm512_cmpeq_epi16_mask(at, halves(2 * j, 2 * j + 1)), value));
}

// Where the slots of one tile of a block lie.
template <int N, int M>
struct Slots {
  static constexpr int kBits = field_bits(M), kFields = fields_per_word(M);
  static constexpr int kSlots = kColumns / M * N;
  static constexpr int kWords = kSlots > kFields ? kSlots / kFields : 1;

  const uint16_t* values;
  const uint32_t* index;
  int shift;  // of the first field in its half of the first word

  Slots(const uint16_t* block_values, const uint32_t* block_index, int64_t tile)
      : values(block_values + tile * kSlots * kBlock),
        index(block_index + tile * kSlots / kFields * kBlock),
        shift(kBits * int(tile * kSlots % kFields) / 2) {}
};

// With AHEAD, asks for the slots at `ahead` meanwhile.
template <int N, int M, bool AHEAD>
inline __attribute__((always_inline)) void expand(const Slots<N, M>& from, const Slots<N, M>& ahead,
                                                  uint16_t* out) {
  using S = Slots<N, M>;
  constexpr int kPairs = M / 2;  // of columns of a group
  static_assert(N % 2 == 0 || N == 1, "two neighbouring slots are of one group or of two");
  alignas(64) static constexpr uint16_t kOrder[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder), keep = halves(M - 1, M - 1);
  const __m128i shift = _mm_cvtsi32_si128(from.shift);
  if (AHEAD) __builtin_prefetch(ahead.index);
  __m512i group[kPairs];
  NMFX_UNROLL for (int slot = 0; slot < S::kSlots; slot += 2) {
    const uint16_t* values = from.values + slot * kBlock;
    if (AHEAD) __builtin_prefetch(ahead.values + slot * kBlock);
    const __m512i pair = _mm512_permutexvar_epi16(
        order, _mm512_loadu_si512(reinterpret_cast<const void*>(values)));
    __m512i at = V::load_index(from.index + slot / S::kFields * kBlock);
    if (S::kSlots < S::kFields) at = _mm512_srl_epi32(at, shift);
    constexpr int kBits = S::kBits;
    at = _mm512_and_si512(_mm512_srli_epi32(at, unsigned(kBits * (slot % S::kFields) / 2)), keep);
    if constexpr (N % 2 == 0) {
      // Slot n of a group is at column n or later, and leaves room for the N - 1 - n after it.
      const int n = slot % N, first = n / 2, last = (M - N + n + 1) / 2;
      const __m512i crossed = _mm512_rol_epi32(pair, 16), at_crossed = _mm512_rol_epi32(at, 16);
      NMFX_UNROLL for (int j = 0; j < kPairs; j++) {
        if (n == 0) group[j] = _mm512_setzero_si512();
        if (j < first || j > last) continue;
        const __m512i here = halves(2 * j, 2 * j + 1);
        const __mmask32 is_pair = _mm512_cmpeq_epi16_mask(at, here);
        const __mmask32 is_crossed = _mm512_cmpeq_epi16_mask(at_crossed, here);
        group[j] = _mm512_mask_mov_epi16(group[j], is_pair, pair);
        group[j] = _mm512_mask_mov_epi16(group[j], is_crossed, crossed);
      }
      if (n == N - 2)
        NMFX_UNROLL for (int j = 0; j < kPairs; j++)
          _mm512_store_si512(out + (slot / N * kPairs + j) * 2 * kBlock, group[j]);
    } else {
      place<kPairs>(both_low(pair), both_low(at), out + slot * kPairs * 2 * kBlock);
      place<kPairs>(both_high(pair), both_high(at), out + (slot + 1) * kPairs * 2 * kBlock);
    }
  }
}

// The last tile of a block whose columns end within it.
template <int N, int M>
void expand_part(const Slots<N, M>& from, int64_t slots, uint16_t* out) {
  using S = Slots<N, M>;
  uint16_t values[S::kSlots * kBlock] = {};
  uint32_t index[S::kWords * kBlock] = {};
  memcpy(values, from.values, size_t(slots) * kBlock * 2);
  const int64_t words = (slots + S::kFields - 1) / S::kFields;
  memcpy(index, from.index, size_t(words) * kBlock * 4);
  Slots<N, M> copy(values, index, 0);
  copy.shift = from.shift;
  expand<N, M, false>(copy, copy, out);
}

// --- from tiles to sums --------------------------------------------------------------------------

// Tile registers: 0 to 3 for sums, 4 and 5 for activations, 6 and 7 for weights. Up to 16 rows go
// with 4 blocks, so that few products share what it takes to load them; more rows in pairs of tiles
// with 2 blocks. Intel Xeon (AMX), activations over 1 MB, 32 KB of expanded weights, with loading
// and storing sums: 5.5 ns a product in pairs, 7.0 ns with 4 blocks (products alone: 4.4 ns).
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfig(int64_t positions) {
    for (int i = 0; i < 8; i++) bytes[i] = 64, rows[i] = uint8_t(i < 6 ? positions : 16);
  }
};

// GCC does not know that its tile loads read memory and its tile stores write it: it might move
// other loads and stores past them.
inline void memory_is_read() { asm volatile("" ::: "memory"); }

// The activations, rearranged in the order they are read: for each chunk of columns, for each tile
// of rows, for each tile of the chunk: [rows][32 columns]. After them, for each position, whether
// all of its activations are finite.
struct Rows {
  int64_t positions, columns;
  int64_t rows;   // of a tile: 16, or fewer when there are no more
  int64_t along;  // tiles of rows
  int64_t tiles;  // along the columns
  bool near;
  int64_t chunk;  // tiles of a chunk of columns: all where two tiles of rows are enough

  explicit Rows(const Call& c)
      : positions(c.input.positions), columns(c.weight.columns),
        rows(positions < 16 ? positions : 16), along((positions + rows - 1) / rows),
        tiles((columns + kColumns - 1) / kColumns),
        near(tiles * kColumns * 2 * (positions < kMostRows ? positions : kMostRows) <= kNear),
        chunk(positions <= 32 ? tiles : near ? kChunk / 2 : kChunk) {}

  int64_t end_of(int64_t k0) const { return k0 + chunk < tiles ? k0 + chunk : tiles; }
  // Where the first columns of the chunk that starts with tile k0 are, of position p.
  int64_t at(int64_t p, int64_t k0) const {
    return ((k0 * along + p / rows * (end_of(k0) - k0)) * rows + p % rows) * kColumns;
  }
  int64_t finite_at(int64_t p) const { return along * tiles * rows * kColumns + p; }
};

// Where each tile is expanded for one use, it asks for the tiles some way ahead of it.
struct Once {
  static constexpr bool kOnce = true;
  void step() {}
};

// Cache lines that are asked for a few at a time: all at once they would fill the queue to memory
// and then leave it empty.
struct Lines {
  const char* at = nullptr;
  int left = 0, per_step = 0;

  void start(const void* from, int64_t bytes, int64_t steps) {
    at = static_cast<const char*>(from);
    left = int(bytes / 64), per_step = int((left + steps - 1) / steps);
  }
  // Lines of so many streams, `gap` bytes apart.
  template <int STREAMS, int LEVEL>
  void step(int64_t gap) {
    for (int i = 0; i < per_step && left; i++, left--, at += 64)
      NMFX_UNROLL for (int b = 0; b < STREAMS; b++) __builtin_prefetch(at + b * gap, 0, 4 - LEVEL);
  }
};

// Where a chunk is used for many rows: the packed weights of the next one, and a part of the
// activations of the next chunk of columns.
template <int N, int M, int B>
struct Next {
  using S = Slots<N, M>;
  static constexpr bool kOnce = false;

  const Weight& w;
  Lines values, index, x;  // of the first block, but x

  explicit Next(const Weight& weight) : w(weight) {}

  void start(int64_t block, int64_t tile, int64_t chunk, int64_t steps) {
    const S from(static_cast<const uint16_t*>(w.values) + block * w.slots * kBlock,
                 w.index + block * w.words * kBlock, tile);
    values.start(from.values, chunk * S::kSlots * kBlock * 2, steps);
    index.start(from.index, chunk * S::kSlots * kBlock * 4 / S::kFields, steps);
  }
  void step() {
    x.template step<1, 2>(0);
    values.template step<B, 1>(w.slots * kBlock * 2);
    index.template step<B, 1>(w.words * kBlock * 4);
  }
};

template <int N, int M, int B>
struct Product {
  using S = Slots<N, M>;
  static constexpr int kTiles = B > 2 ? 4 : kChunk;  // of a block in the buffer
  static constexpr int64_t kRows = 16 * kBlock * B;  // from the sums of a tile of rows to the next

  const Weight& w;
  const Rows& rows;
  const uint16_t* x;
  uint16_t* buffer;  // [kTiles][B] expanded tiles

  // Adds the columns of tiles [k0, k1) of blocks [b, b + B) to the sums of R tiles of rows, from
  // position p on. With EXPAND these tiles are written to the buffer on the way, one ahead of the
  // products: a load waits for the stores to arrive.
  template <int R, bool EXPAND, class NEXT>
  void add(int64_t b, int64_t p, int64_t k0, int64_t k1, float* sums, NEXT& next) const {
    constexpr int kLate = EXPAND ? 1 : 0, kRing = NEXT::kOnce ? 4 : kTiles;
    const int64_t tile = rows.rows * kColumns;
    const uint16_t *x0 = x + rows.at(p, k0), *x1 = R > 1 ? x + rows.at(p + 16, k0) : nullptr;
    load<R>(sums, k0 == 0);
    for (int64_t k = k0; k < k1 + kLate; k++) {
      if (EXPAND && k < k1)
        for (int i = 0; i < B; i++)
          expand_tile<NEXT::kOnce>(b + i, k, buffer + ((k - k0) % kRing * B + i) * kTile);
      next.step();
      if (EXPAND) memory_is_read();
      if (k - kLate < k0) continue;
      multiply<R>(x0, x1, buffer + (k - kLate - k0) % kRing * B * kTile);
      x0 += tile, x1 += tile;
    }
    store<R>(sums);
  }

  S slots(int64_t block, int64_t k) const {
    return {static_cast<const uint16_t*>(w.values) + block * w.slots * kBlock,
            w.index + block * w.words * kBlock, k};
  }

  template <bool AHEAD>
  inline __attribute__((always_inline)) void expand_tile(int64_t block, int64_t k,
                                                         uint16_t* out) const {
    const S from = slots(block, k);
    const int64_t left = w.slots - k * S::kSlots;
    if (left < S::kSlots) return expand_part<N, M>(from, left, out);
    // Some way ahead in this block, or in the one that comes in its place: 16 rows of 3072 x 768,
    // against further on in memory, 2:4 .147 / .196 ms, 1:4 .111 / .144; of 4096 x 4096 .90 / .98,
    // .66 / .75. Past the end of the weight it is not touched.
    constexpr int kFit = 2048 / (S::kSlots * kBlock * 2), kAhead = kFit < 16 ? kFit : 16;  // tiles
    const int64_t next = k + kAhead - rows.tiles;
    if (AHEAD)
      expand<N, M, true>(from, next < 0 ? slots(block, k + kAhead) : slots(block + B, next), out);
    else
      expand<N, M, false>(from, from, out);
  }

  // Sums of row tile r and block b: register 2r + b, or b where there is one tile of rows.
  template <int R>
  static void load(const float* sums, bool first) {
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      return;
    }
    memory_is_read();
    _tile_loadd(0, sums, 64);
    if (B > 1) _tile_loadd(1, sums + 256, 64);
    if (B > 2) _tile_loadd(2, sums + 512, 64);
    if (B > 3) _tile_loadd(3, sums + 768, 64);
    if (R > 1) _tile_loadd(2, sums + kRows, 64);
    if (R > 1 && B > 1) _tile_loadd(3, sums + kRows + 256, 64);
  }
  template <int R>
  static void store(float* sums) {
    _tile_stored(0, sums, 64);
    if (B > 1) _tile_stored(1, sums + 256, 64);
    if (B > 2) _tile_stored(2, sums + 512, 64);
    if (B > 3) _tile_stored(3, sums + 768, 64);
    if (R > 1) _tile_stored(2, sums + kRows, 64);
    if (R > 1 && B > 1) _tile_stored(3, sums + kRows + 256, 64);
    memory_is_read();
  }
  // Activations are loaded as a stream: they must not push the expanded tiles out.
  template <int R>
  static inline __attribute__((always_inline)) void multiply(const uint16_t* x0, const uint16_t* x1,
                                                             const uint16_t* weights) {
    static_assert(R * B <= 4, "registers for sums");
    _tile_stream_loadd(4, x0, 64);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (B > 1) _tile_loadd(7, weights + kTile, 64);
    if (B > 1) _tile_dpbf16ps(1, 4, 7);
    if (R > 1) _tile_stream_loadd(5, x1, 64);
    if (R > 1) _tile_dpbf16ps(2, 5, 6);
    if (R > 1 && B > 1) _tile_dpbf16ps(3, 5, 7);
    if (B > 2) _tile_loadd(6, weights + 2 * kTile, 64);
    if (B > 2) _tile_dpbf16ps(2, 4, 6);
    if (B > 3) _tile_loadd(7, weights + 3 * kTile, 64);
    if (B > 3) _tile_dpbf16ps(3, 4, 7);
  }
};

// Sums of one position without tiles.
void add_exactly(const Call& c, int64_t p, int64_t block, float* sums) {
  const Weight& w = c.weight;
  const uint16_t* x = static_cast<const uint16_t*>(c.input.data) + p * c.input.row_stride;
  const uint16_t* values = static_cast<const uint16_t*>(w.values) + block * w.slots * kBlock;
  const uint32_t* index = w.index + block * w.words * kBlock;
  const int bits = field_bits(w.m), fields = fields_per_word(w.m);
  memset(sums, 0, kBlock * 4);
  for (int64_t s = 0; s < w.slots; s++)
    for (int lane = 0; lane < kBlock; lane++) {
      const uint32_t word = index[s / fields * kBlock + lane];
      // M is a power of two here. More bits of a corrupted field would name a column past the row.
      const int64_t field = word >> field_shift(int(s % fields), bits) & uint32_t(w.m - 1);
      sums[lane] += from_bf16(values[s * kBlock + lane]) * from_bf16(x[s / w.n * w.m + field]);
    }
}

// As `to_bf16`, sixteen at once.
inline __m256i rounded(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i half = _mm512_srli_epi32(up, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(half, is_nan, _mm512_set1_epi32(0x7fc0)));
}

// Sums [tile of rows][B][16][16], with bias and activation, become rows of the output.
template <int B>
void store_outputs(const Call& c, float* sums, int64_t p0, int64_t count, int64_t b) {
  const Weight& w = c.weight;
  const Output& out = c.output;
  __m512 bias[B];
  __mmask16 lanes[B];
  for (int i = 0; i < B; i++) {
    const int64_t o = (b + i) * kBlock, left = w.out - o < kBlock ? w.out - o : kBlock;
    float values[kBlock] = {};
    if (w.bias) to_floats(w.bias, o, left, w.dtype, values);
    bias[i] = _mm512_loadu_ps(values);
    lanes[i] = __mmask16((1u << left) - 1);
  }
  for (int64_t q = 0; q < count; q++) {
    uint16_t* to =
        static_cast<uint16_t*>(out.data) + (p0 + q) * out.step_position + b * kBlock;
    NMFX_UNROLL for (int i = 0; i < B; i++) {
      float* sum = sums + ((q / 16 * B + i) * 16 + q % 16) * kBlock;
      __m512 v = _mm512_load_ps(sum);
      if (w.bias) v = _mm512_add_ps(v, bias[i]);  // a sum of -0.0 stays one
      if (out.activation != Activation::none) {
        _mm512_store_ps(sum, v);
        activate(sum, kBlock, out.activation);
        v = _mm512_load_ps(sum);
      }
      _mm256_mask_storeu_epi16(to + i * kBlock, lanes[i], rounded(v));
    }
  }
}

// Blocks [b0, b1), a multiple of B, for positions [p0, p1).
template <int N, int M, int B>
void tile_blocks(const Call& c, const Rows& rows, const uint16_t* x, int64_t p0, int64_t p1,
                 int64_t b0, int64_t b1) {
  using P = Product<N, M, B>;
  constexpr int PAIR = B > 2 ? 1 : 2;  // tiles of rows in a pass
  alignas(64) uint16_t buffer[P::kTiles * B * kTile];
  alignas(64) float sums[B > 2 ? 16 * B * kBlock : kSums];  // [B blocks][tile of rows][B][16][16]
  const P product = {c.weight, rows, x, buffer};
  const int64_t count = (p1 - p0 + 15) / 16 * 16, of_blocks = count * B * kBlock;
  const auto sums_of = [&](int64_t b, int64_t q, int i) {
    return sums + b / B * of_blocks + ((q / 16 * B + i) * 16 + q % 16) * kBlock;
  };
  const int64_t range = rows.near || B > 2 ? B : kSums / of_blocks * B;
  for (int64_t r0 = b0, r1; r0 < b1; r0 = r1) {
    r1 = r0 + range < b1 ? r0 + range : b1;
    for (int64_t k0 = 0, k1; k0 < rows.tiles; k0 = k1) {
      k1 = rows.end_of(k0);
      const int64_t steps = (count + 16) / 32 * (k1 - k0);
      for (int64_t b = r0; b < r1; b += B) {
        const auto add = [&](auto& next) {
          const bool two = PAIR > 1 && count > 16;
          float* here = sums_of(b - r0, 0, 0);
          if (two)
            product.template add<PAIR, true>(b, p0, k0, k1, here, next);
          else
            product.template add<1, true>(b, p0, k0, k1, here, next);
          int64_t q = two ? 32 : 16;
          for (; q + 32 <= count; q += 32)
            product.template add<PAIR, false>(b, p0 + q, k0, k1, sums_of(b - r0, q, 0), next);
          if (q < count)
            product.template add<1, false>(b, p0 + q, k0, k1, sums_of(b - r0, q, 0), next);
        };
        if (rows.positions <= 32) {
          Once next;
          add(next);
          continue;
        }
        Next<N, M, B> next(c.weight);
        // The next blocks, or the first with the columns that follow these, or with the first.
        const bool last = b + B >= r1, end = k1 == rows.tiles;
        const int64_t n0 = end ? 0 : k1;
        next.start(!last ? b + B : end ? r1 : r0, last ? n0 : k0, rows.chunk, steps);
        if (range > B) {
          const int64_t lines = count * (rows.end_of(n0) - n0), parts = (r1 - r0) / B;
          const int64_t part = (b - r0) / B, from = lines * part / parts;
          next.x.start(x + rows.at(p0, n0) + from * kColumns,
                       (lines * (part + 1) / parts - from) * 64, steps);
        }
        add(next);
      }
    }
    for (int64_t b = r0; b < r1; b += B) {
      for (int64_t p = p0; p < p1; p++)
        if (!x[rows.finite_at(p)])
          for (int i = 0; i < B; i++) add_exactly(c, p, b + i, sums_of(b - r0, p - p0, i));
      store_outputs<B>(c, sums_of(b - r0, 0, 0), p0, p1 - p0, b);
    }
  }
}

template <int N, int M>
void tiles(const Call& c, const uint16_t* x, int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
  const Rows rows(c);
  const TileConfig config(rows.rows);
  _tile_loadconfig(&config);
  int64_t b = b0;
  const auto go_to = [&](auto kernel, int64_t end) {
    if (b < end) kernel(c, rows, x, p0, p1, b, end);
    b = end;
  };
  if (p1 - p0 <= 16) go_to(tile_blocks<N, M, 4>, b + (b1 - b) / 4 * 4);
  go_to(tile_blocks<N, M, 2>, b + (b1 - b) / 2 * 2);
  go_to(tile_blocks<N, M, 1>, b1);
  _tile_release();
}

using TileKernel = void (*)(const Call&, const uint16_t*, int64_t, int64_t, int64_t, int64_t);

TileKernel tile_kernel(int n, int m) {
  switch (n * 100 + m) {
    case 204: return tiles<2, 4>;
    case 104: return tiles<1, 4>;
    case 408: return tiles<4, 8>;
    case 208: return tiles<2, 8>;
    case 108: return tiles<1, 8>;
    case 116: return tiles<1, 16>;
    case 216: return tiles<2, 16>;
    case 416: return tiles<4, 16>;
    case 816: return tiles<8, 16>;
    default: return nullptr;
  }
}

// --- the choice ----------------------------------------------------------------------------------

// What a tile costs hardly depends on its rows, a product of vectors is done for each row and kept
// weight. Intel Xeon (AMX), 4096 x 4096 from memory, one thread, vectors / tiles in ms: 2:4 at 3
// rows .92 / .90, at 4 1.02 / .91; 1:4 at 6 rows .66 / .62, at 8 .78 / .63; 4:8 at 4 rows 1.06 /
// 1.02, at 6 1.29 / 1.04; 1:8 at 8 rows .41 / .51, at 12 .60 / .50; 1:16 at 12 rows .37 / .44. In
// 3072 x 768 tiles win a little later: 1:4 at 6 rows .097 / .107, 4:8 .194 / .203. 2:8 is as 1:4;
// 2:16, 4:16 and 8:16, with slower tiles than today's: at 8 rows .40 / .59, .72 / .85, 1.66 / 1.85,
// at 12 .73 / .61, 1.18 / .85, 2.22 / 1.66.
int tiles_from(int n, int m) {
  if (m <= 4) return n == 2 ? 4 : 7;
  if (m <= 8) return n == 1 ? 10 : 7;
  return n == 1 ? 13 : n == 8 ? 9 : 10;
}

bool takes_tiles(const Call& c) {
  const Weight& w = c.weight;
  return w.dtype == DType::bf16 && w.slots > 0 && c.input.positions >= tiles_from(w.n, w.m);
}

int64_t units(const Call& c) {
  return takes_tiles(c) ? c.input.positions : isa_avx512_bf16.few_units(c);
}

void few_or_tiles(const Call& c, const void* x, int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
  if (!takes_tiles(c)) return isa_avx512_bf16.few(c, x, p0, p1, b0, b1);
  tile_kernel(c.weight.n, c.weight.m)(c, static_cast<const uint16_t*>(x), p0, p1, b0, b1);
}

void input_for_tiles(const Call& c, void* x, int64_t p0, int64_t p1) {
  if (!takes_tiles(c)) return isa_avx512_bf16.few_input(c, x, p0, p1);
  const Rows rows(c);
  uint16_t* out = static_cast<uint16_t*>(x);
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  for (int64_t p = p0; p < p1; p++) {
    const uint16_t* row = static_cast<const uint16_t*>(c.input.data) + p * c.input.row_stride;
    __mmask32 infinite = 0;
    for (int64_t k0 = 0, k1; k0 < rows.tiles; k0 = k1) {
      k1 = rows.end_of(k0);
      uint16_t* to = out + rows.at(p, k0);
      for (int64_t k = k0; k < k1; k++, to += rows.rows * kColumns) {
        const int64_t left = rows.columns - k * kColumns;
        const __mmask32 there = left >= kColumns ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
        const __m512i part = _mm512_maskz_loadu_epi16(there, row + k * kColumns);
        infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(part, exponent), exponent);
        _mm512_storeu_si512(static_cast<void*>(to), part);
      }
    }
    out[rows.finite_at(p)] = infinite == 0;
  }
}

}  // namespace

// bf16 never goes to panels: tiles or vectors serve any number of rows.
const Isa isa_amx_bf16 =
    avx512_table("amx_bf16", kMostRows, 41, 1 << 30, units, few_or_tiles, input_for_tiles);

}  // namespace nmfx
