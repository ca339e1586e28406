"""linear_prepacked: a dense linear whose weight is also kept in oneDNN's blocked layout.

Measured in milliseconds, float32, 2 cores of an AMD EPYC (AVX2), torch 2.13, weights from DRAM:

    weight       rows   eager   oneDNN, kept layout   MKL, kept layout
    1024x1024       1    0.30                  0.32               0.33
    1024x1024       8    0.73                  0.44               0.77
    1024x1024     128    2.67                  2.30               2.70
    4096x4096       1    3.13                  2.50               3.14
    4096x4096       8   11.5                   4.6               13.1
    4096x4096     128   40.7                  36.0               41.8

So MKL's packed weights (torch.ops.mkl._mkl_linear) are no candidate. Telling oneDNN the number of
rows in advance gained nothing measurable either, and would tie the copy to one batch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight_copy import WeightCopy, serves


def linear_prepacked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: WeightCopy,
    transposed: bool = False,
) -> Tensor:
    """`torch.nn.functional.linear`, through the blocked copy of `weight` where that is possible.

    Whatever the copy does not serve, see `serves`, runs the plain operator.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features), or (in_features, out_features) if `transposed`.
        bias: (out_features,) or None.
        copy: where the copy is kept; one for each weight.
        transposed: whether this stands for `torch.addmm(bias, input, weight)`.

    Returns:
        (..., out_features), a new tensor.
    """
    if not (serves(input, weight, bias) and input.ndim > 1 and weight.is_contiguous()):
        if transposed:
            return torch.addmm(bias, input, weight)  # type: ignore[arg-type]  # it has a bias
        return F.linear(input, weight, bias)
    blocked = copy.of(weight, None, lambda: _reorder(weight.t() if transposed else weight))
    return torch.ops.mkldnn._linear_pointwise(input, blocked, bias, "none", [], "")


linear_prepacked.__module__ = "nmfx"  # generated code reads `nmfx_linear_prepacked(...)`


def _reorder(rows: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(rows.detach().contiguous())
