"""keep: a fixed mask on a weight, as one node in a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def keep(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` where `mask` is True, +0.0 elsewhere; pruned weights get a zero gradient, no decay.

    Args:
        weight: any float dtype and shape.
        mask: bool, same shape, True = kept.

    Returns:
        A new tensor of the shape and dtype of `weight`.
    """
    if has_torch_function_unary(weight):  # fx proxies record this call as one node
        return handle_torch_function(keep, (weight,), weight, mask)
    return torch.where(mask.to(weight.device), weight, 0.0)


keep.__module__ = "nmfx"  # generated code reads `nmfx_keep(...)`
