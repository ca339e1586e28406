// Large blocks of memory for results, kept for the next result of about the size.
//
// What malloc returns for more than 32 MB is fresh from the operating system, which clears it page
// by page: that costs more than writing the result does (benchmarks/results/mask_*.md).
// A tensor made of such a block is like any other; when its last reference goes, the block comes
// back, whichever thread that happens in.
#pragma once
#include <cstdint>

namespace nmfx {

// Blocks of fewer bytes are malloc's business.
constexpr int64_t kPooled = 1 << 20;

// A block of at least that many bytes, aligned to 2 MB; null if memory ran out.
void* pool_take(int64_t bytes);
// Gives a block back. At most twice the size of the largest block ever taken is kept; the rest goes
// to the operating system.
void pool_give(void* block);
// Gives everything that is kept to the operating system; returns how many bytes.
int64_t pool_clear();

}  // namespace nmfx
