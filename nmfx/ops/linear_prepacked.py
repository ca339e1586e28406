"""linear_prepacked: a dense linear whose weight is also kept in oneDNN's blocked layout.

torch's eager linear lays the weight out anew inside every call; oneDNN can keep the result. The
dense weight stays the parameter, and the copy is no state: it is made on the first call that can
use it, left out of copies and pickles, and made again when the weight has changed.

Measured in milliseconds, float32, 2 cores of an AMD EPYC (AVX2), torch 2.13, weights from DRAM:

    weight       rows   eager   oneDNN, kept layout   MKL, kept layout
    1024x1024       1    0.30                  0.32               0.33
    1024x1024       8    0.73                  0.44               0.77
    1024x1024     128    2.67                  2.30               2.70
    4096x4096       1    3.13                  2.50               3.14
    4096x4096       8   11.5                   4.6               13.1
    4096x4096     128   40.7                  36.0               41.8

So MKL's packed weights (torch.ops.mkl._mkl_linear) are no candidate. Telling oneDNN the number of
rows in advance gained nothing measurable either, and would tie the copy to one batch size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mask import as_bits

_SAMPLES = 64


class WeightCopy:
    """The blocked copy of one weight; empty at first, and again after copying or pickling."""

    def __init__(self) -> None:
        # One tuple, so that a thread never sees the copy of one weight with the key of another.
        self._state: tuple[Any, Tensor, Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightCopy, ()

    def of(self, weight: Tensor, transposed: bool) -> Tensor:
        """The blocked copy of `weight` as it is now.

        The version counter tells of every write but those through `.data`; these are told by a
        sample of the elements, which a write to a few single ones can miss.
        """
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride())
        state = self._state
        if state is None or state[0] != key or not torch.equal(state[1], state[2]):
            with torch.no_grad():
                flat = as_bits(weight.detach()).view(-1)
                probe = flat[:: max(1, flat.numel() // _SAMPLES)]
                rows = weight.detach().t().contiguous() if transposed else weight.detach()
                blocked = _reorder(rows)
                self._state = state = (key, probe, probe.clone(), blocked)
        return state[3]


def linear_prepacked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: WeightCopy,
    transposed: bool = False,
) -> Tensor:
    """`torch.nn.functional.linear`, through the blocked copy of `weight` where that is possible.

    Whatever the copy does not serve runs the plain operator: gradients, torch.compile (whose
    freezing lays out weights by itself), export, fx and jit tracing, functorch, autocast, tensor
    subclasses, other devices and dtypes.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features), or (in_features, out_features) if `transposed`.
        bias: (out_features,) or None.
        copy: where the copy is kept; one for each weight.
        transposed: whether this stands for `torch.addmm(bias, input, weight)`.

    Returns:
        (..., out_features), a new tensor.
    """
    if torch.compiler.is_compiling() or not _serves(input, weight, bias):
        if transposed:
            return torch.addmm(bias, input, weight)  # type: ignore[arg-type]  # it has a bias
        return F.linear(input, weight, bias)
    blocked = copy.of(weight, transposed)
    return torch.ops.mkldnn._linear_pointwise(input, blocked, bias, "none", [], "")


linear_prepacked.__module__ = "nmfx"  # generated code reads `nmfx_linear_prepacked(...)`


def can_prepack(weight: Tensor) -> str | None:
    """None if oneDNN keeps a blocked copy of such a weight on this machine, else why not."""
    if weight.device.type != "cpu":
        return f"oneDNN works on the CPU, not on {weight.device.type}"
    if not weight.numel():
        return "the weight is empty"
    return _refusal(weight.dtype)


@functools.cache
def _refusal(dtype: torch.dtype) -> str | None:
    """None if oneDNN lays out weights of a dtype here, else why not."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN keeps no layout for {dtype}"
    if not torch.backends.mkldnn.is_available():
        return "oneDNN is not available"
    try:
        _reorder(torch.zeros(16, 16, dtype=dtype))
    except (RuntimeError, AttributeError) as error:  # bfloat16 before AVX-512; a build without it
        return f"oneDNN refuses: {str(error).splitlines()[0]}"
    return None


def _reorder(rows: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(rows)


_PLAIN = (Tensor, torch.nn.Parameter)


def _serves(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        type(input) in _PLAIN
        and type(weight) in _PLAIN
        and (bias is None or (type(bias) in _PLAIN and bias.dtype == weight.dtype))
        and input.dtype == weight.dtype
        and _refusal(weight.dtype) is None
        and input.device.type == weight.device.type == "cpu"
        and input.layout == torch.strided
        and not input.is_nested
        and input.ndim > 1
        and weight.is_contiguous()
        and not weight.is_inference()  # it has no version counter
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not _needs_grad(input, weight, bias)
        and not _is_watched()
    )


def _needs_grad(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _is_watched() -> bool:
    """Whether something looks at the calls, or runs them on tensors of its own."""
    return (
        torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
