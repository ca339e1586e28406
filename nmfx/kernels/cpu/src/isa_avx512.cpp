// AVX-512 without a bf16 dot product: bf16 weights are widened to floats.
#include "isa_avx512.h"

namespace nmfx {

// Crossings: a guess, as no CPU at hand has AVX-512; a permutation costs one instruction for every
// M there, so few rows stay ahead longer than with AVX2.
const Isa isa_avx512 = {"avx512", V::kLanes, 8,         V::kRows, kFewTile, false, {{17, 17, 17}, {17, 17, 17}},
                        has_few,  few,       few_input, panel,    panel_scratch};

}  // namespace nmfx
