"""Rounding a weight to fewer bits without changing which weights its mask keeps.

FSDP2 with `MixedPrecisionPolicy(param_dtype=torch.bfloat16)` rounds each shard of the float32
weights before it gathers them. Weights that differ in float32 may be equal in bfloat16, and the
lower index would win:

    float32     1.000   1.001   0.2   2.0     keeps 1.001 and 2.0
    bfloat16    1.0     1.0     0.2   2.0     would keep the first
    in order    0.996   1.0     0.2   2.0     keeps what float32 keeps

Kept weights are rounded as ever. A pruned one that became as large as a kept one of its group is
made smaller by one unit in the last place: no forward reads it, only the decay does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..mask import as_bits, magnitude
from .sr_ste import project


def round_in_order(weight: Tensor, control: Tensor, m: int, dim: int, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)` with the N:M mask of `weight`.

    Where kept weights round to zero, the masks may differ in what is zero either way.

    Args:
        weight: float32 or float64, with whole groups.
        control, m, dim: as in `nmfx.sr_ste`.
        dtype: bfloat16 or float16.

    Returns:
        A new tensor of `dtype`.
    """
    rounded = weight.to(dtype)
    # By bits, as denormals may count as zero. A kept zero may pass for a pruned one: all that its
    # group prunes is zero too, and stays.
    kept = as_bits(project(weight, control, m, dim)) != 0
    size = magnitude(rounded)
    none = torch.iinfo(size.dtype).max
    least = torch.where(kept, size, none).unflatten(dim, (-1, m)).amin(dim + 1, keepdim=True)
    least = least.expand_as(size.unflatten(dim, (-1, m))).flatten(dim, dim + 1)
    # All NaNs are equal, and by index alone before and after.
    tied = ~kept & (size == least) & (size > 0) & ~rounded.isnan()
    return (as_bits(rounded) - tied.to(size.dtype)).view(dtype)
