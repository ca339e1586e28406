"""nmfx::conv_nm: a convolution whose weight is packed, columns in the order (ky, kx, channel).

On CPU tensors the native kernel runs (`nmfx.kernels.cpu`); the kernel here is the reference for all
other devices, and for a CPU without the library: it unpacks the weight and convolves dense.
Gradients flow to the input and the bias; the packed weight is constant.
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
    dims = len(weight_shape) - 2
    if dims not in (1, 2):
        raise NMError(f"conv_nm takes conv1d and conv2d weights, got shape {tuple(weight_shape)}")
    if input.ndim not in (dims + 1, dims + 2):
        raise NMError(
            f"input of shape {tuple(input.shape)} does not fit a weight of shape "
            f"{tuple(weight_shape)}"
        )
    if is_autocast(input):
        input, values, bias = autocast_all(input, values, bias)
    batched = input.ndim == dims + 2
    x = input if batched else input.unsqueeze(0)
    kernel_size = list(weight_shape[2:])
    sizes = [each(value, dims) for value in (stride, dilation)]
    x, pads = padded(x, padding, kernel_size, sizes[1], sizes[0])
    if dims == 1:  # a picture one pixel high
        x = x.unsqueeze(2)
        kernel_size, pads = [1, *kernel_size], [0, *pads]
        sizes = [[1, *size] for size in sizes]
    arguments = (
        x,
        values,
        index,
        bias,
        weight_shape[0],
        kernel_size,
        sizes[0],
        pads,
        sizes[1],
        groups,
        n,
        m,
        activation,
    )
    try:
        out = run_op(_op, x, values, bias, *arguments)
    except RuntimeError:
        # The native kernel only says that something does not fit. Here it is found out what.
        _output_shape(*arguments)
        raise
    out = out.squeeze(2) if dims == 1 else out
    return out if batched else out.squeeze(0)


conv_nm.__module__ = "nmfx"  # generated code reads `nmfx_conv_nm(...)`


def each(value: int | Sequence[int], dims: int) -> list[int]:
    """An argument of a convolution as one number for each of `dims` dimensions."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def padded(
    x: Tensor,
    padding: str | int | Sequence[int],
    kernel_size: list[int],
    dilation: list[int],
    stride: list[int],
) -> tuple[Tensor, list[int]]:
    """(input, symmetric padding); "same" may need one more zero on one side."""
    dims = len(kernel_size)
    if padding == "valid":
        return x, [0] * dims
    if padding != "same":
        if isinstance(padding, str):
            raise NMError(f"padding={padding!r} is neither 'same' nor 'valid'")
        return x, each(padding, dims)
    if any(step != 1 for step in stride):
        raise NMError(f"padding='same' needs stride 1, got {tuple(stride)}")
    totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=False)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
    return x, [total // 2 for total in totals]


def _output_shape(
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
    for name, given, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
    ):
        if len(given) != 2 or any(value < least for value in given):
            raise NMError(f"{name}={tuple(given)} is not two numbers of at least {least}")
    shape = [input.shape[0], out_channels]
    for i in range(2):
        left = input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1)
        if left < 1:
            raise NMError(
                f"an input of {tuple(input.shape[2:])} padded by {tuple(padding)} is smaller than "
                f"a kernel of {tuple(kernel_size)} dilated by {tuple(dilation)}"
            )
        shape.append((left - 1) // stride[i] + 1)
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
    return shape


def _memory_format(input: Tensor) -> torch.memory_format:
    last = input.stride(1) == 1 and not input.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


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
    _output_shape(input, values, index, bias, *rest)
    out_channels, kernel_size, stride, padding, dilation, groups, n, m, activation = rest
    weight = _dense(values, index, input.shape[1], out_channels, kernel_size, groups, n, m)
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[activation](out).contiguous(memory_format=_memory_format(input))


def _fake(input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    shape = _output_shape(input, values, index, bias, *rest)
    empty = torch.empty(shape, dtype=input.dtype, device=input.device)
    return empty.to(memory_format=_memory_format(input))


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
