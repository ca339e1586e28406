"""nmfx::conv_nm: a convolution whose weight is packed, columns in the order (ky, kx, channel).

On CPU tensors the native kernel runs (`nmfx.kernels.cpu`), on CUDA tensors `nmfx.ops.cuda.conv`.
The kernel here is the reference for all other devices, and for a CPU without the library: it
unpacks the weight and convolves dense. Gradients flow to the input and the bias; the packed weight
is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import NMError
from ..packing import unpack_conv
from ..pattern import Pattern
from .packed import (
    ACTIVATIONS,
    activation_grad,
    autocast_all,
    check_packed_call,
    is_autocast,
    run_op,
)
from .pictures import as_pictures, memory_format, output_size

_library = torch.library.Library("nmfx", "FRAGMENT")
_library.define(
    "conv_nm(Tensor input, Tensor values, Tensor index, Tensor? bias, int out_channels, "
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, int n, int m, "
    "str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_op = torch.ops.nmfx.conv_nm.default


def conv_nm(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    weight_shape: Sequence[int],
    n: int,
    m: int,
    activation: str = "none",
) -> Tensor:
    """conv1d or conv2d with a packed weight; autocast and layouts as for torch's.

    Args:
        input: (batch, channels, *size) or (channels, *size), the dtype of `values`.
        values, index: the packed weight, see `nmfx.packing.pack_conv`.
        bias: (out_channels,) or None.
        stride, padding, dilation, groups: as for `torch.nn.functional.conv2d`.
        weight_shape: of the dense weight, (out_channels, channels / groups, *kernel_size).
        n, m: the pattern.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", applied to the result.

    Returns:
        A new tensor, channels-last where the input is.

    Raises:
        NMError: shapes, dtypes or devices that do not fit, or a packed weight that requires a
            gradient.
    """
    tensors = (input, values, index, bias)
    constants: tuple[Any, ...] = (stride, padding, dilation, groups, weight_shape, n, m, activation)
    if has_torch_function(tensors):  # fx proxies record this call as one node
        return handle_torch_function(conv_nm, tensors, *tensors, *constants)
    if is_autocast(input):
        input, values, bias = autocast_all(input, values, bias)
    p = as_pictures(input, weight_shape, stride, padding, dilation, "conv_nm")
    arguments = (
        *(p.x, values, index, bias, weight_shape[0]),
        *(p.kernel_size, p.stride, p.padding, p.dilation, groups, n, m, activation),
    )
    try:
        return p.restored(run_op(_op, unpacked_conv, p.x, values, bias, *arguments))
    except RuntimeError:
        # The native kernel only says that something does not fit. Here it is found out what.
        output_shape(*arguments)
        raise


conv_nm.__module__ = "nmfx"  # generated code reads `nmfx_conv_nm(...)`


def output_shape(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    n: int,
    m: int,
    activation: str,
) -> list[int]:
    """The shape of the result.

    Raises:
        NMError: arguments that do not fit.
    """
    if input.ndim != 4:
        raise NMError(f"nmfx::conv_nm takes (batch, channels, y, x), got {tuple(input.shape)}")
    channels = input.shape[1]
    if groups < 1 or channels % groups or out_channels % groups:
        raise NMError(f"{channels} and {out_channels} channels do not divide by groups={groups}")
    size = output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    columns = kernel_size[0] * kernel_size[1] * (channels // groups)
    check_packed_call(
        input,
        values,
        index,
        bias,
        out_channels // groups,
        columns,
        Pattern(n, m),
        activation,
        groups,
    )
    return [input.shape[0], out_channels, *size]


def _dense(
    values: Tensor,
    index: Tensor,
    channels: int,
    out_channels: int,
    kernel_size: list[int],
    groups: int,
    n: int,
    m: int,
) -> Tensor:
    shape = (out_channels, channels // groups, *kernel_size)
    return unpack_conv(values, index, shape, groups, Pattern(n, m))


def unpacked_conv(
    input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor:
    """The reference of `nmfx::conv_nm`: arguments and result are the operator's."""
    output_shape(input, values, index, bias, *rest)
    out_channels, kernel_size, stride, padding, dilation, groups, n, m, activation = rest
    weight = _dense(values, index, input.shape[1], out_channels, kernel_size, groups, n, m)
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[activation](out).contiguous(memory_format=memory_format(input))


def _fake(input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    shape = output_shape(input, values, index, bias, *rest)
    empty = torch.empty(shape, dtype=input.dtype, device=input.device)
    return empty.to(memory_format=memory_format(input))


_library.impl("conv_nm", unpacked_conv, "CompositeExplicitAutograd")
torch.library.register_fake("nmfx::conv_nm", _fake, lib=_library)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, index, bias, *ctx.constants = inputs
    if values.requires_grad:
        raise NMError(
            "a packed weight has no gradient: train the sparsified model and lower it again, or "
            "freeze it with values.requires_grad_(False)"
        )
    ctx.shape = input.shape
    # Without an activation the gradient does not depend on the input.
    again = (input, bias) if ctx.constants[-1] != "none" else (None, None)
    ctx.save_for_backward(values, index, *again)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, index, input, bias = ctx.saved_tensors
    out_channels, kernel_size, stride, padding, dilation, groups, n, m, activation = ctx.constants
    if activation != "none":
        plain = torch.ops.nmfx.conv_nm(input, values, index, bias, *ctx.constants[:-1], "none")
        grad = activation_grad(activation, grad, plain)
    grad_input = None
    if ctx.needs_input_grad[0]:
        weight = _dense(values, index, ctx.shape[1], out_channels, kernel_size, groups, n, m)
        grad_input = torch.nn.grad.conv2d_input(  # type: ignore[attr-defined]
            ctx.shape, weight, grad, stride, padding, dilation, groups
        )
    grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
    return grad_input, None, None, grad_bias, *(None,) * len(ctx.constants)


torch.library.register_autograd("nmfx::conv_nm", _grad, setup_context=_save, lib=_library)
