"""What linear_nm, linear_semi_structured and conv_nm share: checks, activations, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NMError
from ..packing import Shape, packed_shapes
from ..pattern import Pattern
from .forward_mode import in_forward_mode

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def activation_grad(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient with respect to the input `x` of an activation; differentiable again."""
    if name == "relu":
        return torch.where(x > 0, grad, 0.0)
    if name == "silu":
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)


def run_op(
    op: Any,
    reference: Callable[..., Tensor],
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    *args: Any,
) -> Tensor:
    """`op(*args)`, where `args` hold the three tensors, past autograd if nobody can need it.

    Autograd of a Python operator took about 10 us per call even under `torch.no_grad()`; in
    `torch.inference_mode()` torch leaves it out by itself. Where the operator is Python on a GPU,
    torch's dispatcher is passed by too, if nobody looks: a GPU waits for the host in eager mode.

    Args:
        reference: the same as plain torch, for forward-mode derivatives.
    """
    if in_forward_mode():
        return reference(*args)
    if torch.compiler.is_compiling() or _needs_autograd(input, values, bias):
        return op(*args)
    call = ON_GPU.get(op)
    if call is None or not (_is_on_gpu(input) and _nobody_looks(args[:4])):
        call = op
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return call(*args)


# Operators and what torch's dispatcher calls for them on a GPU, if that is Python.
ON_GPU: dict[Any, Callable[..., Tensor]] = {}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # of tracers that `_needs_autograd` does not see


def _is_on_gpu(input: Tensor) -> bool:
    return input.is_cuda


def _nobody_looks(tensors: tuple[Any, ...]) -> bool:
    """Whether no profiler, no tracer and no class of the tensors waits for the operator's call."""
    plain = Tensor, torch.nn.Parameter, type(None)
    return (
        all(type(tensor) in plain for tensor in tensors)
        and not torch._C._autograd._profiler_enabled()
        and not torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


def _needs_autograd(input: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    if torch.is_grad_enabled() and (
        input.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return True
    return (  # something that looks at the calls, or runs them on tensors of its own
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def is_autocast(input: Tensor) -> bool:
    """Whether torch's autocast is on for the device of `input`; meta tensors know none."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = input.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_all(
    input: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors as torch's autocast hands them to a linear layer."""
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)  # as torch does

    return cast(input), cast(values), None if bias is None else cast(bias)


def nested_rows(input: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """`call` on all rows of a nested tensor, which nn.TransformerEncoder makes from a mask."""
    parts = input.unbind()
    flat = call(torch.cat(parts))
    return torch.nested.as_nested_tensor(list(flat.split([len(part) for part in parts])))


def bias_grad(grad: Tensor) -> Tensor:
    """The gradient of a linear layer's bias from that of its result."""
    return grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad


def check_together(
    input: Tensor,
    weight: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    bias: Tensor | None,
    otherwise: str,
) -> None:
    """Checks that a call's tensors are on one device and compute in one dtype.

    Args:
        input, bias: of the layer.
        weight: the two tensors that hold it.
        dtype: of the dense weight.
        otherwise: what to do about other dtypes, besides autocast.

    Raises:
        NMError: they are not.
    """
    first, second = weight
    device = input.device
    if not (
        first.device == device
        and second.device == device
        and (bias is None or bias.device == device)
    ):
        raise NMError(
            f"input is on {input.device}, the packed weight on {first.device} and "
            f"{second.device}, the bias on {None if bias is None else bias.device}: move the whole "
            f"model with .to(device)"
        )
    if input.dtype != dtype or (bias is not None and bias.dtype != dtype):
        raise NMError(
            f"input is {input.dtype}, the packed weight {dtype}, the bias "
            f"{None if bias is None else bias.dtype}: {otherwise}, or run under torch.autocast"
        )


def check_packed_call(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    pattern: Pattern,
    activation: str,
    groups: int = 1,
) -> None:
    """Checks the arguments of a packed layer; `rows` and `cols` are of one convolution group.

    Raises:
        NMError: what does not fit, and what would.
    """
    if activation not in ACTIVATIONS:
        raise NMError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    if cols % pattern.m:
        raise NMError(f"{cols} columns are not a multiple of {pattern.m}, as {pattern} needs")
    # dynamo warns of caches, and what stands for a size has no hash
    known = type(rows) is int and type(cols) is int and not torch.compiler.is_compiling()
    expected = (_known_shapes if known else _shapes)(rows, cols, pattern, groups)
    if (values.shape, index.shape) != expected or index.dtype != torch.int32:
        raise NMError(
            f"packed tensors of shapes {tuple(values.shape)} and {tuple(index.shape)} "
            f"({index.dtype}) do not fit a ({groups * rows}, {cols}) weight with {pattern}, which "
            f"needs {expected[0]} and {expected[1]} (torch.int32)"
        )
    if bias is not None and bias.shape != (groups * rows,):
        raise NMError(f"bias of shape {tuple(bias.shape)} does not fit {groups * rows} outputs")
    check_together(
        input, (values, index), values.dtype, bias, "move the whole model with .to(dtype)"
    )
    if not values.is_contiguous() or not index.is_contiguous():
        raise NMError("packed tensors are contiguous; call .contiguous() on them")


def _shapes(rows: int, cols: int, pattern: Pattern, groups: int) -> tuple[Shape, Shape]:
    """What the packed tensors of a layer have."""
    (blocks, slots, lanes), (_, words, _) = packed_shapes(rows, cols, pattern)
    return (groups * blocks, slots, lanes), (groups * blocks, words, lanes)


_known_shapes = functools.lru_cache(1024)(_shapes)  # asked at every call
