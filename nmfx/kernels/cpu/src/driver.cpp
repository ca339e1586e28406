// Cuts a call into pieces and runs them on torch's threads. An output element is computed by one
// thread, in an order that depends on the call alone, so results do not depend on the threads.
#include <unistd.h>

#include "kernel.h"
#include "scratch.h"

namespace nmfx {
namespace {

struct Job {
  const Call* call;
  const Isa* isa;
  Tile tile;
  void* x;  // prepared activations of the few-rows kernel
  int64_t units, units_per_tile;  // of the few-rows kernel
  int64_t tiles, positions_per_tile, ranges, blocks_per_range;
  bool failed;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// One is enough: a body that uses it never runs inside of another.
thread_local Scratch scratch;

// --- few rows ------------------------------------------------------------------------------------

bool takes_few(const Call& c, const Isa& isa) {
  if (!isa.few_tile || c.input.is_conv || !isa.has_few(c.weight.n, c.weight.m, c.weight.dtype))
    return false;
  const int* from = isa.panel_from[c.weight.dtype == DType::bf16];
  const int column = c.weight.m <= 4 ? 0 : c.weight.m <= 8 ? 1 : 2;
  const bool one = c.weight.n == 1 && c.weight.m <= 8 && from[3];
  return c.input.positions < from[one ? 3 : column];
}

void few_body(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  const Call& c = *job.call;
  for (int64_t i = begin; i < end;) {  // item i: tile i / blocks, block i % blocks
    int64_t tile = i / c.weight.blocks, b0 = i % c.weight.blocks;
    int64_t b1 = at_most(c.weight.blocks, b0 + end - i);
    int64_t u0 = tile * job.units_per_tile;
    int64_t u1 = at_most(job.units, u0 + job.units_per_tile);
    job.isa->few(c, job.x, u0, u1, b0, b1);
    i += b1 - b0;
  }
}

void few_input_body(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  job.isa->few_input(*job.call, job.x, begin, end);
}

bool run_few(const Call& c, const Isa& isa, ParallelFor parallel_for) {
  Job job = {};
  job.call = &c;
  job.isa = &isa;
  const int64_t positions = c.input.positions;
  job.units = isa.few_units ? isa.few_units(c) : positions;
  const int64_t unit = ceil_div(positions, job.units), most = isa.few_tile / unit;
  // Tiles of the same size, as near as can be; of single positions, in pairs of 16.
  job.units_per_tile = ceil_div(job.units, ceil_div(job.units, most));
  if (unit == 1) job.units_per_tile = ceil_div(job.units_per_tile, 32) * 32;
  job.x = scratch.floats(positions * (c.weight.columns + kFewRoom));
  if (!job.x) return false;
  int64_t work = c.weight.slots * kBlock * positions;  // of one block, in multiply-adds
  parallel_for(0, job.units, ceil_div(16, unit), few_input_body, &job);
  int64_t items = ceil_div(job.units, job.units_per_tile) * c.weight.blocks;
  parallel_for(0, items, ceil_div(32768, work + 1), few_body, &job);
  scratch.done();
  return true;
}

// --- panels --------------------------------------------------------------------------------------

// Bytes of a cache as the system reports them, or what a CPU of 2020 has.
int64_t cache_bytes(int level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const long found = sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return level == 1 ? 32 << 10 : 512 << 10;
}

const int64_t kFirstLevel = cache_bytes(1), kSecondLevel = cache_bytes(2);

// A panel leaves 16 KB of a first-level cache for weights and sums. Tried on an earlier form of the
// kernel and a busy machine (AMD EPYC, AVX2, 32 KB, 4096 x 4096, 128 rows, 2:4): 8, 12 and 24 KB
// were within the noise of 16, tiles of 2 vectors more than twice as slow as of 8. Intel Xeon
// (AVX-512, 48 KB and 2 MB, 4096 x 4096, 512 rows), panels of 16 KB and 128 KB of sums against 32
// KB and 512 KB, ms: 1:4 46.8 / 40.4, 1:8 29.6 / 22.8, 2:4 equal.
const int64_t kPanelBytes =
    kFirstLevel - (16 << 10) > (16 << 10) ? kFirstLevel - (16 << 10) : (16 << 10);
// Offsets and widened values of more slots would push the panel out.
constexpr int64_t kMostSlots = 128;
// Sums of a range of blocks stay in the second-level cache.
const int64_t kSumBytes = kSecondLevel / 4;

Tile choose_tile(const Call& c, const Isa& isa) {
  const Weight& w = c.weight;
  Tile tile;
  const int64_t fields = fields_per_word(w.m), vector_bytes = isa.lanes * 4;
  // A chunk has whole words of fields. Where few weights are kept those are many columns, and the
  // tile is made narrower until they fit: 1:16 as above, 8 vectors / 4 vectors: 16.0 / 13.2 ms.
  const int64_t least = fields * w.m / w.n * vector_bytes;
  int widest = isa.max_vectors;
  while (widest > 2 && widest * least > kFirstLevel) widest /= 2;
  // Tiles of the same width, as near as can be: a last one of a few positions is slow.
  const int64_t all = ceil_div(c.input.positions, isa.lanes);
  tile.vectors = int(ceil_div(all, ceil_div(all, widest)));
  int64_t columns = kPanelBytes / (tile.vectors * vector_bytes);
  int64_t slots = columns * w.n / w.m / fields * fields;
  slots = at_most(slots, kMostSlots / fields * fields);
  tile.chunk_slots = slots < fields ? fields : slots;
  return tile;
}

void panel_body(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  const Call& c = *job.call;
  int64_t floats = job.isa->panel_scratch(c, job.tile, job.blocks_per_range);
  float* memory = scratch.floats(floats);
  if (!memory) {
    job.failed = true;
    return;
  }
  for (int64_t i = begin; i < end; i++) {
    // Neighbouring items share their weights: item = (group, range of blocks, tile).
    int64_t tile = i % job.tiles, range = i / job.tiles % job.ranges;
    int64_t group = i / job.tiles / job.ranges;
    int64_t p0 = tile * job.positions_per_tile, b0 = range * job.blocks_per_range;
    int64_t count = at_most(job.positions_per_tile, c.input.positions - p0);
    int64_t b1 = at_most(c.weight.blocks, b0 + job.blocks_per_range);
    Tile cut = job.tile;  // the last tile may be narrower
    cut.vectors = int(ceil_div(count, job.isa->lanes));
    job.isa->panel(c, cut, group, p0, count, b0, b1, memory);
  }
  scratch.done();
}

// Filling one element of a panel costs about as much as this many multiply-adds with it. That is a
// guess: copying rows costs less, gathering the pixels of a padded or strided convolution more.
constexpr int64_t kFill = 16;

// Each range of blocks fills its own panels, so there are no more ranges than it takes to give all
// threads the same number of items, or about that: torch hands out items beforehand. Four ranges a
// thread had cost 512->512 3x3 on 7x7 pixels, two threads, AMD EPYC (Zen 3): 2.09 ms at 2:4 and
// 0.97 at 1:16, against 1.47 and 0.42 with one.
int64_t blocks_per_range(const Call& c, const Job& job, int threads) {
  const Weight& w = c.weight;
  const int64_t most = at_most(kSumBytes / (job.positions_per_tile * kBlock * 4), w.blocks);
  const int64_t others = job.tiles * w.groups;
  int64_t best = most, least = 0;
  for (int64_t ranges = ceil_div(w.blocks, most); ranges <= w.blocks; ranges++) {
    const int64_t blocks = ceil_div(w.blocks, ranges);
    const int64_t items = ceil_div(ceil_div(w.blocks, blocks) * others, threads);  // of a thread
    const int64_t cost = items * (blocks * kBlock * w.n / w.m + kFill);
    if (least == 0 || cost < least) best = blocks, least = cost;
    if (ranges * others >= 4 * threads) break;  // as even as it needs to be
  }
  return best;
}

bool run_panel(const Call& c, const Isa& isa, int threads, ParallelFor parallel_for) {
  Job job = {};
  job.call = &c;
  job.isa = &isa;
  job.tile = choose_tile(c, isa);
  job.positions_per_tile = int64_t(job.tile.vectors) * isa.lanes;
  job.tiles = ceil_div(c.input.positions, job.positions_per_tile);
  job.blocks_per_range = blocks_per_range(c, job, threads);
  job.ranges = ceil_div(c.weight.blocks, job.blocks_per_range);
  int64_t work = job.blocks_per_range * c.weight.slots * kBlock * job.positions_per_tile;
  int64_t items = job.tiles * c.weight.groups * job.ranges;
  parallel_for(0, items, ceil_div(65536, work + 1), panel_body, &job);
  return !job.failed;
}

}  // namespace

bool run(const Call& c, const Isa& isa, int threads, ParallelFor parallel_for) {
  if (c.input.positions == 0 || c.weight.out == 0) return true;
  if (takes_few(c, isa)) return run_few(c, isa, parallel_for);
  return run_panel(c, isa, threads, parallel_for);
}

}  // namespace nmfx
