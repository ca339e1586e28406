"""N:M masks: the definition that every kernel must equal bit for bit.

Order. Two weights are compared by magnitude, as integers made of their bits without the sign:

    +-0  <  denormals  <  normals  <  Inf  <  NaN (all NaNs are equal)

and among equals the *lower index wins*. The order is total, so the mask of a tensor is unique,
does not depend on the device, the kernel or the flush-to-zero flag, and never keeps more or fewer
than N of a group. A value is selected with `where`, never multiplied: NaN and -0.0 survive a
multiplication by zero.

Groups. M consecutive elements along one dimension (`dim`), the dimension that the consuming
operator sums over: 1 for `linear` (out, in) and for convolutions (out, in/groups, ...). A group
never crosses a row, a filter or a kernel position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from .errors import NMError
from .pattern import Pattern, PatternLike

# dtype -> (integer of the same width, bits without sign, bits of +Inf)
_BITS = {
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
}

DTYPES = tuple(_BITS)


def check_groups(weight: Tensor, pattern: Pattern, dim: int) -> int:
    """Checks that `weight` can be cut into groups of `pattern.m` along `dim`.

    Returns:
        `dim` as a non-negative number.

    Raises:
        NMError: not a float16/bfloat16/float32/float64 tensor, no such dimension, or a length
            that M does not divide; or a DTensor, of whose groups this process may have parts.
    """
    if hasattr(weight, "placements"):
        raise NMError(
            f"the tensor of shape {tuple(weight.shape)} is a {type(weight).__name__}, of which "
            f"this process has a part; gather it first: tensor.full_tensor()"
        )
    if weight.dtype not in _BITS:
        raise NMError(
            f"dtype {weight.dtype} has no N:M order; use float16, bfloat16, float32 or float64"
        )
    if not -weight.ndim <= dim < weight.ndim:
        raise NMError(f"dim={dim} does not exist in a tensor of shape {tuple(weight.shape)}")
    dim %= weight.ndim
    if weight.shape[dim] % pattern.m:
        raise NMError(
            f"size {weight.shape[dim]} of dim {dim} (shape {tuple(weight.shape)}) is not a "
            f"multiple of {pattern.m}, so {pattern} groups would straddle rows"
        )
    return dim


class _BatchedBits(torch.autograd.Function):
    """`as_bits` under vmap, for a torch whose vmap knows no views as another dtype (2.11)."""

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.view(_BITS[weight.dtype][0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], weight: Tensor) -> tuple[Tensor, int]:
        return as_bits(weight), in_dims[0]


_VMAP_VIEWS = torch._C._dispatch_has_kernel_for_dispatch_key("aten::view.dtype", "FuncTorchBatched")


def as_bits(weight: Tensor) -> Tensor:
    """The elements of `weight` as integers of the same width; a view, same shape and strides."""
    if not _VMAP_VIEWS and not torch.compiler.is_compiling() and _are_functorch_transforms_active():
        return _BatchedBits.apply(weight)
    return weight.view(_BITS[weight.dtype][0])


def magnitude(weight: Tensor) -> Tensor:
    """Integers that sort like |weight| in the total order; same shape, int16/32/64, a copy."""
    _, unsigned, inf = _BITS[weight.dtype]
    return (as_bits(weight) & unsigned).clamp(max=inf + 1)


def rank(weight: Tensor, m: int, dim: int) -> Tensor:
    """Place of every element within its group: 0 for the largest magnitude, m - 1 for the smallest.

    Args:
        weight: float16/32/64 or bfloat16, any shape and strides, `weight.shape[dim] % m == 0`.
        m: group length, 1..64.
        dim: the grouped dimension.

    Returns:
        int8 tensor of the shape of `weight`, a new tensor.
    """
    dim %= weight.ndim
    groups = magnitude(weight).unflatten(dim, (-1, m))
    # A stable sort keeps equal elements in index order: that is the tie rule.
    order = groups.sort(dim=dim + 1, descending=True, stable=True).indices
    places = torch.arange(m, dtype=torch.int8, device=weight.device)
    places = places.view(m, *[1] * (weight.ndim - dim - 1)).expand(order.shape)
    ranks = torch.empty_like(order, dtype=torch.int8).scatter_(dim + 1, order, places)
    return ranks.flatten(dim, dim + 1)


def nm_mask(weight: Tensor, pattern: PatternLike, dim: int = -1) -> Tensor:
    """The N:M mask of a weight: True where it is kept, exactly N True in each group of M.

    Groups run along `dim` and never cross any other dimension.

    Args:
        weight: float16/32/64 or bfloat16 of any shape and strides.
        pattern: "2:4", (2, 4) or a Pattern.
        dim: the dimension the consumer sums over: 1 for linear and conv weights.

    Returns:
        bool tensor of the shape of `weight`, on its device, a new tensor.

    Raises:
        NMError: see `check_groups`.
    """
    pattern = Pattern.parse(pattern)
    dim = check_groups(weight, pattern, dim)
    return rank(weight.detach(), pattern.m, dim) < pattern.n


def nm_project(weight: Tensor, pattern: PatternLike, dim: int = -1) -> Tensor:
    """The weight with everything outside its N:M mask replaced by +0.0; a new, detached tensor.

    Kept values are bit-identical (NaN payloads, -0.0 and denormals included). Arguments and
    errors as in `nm_mask`.
    """
    mask = nm_mask(weight, pattern, dim)
    # As integers: copies of half-precision floats may rewrite the payload of a NaN.
    return torch.where(mask, as_bits(weight.detach()), 0).view(weight.dtype)


def is_nm(tensor: Tensor, pattern: PatternLike, dim: int = -1) -> bool:
    """Whether every group of M along `dim` has at most N elements that are not zero.

    -0.0 counts as zero, NaN and denormals do not. Arguments and errors as in `nm_mask`.
    """
    pattern = Pattern.parse(pattern)
    dim = check_groups(tensor, pattern, dim)
    # By bits: with the flush-denormal flag set, `tensor != 0` calls a denormal zero.
    nonzero = (magnitude(tensor.detach()) != 0).unflatten(dim, (-1, pattern.m))
    return bool((nonzero.sum(dim + 1) <= pattern.n).all())


def paper_mask(weight: Tensor, pattern: PatternLike, layout: str = "channels_last") -> Tensor:
    """The mask with the two groupings that the SR-STE paper's code used, for comparison.

    Only which weights form a group differs; the order is nmfx's own.

    Args:
        weight: a linear (out, in) or conv (out, in/groups, ...) weight.
        pattern: "2:4", (2, 4) or a Pattern.
        layout: "flat" groups the elements in their memory order of a contiguous OI(HW) tensor, so
            that groups run over kernel positions and may cross filters (the first published
            models); "channels_last" groups them with input channels fastest (the later code).
            For a linear weight both are the same.

    Returns:
        bool tensor of the shape of `weight`.

    Raises:
        NMError: another layout, or a number of elements that M does not divide.

    Reference: arXiv 2102.04010 and the two states of its published code.
    """
    pattern = Pattern.parse(pattern)
    if layout not in ("flat", "channels_last"):
        raise NMError(f"layout={layout!r} is not 'flat' or 'channels_last'")
    # channels_last: move dim 1 to the end, so that a flat walk visits input channels fastest.
    walk = weight.movedim(1, -1) if layout == "channels_last" and weight.ndim > 2 else weight
    if walk.numel() % pattern.m:
        raise NMError(
            f"{walk.numel()} elements (shape {tuple(weight.shape)}) are not a multiple of "
            f"{pattern.m}, so they cannot be cut into {pattern} groups"
        )
    mask = nm_mask(walk.reshape(-1), pattern).view(walk.shape)
    return mask.movedim(-1, 1).contiguous() if walk is not weight else mask


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are equal bit for bit, signs of zeros aside.

    By bits: with the flush-denormal flag set, `a == b` calls two denormals equal. A -0.0 that
    somebody else's pruning left may come back as +0.0 from a packed form.
    """
    changed = as_bits(a) != as_bits(b)
    return not (magnitude(a[changed]).any() or magnitude(b[changed]).any())
