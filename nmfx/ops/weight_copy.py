"""Copies of one dense weight in layouts that oneDNN likes, and when they may be used.

torch's eager operators lay a weight out anew inside every call; oneDNN can keep the result. The
dense weight stays the parameter, and the copies are no state: they are made on the first calls that
can use them, left out of copies and pickles, and made again when the weight has changed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..mask import as_bits
from .forward_mode import in_forward_mode

_SAMPLES = 64
# A prompt and a decoding step, or two batch sizes; each copy is as large as the weight.
MOST_COPIES = 2


class WeightCopy:
    """The copies of one weight; none at first, and again after copying or pickling."""

    def __init__(self) -> None:
        # One tuple, so that a thread never sees the copies of one weight with the key of another.
        self._state: tuple[Any, Tensor, Tensor, dict[Any, Any]] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightCopy, ()

    @property
    def count(self) -> int:
        """How many copies there are."""
        state = self._state
        return 0 if state is None else len(state[3])

    def of(self, weight: Tensor, use: Any, make: Callable[[], Any]) -> Any:
        """The copy of `weight` as it is now for a use, or None if others came first.

        The first `MOST_COPIES` uses get one each and keep it as long as the weight stays: copies
        that took turns would be laid out again and again, and one input would be computed in two
        ways, with two roundings, depending on what other threads ask for.

        The version counter tells of every write but those through `.data`; these are told by a
        sample of the elements, which a write to a few single ones can miss.

        Args:
            weight: dense in memory, of any order of strides.
            use: what the layout depends on beside the weight; hashable.
            make: makes what is kept; called when there is none for this weight and use.
        """
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride())
        state = self._state
        if _is_fresh(state, key) and state is not None and use in state[3]:
            return state[3][use]
        with self._lock:
            state = self._state
            if state is None or not _is_fresh(state, key):
                with torch.no_grad():
                    flat = as_bits(weight.detach()).as_strided((weight.numel(),), (1,))
                    probe = flat[:: max(1, flat.numel() // _SAMPLES)]
                    state = (key, probe, probe.clone(), {})
            copies = state[3]
            if use not in copies and len(copies) < MOST_COPIES:
                with torch.no_grad():
                    copies = {**copies, use: make()}
                self._state = (*state[:3], copies)
            return copies.get(use)


def _is_fresh(state: Any, key: Any) -> bool:
    return state is not None and state[0] == key and torch.equal(state[1], state[2])


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
        or in_forward_mode()
    )
