"""conv_prepacked: a dense conv1d or conv2d whose weight is also kept in oneDNN's blocked layout.

Layers of ResNet-50 in milliseconds, eager and prepacked, float32, 1 core of an AMD EPYC (AVX2),
torch 2.13, weights from DRAM. Convolutions are written out x in x kernel, stride, input size:

                                     contiguous        channels-last
    batch 1
    64x64x1x1           56x56       0.57    1.28         0.51    0.69
    128x128x3x3         28x28       2.88    2.98         2.58    2.66
    256x256x3x3         14x14       3.22    3.07         3.24    2.86
    512x512x3x3         7x7         4.60    3.34         4.46    3.11
    2048x512x1x1        7x7         2.37    2.42         2.11    1.66
    2048x1024x1x1, 2    14x14       3.94    3.68         5.69    2.94
    batch 8
    256x64x1x1          56x56      12.2    55.6         11.2    11.2
    512x512x3x3         7x7        30.2    24.5         22.1    20.7
    2048x512x1x1        7x7        14.3    13.2         11.8     9.8

oneDNN's result is channels-last; from contiguous inputs it has to be turned round, which loses
where pictures are large. Laid out without the input's size, 3x3 kernels ran 4 to 13 times slower
than eager, so the size is part of what the copy is kept for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import each, padded
from .weight_copy import WeightCopy, serves


def conv_prepacked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    dims: int,
    copy: WeightCopy,
) -> Tensor:
    """conv1d or conv2d, through the blocked copy of `weight` where that is possible.

    Whatever the copies do not serve, see `serves`, runs the plain operator; so does an input whose
    size is none of the first that came, for which copies were laid out.

    Args:
        input: (batch, channels, *size); without a batch the plain operator runs.
        weight: (out_channels, channels / groups, *kernel_size).
        bias: (out_channels,) or None.
        stride, padding, dilation, groups: as for `torch.nn.functional.conv2d`.
        dims: 1 or 2; tracers that pass weights without a shape cannot tell.
        copy: where the copy is kept; one for each weight.

    Returns:
        A new tensor, in the layout that the plain operator gives.
    """
    plain = F.conv1d if dims == 1 else F.conv2d
    if not (serves(input, weight, bias) and _is_batch(input, weight) and _is_dense(weight)):
        return plain(input, weight, bias, stride, padding, dilation, groups)
    bias_shape = None if bias is None else bias.shape
    options = (each(stride, dims), each(dilation, dims), groups, str(padding))
    use = (input.shape, input.stride(), bias_shape, *map(_hashable, options))

    def make() -> tuple[Tensor, tuple[int, ...]]:
        # It says which layout the result has, and refuses what does not fit.
        out = plain(input, weight, bias, stride, padding, dilation, groups)
        x, pads, steps, spread = _pictures(input, padding, weight.shape[2:], stride, dilation)
        filters = weight.detach().unsqueeze(2) if dims == 1 else weight.detach()
        return _reorder(filters, pads, steps, spread, groups, list(x.shape)), out.stride()

    kept = copy.of(weight, use, make)
    if kept is None:
        return plain(input, weight, bias, stride, padding, dilation, groups)
    blocked, strides = kept
    x, pads, steps, spread = _pictures(input, padding, weight.shape[2:], stride, dilation)
    out = torch.ops.mkldnn._convolution_pointwise.default(
        x, blocked, bias, pads, steps, spread, groups, "none", [], ""
    )
    out = out.squeeze(2) if dims == 1 else out
    if out.stride() == strides:  # otherwise channels-last, whatever the input is
        return out
    return torch.empty_strided(out.shape, strides, dtype=out.dtype).copy_(out)


conv_prepacked.__module__ = "nmfx"  # generated code reads `nmfx_conv_prepacked(...)`


def _pictures(
    input: Tensor,
    padding: str | int | Sequence[int],
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[Tensor, list[int], list[int], list[int]]:
    """(input, padding, stride, dilation) of a conv2d; conv1d sees pictures one pixel high."""
    dims = len(kernel_size)
    steps, spread = each(stride, dims), each(dilation, dims)
    x, pads = padded(input, padding, list(kernel_size), spread, steps)
    if dims == 1:
        return x.unsqueeze(2), [0, *pads], [1, *steps], [1, *spread]
    return x, pads, steps, spread


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_batch(input: Tensor, weight: Tensor) -> bool:
    return input.ndim == weight.ndim and input.numel() > 0


def _is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or (
        weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )


def _reorder(
    weight: Tensor,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    size: list[int],
) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, size
    )
