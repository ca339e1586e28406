#include "pool.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nmfx {
namespace {

constexpr size_t kHugePage = 2 << 20;

struct Pool {
  std::mutex mutex;
  std::multimap<int64_t, void*> kept;          // size -> block
  std::unordered_map<void*, int64_t> in_use;   // block -> size
  int64_t kept_bytes = 0, largest = 0;
};

// Never destroyed: tensors may outlive every other static object.
Pool& pool() {
  static Pool* pool = new Pool;
  return *pool;
}

void* fresh(int64_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, kHugePage, size_t(bytes))) return nullptr;
#if defined(MADV_HUGEPAGE)
  madvise(block, size_t(bytes), MADV_HUGEPAGE);  // fewer faults; refused, it is as before
#endif
  return block;
}

}  // namespace

void* pool_take(int64_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.largest = bytes > p.largest ? bytes : p.largest;
  auto found = p.kept.lower_bound(bytes);  // the smallest that is large enough
  if (found != p.kept.end() && found->first <= 2 * bytes) {
    void* block = found->second;
    p.kept_bytes -= found->first;
    p.in_use[block] = found->first;
    p.kept.erase(found);
    return block;
  }
  void* block = fresh(bytes);
  if (block) p.in_use[block] = bytes;
  return block;
}

void pool_give(void* block) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  auto found = p.in_use.find(block);
  p.kept.emplace(found->second, block);
  p.kept_bytes += found->second;
  p.in_use.erase(found);
  while (p.kept_bytes > 2 * p.largest) {  // the smallest first: they are the cheapest to replace
    p.kept_bytes -= p.kept.begin()->first;
    free(p.kept.begin()->second);
    p.kept.erase(p.kept.begin());
  }
}

int64_t pool_clear() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const int64_t bytes = p.kept_bytes;
  for (auto& entry : p.kept) free(entry.second);
  p.kept.clear();
  p.kept_bytes = 0;
  return bytes;
}

}  // namespace nmfx
