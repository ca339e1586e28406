"""A copy of one dense weight in a layout that oneDNN likes, and when it may be used.

torch's eager operators lay a weight out anew inside every call; oneDNN can keep the result. The
dense weight stays the parameter, and the copy is no state: it is made on the first call that can
use it, left out of copies and pickles, and made again when the weight has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..mask import as_bits

_SAMPLES = 64


class WeightCopy:
    """The copy of one weight; empty at first, and again after copying or pickling."""

    def __init__(self) -> None:
        # One tuple, so that a thread never sees the copy of one weight with the key of another.
        self._state: tuple[Any, Any, Tensor, Tensor, Any] | None = None
        self._missed: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightCopy, ()

    def of(self, weight: Tensor, use: Any, make: Callable[[], Any]) -> Any:
        """The copy of `weight` as it is now, or None while it serves another use.

        One copy is kept. A new use gets it when it comes twice in a row: uses that alternate would
        otherwise lay the weight out in every call, which is what the copy is there to avoid.

        The version counter tells of every write but those through `.data`; these are told by a
        sample of the elements, which a write to a few single ones can miss.

        Args:
            weight: dense in memory, of any order of strides.
            use: what the layout depends on beside the weight; compared with ==.
            make: makes what is kept; called when there is none for this weight and use.
        """
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride())
        state = self._state
        fresh = state is not None and state[0] == key and torch.equal(state[2], state[3])
        if fresh and state is not None and state[1] != use:
            missed, self._missed = self._missed, use
            if missed != use:
                return None
            fresh = False
        self._missed = None
        if not fresh or state is None:
            with torch.no_grad():
                flat = as_bits(weight.detach()).as_strided((weight.numel(),), (1,))
                probe = flat[:: max(1, flat.numel() // _SAMPLES)]
                self._state = state = (key, use, probe, probe.clone(), make())
        return state[4]


_PLAIN = (Tensor, torch.nn.Parameter)


def serves(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a kept copy of `weight` may stand for it in this call.

    Not with gradients, under torch.compile (whose freezing lays out weights by itself), export, fx
    and jit tracing, functorch or autocast, nor for tensor subclasses, other devices and dtypes.
    """
    return (
        not torch.compiler.is_compiling()
        and type(input) in _PLAIN
        and type(weight) in _PLAIN
        and (bias is None or (type(bias) in _PLAIN and bias.dtype == weight.dtype))
        and input.dtype == weight.dtype
        and refusal(weight.dtype) is None
        and input.device.type == weight.device.type == "cpu"
        and input.layout == torch.strided
        and not input.is_nested
        and not weight.is_inference()  # it has no version counter
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not _needs_grad(input, weight, bias)
        and not _is_watched()
    )


def can_prepack(weight: Tensor) -> str | None:
    """None if oneDNN keeps a copy of such a weight on this machine, else why not."""
    if weight.device.type != "cpu":
        return f"oneDNN works on the CPU, not on {weight.device.type}"
    if not weight.numel():
        return "the weight is empty"
    if weight.ndim > 4:
        return f"no layout is kept for weights with {weight.ndim} dimensions"
    return refusal(weight.dtype)


@functools.cache
def refusal(dtype: torch.dtype) -> str | None:
    """None if oneDNN lays out weights of a dtype here, else why not."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN keeps no layout for {dtype}"
    if not torch.backends.mkldnn.is_available():
        return "oneDNN is not available"
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype))
        torch.ops.mkldnn._reorder_convolution_weight(torch.zeros(16, 16, 1, 1, dtype=dtype))
    except (RuntimeError, AttributeError) as error:  # bfloat16 before AVX-512; a build without it
        return f"oneDNN refuses: {str(error).splitlines()[0]}"
    return None


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
