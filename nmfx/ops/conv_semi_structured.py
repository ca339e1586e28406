"""conv_semi_structured: a convolution whose 2:4 weight is compressed, as a product of its patches.

    (batch, channels, y, x) -> (batch * y * x, kernel positions * channels)  x  W^T

GPUs have no sparse convolution. A 1 x 1 kernel needs none; of a larger one the patches are as many
times larger than the input as the kernel has positions, so `nmfx.lower` takes it only where it was
measured to be faster. Gradients flow to the input and the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import NMError
from .linear_semi_structured import linear_semi_structured
from .packed import is_autocast
from .pictures import as_pictures, memory_format


def conv_semi_structured(
    input: Tensor,
    compressed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    algorithms: Sequence[int] = (),
) -> Tensor:
    """conv1d or conv2d with a compressed weight; autocast and layouts as for torch's.

    Args:
        input: (batch, channels, *size) or (channels, *size) of `dtype`.
        compressed, meta: of the weight as a matrix, see `nmfx.packing.as_matrix`.
        bias: (out_channels,) or None.
        stride, padding, dilation: as for `torch.nn.functional.conv2d`.
        groups: 1.
        weight_shape: of the dense weight, (out_channels, channels, *kernel_size).
        dtype: of the dense weight.
        algorithms: by the number of output positions in the batch, see
            `nmfx.kernels.semi_structured.algorithm_for`.

    Returns:
        A new tensor, channels-last where the input is.

    Raises:
        NMError: shapes, dtypes or devices that do not fit; groups; or a weight that cuSPARSELt
            compressed on a CPU.
    """
    tensors = (input, compressed, meta, bias)
    constants: tuple[Any, ...] = (
        *(stride, padding, dilation, groups),
        *(weight_shape, dtype, algorithms),
    )
    if has_torch_function(tensors):  # fx proxies record this call as one node
        return handle_torch_function(conv_semi_structured, tensors, *tensors, *constants)
    if is_autocast(input) and torch.get_autocast_dtype(input.device.type) == dtype:
        input = input.to(dtype)  # before there are more of it
    if groups != 1:
        raise NMError(f"a compressed convolution has one group, got groups={groups}")
    p = as_pictures(input, weight_shape, stride, padding, dilation, "conv_semi_structured")
    channels, outputs = weight_shape[1], weight_shape[0]
    if p.x.shape[1] != channels:
        raise NMError(
            f"input of shape {tuple(input.shape)} does not have the {channels} channels of a "
            f"weight of shape {tuple(weight_shape)}"
        )
    rows = p.patches()
    weight: tuple[Any, ...] = (compressed, meta, bias, outputs, rows.shape[-1], dtype, algorithms)
    out = linear_semi_structured(rows, *weight).movedim(-1, 1)
    # Channels-last as it comes.
    last = memory_format(p.x) is torch.channels_last
    return p.restored(out if last else out.contiguous())


conv_semi_structured.__module__ = "nmfx"  # generated code reads `nmfx_conv_semi_structured(`
