"""nmfx::sr_ste and its gradients on GPUs: starts the kernels of `triton_masks.py`.

Each reads its inputs once and writes its result once, and equals the plain-torch formulas of
`ops/sr_ste.py` bit for bit (NaN payloads aside where something is computed). lambda_W and N are
read on the device: a schedule that changes them neither waits for the GPU nor compiles again.

Triton itself is imported by the first launch: it costs a second, and not every torch comes with it.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ..errors import NMError
from ..mask import DTYPES, as_bits

# Elements of one program, which is one warp: 32 per thread. With half of that the instructions
# that every program needs weigh twice; from twice of that on the larger groups spill registers.
_TILE = 1024

# From so many elements on, offsets need 64 bits.
_LONG = 2**31


def why_not(weight: Tensor, m: int) -> str | None:
    """Why these kernels cannot serve a weight, or None when they can.

    Args:
        weight: any tensor.
        m: group length M.
    """
    if not weight.is_cuda:
        return f"the weight is on {weight.device}, not on a GPU"
    if weight.dtype not in DTYPES:
        return f"dtype {weight.dtype} has no N:M order"
    if not 2 <= m <= 64:
        return f"M={m} is outside 2..64"
    return why_not_on(weight.device)


def why_not_on(device: torch.device) -> str | None:
    """Why no kernel of nmfx runs on a GPU, or None if they do."""
    return _missing(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _missing(device: int) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:  # the least that Triton supports
        return f"compute capability {major}.{minor} is below 8.0"
    return None


def project(
    weight: Tensor, control: Tensor, m: int, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The weight with everything outside its N:M mask replaced by +0.0.

    Args:
        weight: float16/32/64 or bfloat16; a layout that is not dense costs a copy.
        control: float64 [lambda_W, N].
        m: group length M, 2..64.
        dim: the grouped dimension.
        dtype: of the result, rounded to in the same pass; that of the weight if None.

    Returns:
        A new tensor with the shape of `weight`, laid out as by `torch.empty_like(weight)`.

    Raises:
        NMError: M does not divide the size of `dim`.
    """
    out = torch.empty_like(weight, dtype=dtype)
    weight = _laid_out_like(out, weight)
    _launch("project", (weight,), control, out, m, dim)
    return out


def gradient(grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int) -> Tensor:
    """`grad + lambda_W * (1 - mask) * weight`, rounded as by `sr_ste_backward` in plain torch.

    Args:
        grad: of the shape of `weight`, any of its dtypes; a layout other than that of `weight`
            costs a copy.
        weight, control, m, dim: as in `project`.

    Returns:
        A new tensor with the shape and dtype of `weight`, laid out as by `torch.empty_like`.

    Raises:
        NMError: M does not divide the size of `dim`.
    """
    out = torch.empty_like(weight)
    weight = _laid_out_like(out, weight)
    _launch("gradient", (_laid_out_like(out, grad), weight), control, out, m, dim)
    return out


def decay_(grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int) -> None:
    """`grad.copy_(gradient(grad, weight, ...))`, in place where both have one dense layout."""
    dense = torch.empty_like(weight, device="meta")  # no memory: its layout is what counts
    weight = _laid_out_like(dense, weight)
    out = grad if _same_places(grad, dense) else torch.empty_like(weight, dtype=grad.dtype)
    _launch("gradient", (_laid_out_like(out, grad), weight), control, out, m, dim)
    if out is not grad:
        grad.copy_(out)


def _same_places(a: Tensor, b: Tensor) -> bool:
    """Whether equal indices lie at equal offsets; the stride of a dimension of size 1 is moot."""
    if a.shape != b.shape:
        return False
    if a.stride() == b.stride():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or left == right for size, left, right in strides)


def _laid_out_like(like: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it in the layout of `like`."""
    if _same_places(like, tensor):
        return tensor
    copy = torch.empty_like(like, dtype=tensor.dtype, device=tensor.device)
    if tensor.dtype in DTYPES:  # as integers: a NaN keeps its payload
        as_bits(copy).copy_(as_bits(tensor))
        return copy
    return copy.copy_(tensor)


def constants(weight: Tensor, m: int) -> dict[str, int]:
    """What the kernels are compiled for, besides dtypes: M, the tile, the width of offsets."""
    places = 1 << (m - 1).bit_length()
    long = weight.numel() >= _LONG
    return {"M": m, "PLACES": places, "GROUPS": _TILE // places, "LONG": long}


# How they are compiled. No contraction to an fma: the formula rounds the product, then the sum.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


def _kernels() -> ModuleType:
    from . import triton_masks

    return triton_masks


def _launch(
    name: str, inputs: tuple[Tensor, ...], control: Tensor, out: Tensor, m: int, dim: int
) -> None:
    """Starts a kernel on `inputs` (the weight last) and `out`, all in one dense layout."""
    weight = inputs[-1]
    if weight.shape[dim] % m:
        raise NMError(
            f"size {weight.shape[dim]} of dim {dim} (shape {tuple(weight.shape)}) is not a "
            f"multiple of {m}"
        )
    if not weight.numel():
        return
    groups, compiled_for = weight.numel() // m, constants(weight, m)
    grid = (-(-groups // compiled_for["GROUPS"]),)
    # Usually no copies: a wrapper may have moved the weight, vmap may have cut up the control.
    control = control.to(weight.device).contiguous()
    kernel, inner = getattr(_kernels(), name), weight.stride(dim)
    with torch.cuda.device_of(weight):
        kernel[grid](*inputs, control, out, groups, inner, **compiled_for, **OPTIONS)
