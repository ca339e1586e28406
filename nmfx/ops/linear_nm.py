"""nmfx::linear_nm: y = activation(x W^T + b) with W in the packed N:M format of `packing.py`.

On CPU tensors the native kernels run (`nmfx.kernels.cpu`); the kernel here is the reference for all
other devices, and for a CPU without the library: it unpacks W and multiplies dense. Gradients flow
to x and b; the packed weight is constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import NMError
from ..packing import unpack
from ..pattern import Pattern
from .forward_mode import in_forward_mode
from .packed import (
    ACTIVATIONS,
    activation_grad,
    autocast_all,
    bias_grad,
    check_packed_call,
    is_autocast,
    nested_rows,
    run_op,
)

_library = torch.library.Library("nmfx", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "linear_nm(Tensor input, Tensor values, Tensor index, Tensor? bias, "
    "int out_features, int in_features, int n, int m, str activation) -> Tensor",
    tags=_tags,
)
_library.define(
    "linear_nm_grad_input(Tensor grad, Tensor values, Tensor index, "
    "int out_features, int in_features, int n, int m) -> Tensor",
    tags=_tags,
)
_op = torch.ops.nmfx.linear_nm.default


def linear_nm(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    activation: str = "none",
) -> Tensor:
    """A linear layer whose weight is packed; autocast as for `torch.nn.functional.linear`.

    Args:
        input: (..., in_features), the dtype of `values`.
        values, index: the packed (out_features, in_features) weight, see `nmfx.packing`.
        bias: (out_features,) or None.
        out_features, in_features: of the dense weight.
        n, m: the pattern.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", applied to the result.

    Returns:
        (..., out_features), a new tensor.

    Raises:
        NMError: shapes, dtypes or devices that do not fit, or a packed weight that requires a
            gradient.
    """
    tensors = (input, values, index, bias)
    constants: tuple[Any, ...] = (out_features, in_features, n, m, activation)
    if has_torch_function(tensors):  # fx proxies record this call as one node
        return handle_torch_function(linear_nm, tensors, *tensors, *constants)
    if input.is_nested:
        return nested_rows(input, lambda rows: linear_nm(rows, values, index, bias, *constants))
    if is_autocast(input):
        input, values, bias = autocast_all(input, values, bias)
    try:
        return run_op(
            _op, unpacked_linear, input, values, bias, input, values, index, bias, *constants
        )
    except RuntimeError:
        # The native kernel only says that something does not fit. Here it is found out what.
        _check(input, values, index, bias, *constants)
        raise


linear_nm.__module__ = "nmfx"  # generated code reads `nmfx_linear_nm(...)`


def _check(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    activation: str,
) -> None:
    if input.ndim == 0 or input.shape[-1] != in_features:
        raise NMError(
            f"input of shape {tuple(input.shape)} does not end in in_features={in_features}"
        )
    check_packed_call(
        input, values, index, bias, out_features, in_features, Pattern(n, m), activation
    )


def unpacked_linear(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    activation: str,
) -> Tensor:
    """The reference of `nmfx::linear_nm`: arguments and result are the operator's."""
    _check(input, values, index, bias, out_features, in_features, n, m, activation)
    weight = unpack(values, index, out_features, in_features, Pattern(n, m))
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


def _forward_fake(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    activation: str,
) -> Tensor:
    _check(input, values, index, bias, out_features, in_features, n, m, activation)
    return input.new_empty(*input.shape[:-1], out_features)


def _grad_input(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
) -> Tensor:
    return torch.matmul(grad, unpack(values, index, out_features, in_features, Pattern(n, m)))


def _grad_input_fake(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


for _name, _kernel, _fake in (
    ("linear_nm", unpacked_linear, _forward_fake),
    ("linear_nm_grad_input", _grad_input, _grad_input_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nmfx::{_name}", _fake, lib=_library)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, index, bias, *ctx.constants, ctx.activation = inputs
    if values.requires_grad:
        raise NMError(
            "a packed weight has no gradient: train the sparsified model and lower it again, or "
            "freeze it with values.requires_grad_(False)"
        )
    # The input of the activation is computed again in backward; without one nothing needs it.
    again = (input, bias) if ctx.activation != "none" else (None, None)
    ctx.save_for_backward(values, index, *again)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, index, input, bias = ctx.saved_tensors
    need_input, _, _, need_bias, *_ = ctx.needs_input_grad
    if ctx.activation != "none":
        plain = torch.ops.nmfx.linear_nm(input, values, index, bias, *ctx.constants, "none")
        grad = activation_grad(ctx.activation, grad, plain)
    # A backward of a recorded graph whose gradient has a tangent: see forward_mode.py.
    product = _grad_input if in_forward_mode() else torch.ops.nmfx.linear_nm_grad_input
    grad_input = product(grad, values, index, *ctx.constants) if need_input else None
    grad_bias = bias_grad(grad) if need_bias else None
    return grad_input, None, None, grad_bias, None, None, None, None, None


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.values, ctx.index, *ctx.constants = inputs


def _grad_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The map grad -> grad @ W is linear, and its transpose is the forward without bias.
    again = torch.ops.nmfx.linear_nm(grad, ctx.values, ctx.index, None, *ctx.constants, "none")
    return again, None, None, None, None, None, None


torch.library.register_autograd("nmfx::linear_nm", _grad, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "nmfx::linear_nm_grad_input", _grad_grad_input, setup_context=_save_grad_input, lib=_library
)
