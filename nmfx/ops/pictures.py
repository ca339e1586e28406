"""What a convolution's arguments mean, and its input as rows of a matrix.

    (batch, channels, y, x)   --patches-->   (batch, y, x, kernel positions * channels)

Columns are in the order (ky, kx, channel), as in packed weights, so that a convolution is a linear
layer of its patches. A 1 x 1 kernel with stride 1 on a channels-last input copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NMError


@dataclass
class Pictures:
    """An input of conv1d or conv2d as that of a conv2d, with all arguments as two numbers each.

    Attributes:
        x: (batch, channels, y, x).
        kernel_size, stride, padding, dilation: along y and x.
        batched: whether the input had a batch.
        dims: of the convolution.
    """

    x: Tensor
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    batched: bool
    dims: int

    def patches(self) -> Tensor:
        """See `patches`."""
        return patches(self.x, self.kernel_size, self.stride, self.padding, self.dilation)

    def restored(self, out: Tensor) -> Tensor:
        """The result of the conv2d as that of the convolution."""
        out = out.squeeze(2) if self.dims == 1 else out
        return out if self.batched else out.squeeze(0)


def as_pictures(
    input: Tensor,
    weight_shape: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    name: str,
) -> Pictures:
    """Arguments of `name`, which are those of torch's convolutions, brought into one form.

    Raises:
        NMError: a weight or an input of other dimensions, or a padding that is none.
    """
    dims = len(weight_shape) - 2
    if dims not in (1, 2):
        raise NMError(f"{name} takes conv1d and conv2d weights, got shape {tuple(weight_shape)}")
    if input.ndim not in (dims + 1, dims + 2):
        raise NMError(
            f"input of shape {tuple(input.shape)} does not fit a weight of shape "
            f"{tuple(weight_shape)}"
        )
    batched = input.ndim == dims + 2
    x = input if batched else input.unsqueeze(0)
    kernel_size = list(weight_shape[2:])
    steps, spread = each(stride, dims), each(dilation, dims)
    x, pads = padded(x, padding, kernel_size, spread, steps)
    if dims == 1:  # a picture one pixel high
        x = x.unsqueeze(2)
        kernel_size, pads = [1, *kernel_size], [0, *pads]
        steps, spread = [1, *steps], [1, *spread]
    return Pictures(x, kernel_size, steps, pads, spread, batched, dims)


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


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """(y, x) of a conv2d's result, for an input of (y, x) `size`.

    Raises:
        NMError: arguments that are not two numbers each, or a kernel that does not fit.
    """
    for name, given, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
    ):
        if len(given) != 2 or any(value < least for value in given):
            raise NMError(f"{name}={tuple(given)} is not two numbers of at least {least}")
    found = []
    for i in range(2):
        left = size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1)
        if left < 1:
            raise NMError(
                f"an input of {tuple(size)} padded by {tuple(padding)} is smaller than "
                f"a kernel of {tuple(kernel_size)} dilated by {tuple(dilation)}"
            )
        found.append((left - 1) // stride[i] + 1)
    return found


def patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What a conv2d multiplies with its weight, in the order (ky, kx, channel).

    Args:
        x: (batch, channels, y, x).
        kernel_size, stride, padding, dilation: two numbers each.

    Returns:
        (batch, y, x, ky * kx * channels), y and x of the result; a view where it can be one.

    Raises:
        NMError: see `output_size`.
    """
    height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    x = x.movedim(1, -1)
    if any(padding):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    ends = (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1
    parts = [
        x[:, top : top + ends[0] : stride[0], left : left + ends[1] : stride[1]]
        for top in range(0, kernel_size[0] * dilation[0], dilation[0])
        for left in range(0, kernel_size[1] * dilation[1], dilation[1])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def memory_format(x: Tensor) -> torch.memory_format:
    """Of a (batch, channels, y, x) input; a convolution's result has it too."""
    last = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
