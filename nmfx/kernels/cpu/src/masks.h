// N:M masks of a weight, applied in one pass: what the instruction-set files offer and what the
// binding asks of them. nmfx/mask.py defines the masks.
//
//   project   out = w where kept, else +0                       read w, write out
//   gradient  out = g where kept, else g + lambda * w           read g and w, write out
//
// Work goes through the first-level cache in pieces: first the mask of a piece, all bits of an
// element set where it is kept (mask_groups.h), then what is done with it (mask_apply.h). So the
// kinds of groups and the kinds of results do not multiply. A mask that is fixed is read instead.
#pragma once
#include "kernel.h"

namespace nmfx {

// A dense weight is memory of (outer, columns, inner) elements, groups of m along the columns:
// inner is the stride of the grouped dimension, in whatever order the other dimensions lie.
struct MaskCall {
  const void* weight;
  const void* grad;  // null: project
  const bool* kept;  // null: the mask is found; else it is this, one byte per element
  void* out;         // may be `weight` or `grad`
  DType weight_type;
  DType other_type;  // of `out` when projecting, of `grad` otherwise
  int n, m;
  int64_t outer, columns, inner;
  double lambda;
};

struct MaskKernels {
  // How many items a call is cut into, and about how many elements an item has.
  int64_t (*items)(const MaskCall&, int64_t* elements);
  void (*run)(const MaskCall&, int64_t begin, int64_t end);
};

extern const MaskKernels masks_portable;
#if defined(__x86_64__)
extern const MaskKernels masks_avx2;
extern const MaskKernels masks_avx512;
#endif

}  // namespace nmfx
