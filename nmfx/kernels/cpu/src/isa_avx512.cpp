// AVX-512 without a bf16 dot product: bf16 weights are widened to floats.
#include "masks.h"
#include "isa_avx512.h"

namespace nmfx {

// Crossings: Intel Xeon (AVX-512), 4096 x 4096 from memory, one thread, few / panel in ms: 2:4 at
// 32 rows 5.3 / 6.3, at 48 rows 7.7 / 7.5, at 64 rows 10.3 / 9.2; 1:4 at 48 rows 4.3 / 3.9; 1:16 at
// 48 rows 1.31 / 1.44, at 64 rows 1.87 / 1.53. Of one Xeon; no AMD CPU with AVX-512 was at hand.
const Isa isa_avx512 = {"avx512",
                        V::kLanes,
                        8,
                        V::kRows,
                        kFewTile,
                        false,
                        {{33, 33, 33}, {33, 33, 33}},
                        has_few,
                        few,
                        few_input,
                        panel,
                        panel_scratch, &masks_avx512};

}  // namespace nmfx
