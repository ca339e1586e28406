"""nmfx's ops for CUDA tensors: Triton kernels, or plain torch without them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import triton, triton_packed
from .conv_nm import output_shape, unpacked_conv
from .linear_nm import _check, unpacked_linear
from .packed import ACTIVATIONS, ON_GPU
from .pictures import memory_format, patches
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


def linear(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    *pattern: Any,
) -> Tensor:
    """nmfx::linear_nm. Many rows are a dense product: with the weight unpacked at every call."""
    call = input, values, index, bias, out_features, in_features, *pattern
    if triton_packed.why_not(values, pattern[1]):
        return unpacked_linear(*call)
    _check(*call)
    n, m, activation = pattern
    if input.numel() // max(1, in_features) > triton_packed.most_rows(values, n, m):
        weight = triton_packed.unpack(values, index, out_features, in_features, n, m)
        return ACTIVATIONS[activation](F.linear(input, weight, bias))
    flat = input.reshape(-1, in_features)
    y = triton_packed.linear(flat, values, index, bias, out_features, *pattern)
    return y.view(*input.shape[:-1], out_features)


def conv(input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """nmfx::conv_nm: a packed product of patches, which are the rows; of many, as `linear`."""
    outputs, kernel_size, stride, padding, dilation, groups, n, m, activation = rest
    if groups > 1 or triton_packed.why_not(values, m):
        return unpacked_conv(input, values, index, bias, *rest)
    batch, _, height, width = output_shape(input, values, index, bias, *rest)
    rows, channels = batch * height * width, input.shape[1]
    columns = channels * kernel_size[0] * kernel_size[1]
    if rows > triton_packed.most_rows(values, n, m):
        weight = triton_packed.unpack(values, index, outputs, columns, n, m)
        weight = weight.view(outputs, *kernel_size, channels).movedim(-1, 1)
        out = ACTIVATIONS[activation](F.conv2d(input, weight, bias, stride, padding, dilation))
    else:
        flat = patches(input, kernel_size, stride, padding, dilation).reshape(rows, columns)
        y = triton_packed.linear(flat, values, index, bias, outputs, n, m, activation)
        out = y.view(batch, height, width, outputs).movedim(-1, 1)
    return out.contiguous(memory_format=memory_format(input))


_library = torch.library.Library("nmfx", "IMPL")
_library.impl("conv_nm", conv, "CUDA")
_library.impl("linear_nm", linear, "CUDA")
ON_GPU[torch.ops.nmfx.linear_nm.default] = linear
_library.impl("sr_ste", forward, "CUDA")
_library.impl("sr_ste_project", project, "CUDA")
_library.impl("sr_ste_backward", backward, "CUDA")
_library.impl("sr_ste_gradient", backward, "CUDA")
_library.impl("sr_ste_decay_", decay_, "CUDA")
