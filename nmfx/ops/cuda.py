"""nmfx::sr_ste and its gradients for CUDA tensors: Triton kernels, or plain torch without them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import triton
from .sr_ste import _backward_eager, _decay_eager, _project_eager


def project(
    weight: Tensor, control: Tensor, m: int, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    """nmfx::sr_ste_project."""
    if triton.why_not(weight, m):
        return _project_eager(weight, control, m, dim, dtype)
    return triton.project(weight, control, m, dim, dtype)


def forward(
    weight: Tensor, control: Tensor, m: int, dim: int, abi: int, dtype: torch.dtype | None = None
) -> Tensor:
    """nmfx::sr_ste."""
    return project(weight, control, m, dim, dtype)


def backward(grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int, abi: int) -> Tensor:
    """nmfx::sr_ste_backward and sr_ste_gradient."""
    if triton.why_not(weight, m):
        return _backward_eager(grad, weight, control, m, dim, abi)
    return triton.gradient(grad, weight, control, m, dim)


def decay_(grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int, abi: int) -> None:
    """nmfx::sr_ste_decay_."""
    if triton.why_not(weight, m):
        return _decay_eager(grad, weight, control, m, dim, abi)
    return triton.decay_(grad, weight, control, m, dim)


_library = torch.library.Library("nmfx", "IMPL")
_library.impl("sr_ste", forward, "CUDA")
_library.impl("sr_ste_project", project, "CUDA")
_library.impl("sr_ste_backward", backward, "CUDA")
_library.impl("sr_ste_gradient", backward, "CUDA")
_library.impl("sr_ste_decay_", decay_, "CUDA")
