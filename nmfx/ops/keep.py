"""keep: a fixed mask on a weight, as one node in a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .sharded import is_sharded, on_parts


def keep(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` where `mask` is True, +0.0 elsewhere; pruned weights get a zero gradient, no decay.

    Args:
        weight: any float dtype and shape.
        mask: bool, same shape, True = kept; for a DTensor the whole mask, on every rank.

    Returns:
        A new tensor of the shape and dtype of `weight`.
    """
    if has_torch_function_unary(weight):  # fx proxies record this call as one node
        return handle_torch_function(keep, (weight,), weight, mask)
    if is_sharded(weight):
        return on_parts(keep, 1, 0, weight, mask)
    return torch.where(mask.to(weight.device), weight, 0.0)


def project_kept(weight: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`keep` without autograd: on the CPU one pass of the native kernels, else `torch.where`.

    Args:
        dtype: of the result: that of the weight, or a narrower one to which kept float32 values
            are rounded in the same pass.
    """
    return torch.ops.nmfx.keep_project.default(weight, mask, dtype)


def keep_(grad: Tensor, mask: Tensor) -> None:
    """Sets `grad` to +0.0 in place where `mask` is False; no autograd."""
    torch.ops.nmfx.keep_.default(grad, mask)


def _project(weight: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    out = torch.where(mask.to(weight.device), weight, 0.0)
    return out if dtype is None else out.to(dtype)


def _keep_(grad: Tensor, mask: Tensor) -> None:
    grad.masked_fill_(mask.to(grad.device).logical_not(), 0.0)


_library = torch.library.Library("nmfx", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "keep_project(Tensor weight, Tensor mask, ScalarType? dtype=None) -> Tensor", tags=_tags
)
_library.define("keep_(Tensor(a!) grad, Tensor mask) -> ()", tags=_tags)
_library.impl("keep_project", _project, "CompositeExplicitAutograd")
_library.impl("keep_", _keep_, "CompositeExplicitAutograd")
torch.library.register_fake(
    "nmfx::keep_project",
    lambda weight, mask, dtype=None: torch.empty_like(weight, dtype=dtype),
    lib=_library,
)
torch.library.register_fake("nmfx::keep_", lambda *_: None, lib=_library)

keep.__module__ = "nmfx"  # generated code reads `nmfx_keep(...)`
