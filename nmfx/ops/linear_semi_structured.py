"""nmfx::linear_semi_structured: y = x W^T + b with a 2:4 weight that torch compressed.

What computes it is in `nmfx.kernels.semi_structured`. Gradients flow to x and b; the weight is
constant. One node for compilers, as torch's own semi-structured products are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import NMError
from ..kernels.semi_structured import algorithm_for, decompress, multiply
from .forward_mode import in_forward_mode
from .packed import ON_GPU, bias_grad, check_together, is_autocast, nested_rows, run_op

_library = torch.library.Library("nmfx", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "linear_semi_structured(Tensor input, Tensor compressed, Tensor meta, Tensor? bias, "
    "int out_features, int in_features, ScalarType dtype, int[] algorithms=[]) -> Tensor",
    tags=_tags,
)
_library.define(
    "linear_semi_structured_grad_input(Tensor grad, Tensor compressed, Tensor meta, "
    "int out_features, int in_features, ScalarType dtype) -> Tensor",
    tags=_tags,
)
_op = torch.ops.nmfx.linear_semi_structured.default


def linear_semi_structured(
    input: Tensor,
    compressed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    algorithms: Sequence[int] = (),
) -> Tensor:
    """A linear layer whose weight is compressed; autocast as for `torch.nn.functional.linear`.

    Args:
        input: (..., in_features) of `dtype`, any strides.
        compressed, meta: from `nmfx.kernels.semi_structured.compress`.
        bias: (out_features,) or None.
        out_features, in_features, dtype: of the dense weight.
        algorithms: which to use for how many rows, see
            `nmfx.kernels.semi_structured.algorithm_for`.

    Returns:
        (..., out_features), a new contiguous tensor.

    Raises:
        NMError: shapes, dtypes or devices that do not fit, or a weight that cuSPARSELt compressed
            on a CPU.
    """
    tensors = (input, compressed, meta, bias)
    constants = (out_features, in_features, dtype, algorithms)
    if has_torch_function(tensors):  # fx proxies record this call as one node
        return handle_torch_function(linear_semi_structured, tensors, *tensors, *constants)
    if input.is_nested:
        weight = compressed, meta, bias, *constants
        return nested_rows(input, lambda rows: linear_semi_structured(rows, *weight))
    if is_autocast(input):
        target = torch.get_autocast_dtype(input.device.type)
        if dtype != target:
            raise NMError(
                f"autocast asks for {target}, and the weight was compressed as {dtype}: lower the "
                f"model after .to({target})"
            )
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    constants = (out_features, in_features, dtype, algorithms or (1, 0))
    arguments = input, compressed, meta, bias, *constants
    return run_op(_op, _decompressed_linear, input, compressed, bias, *arguments)


linear_semi_structured.__module__ = "nmfx"  # generated code reads `nmfx_linear_semi_structured(`


def _check(
    input: Tensor,
    compressed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    out: int,
    into: int,
    dtype: torch.dtype,
) -> None:
    if input.ndim == 0 or input.shape[-1] != into:
        raise NMError(f"input of shape {tuple(input.shape)} does not end in in_features={into}")
    if compressed.dtype != torch.uint8 or meta.dtype != torch.uint8:
        raise NMError(f"a compressed weight is bytes, not {compressed.dtype} and {meta.dtype}")
    if bias is not None and bias.shape != (out,):
        raise NMError(f"bias of shape {tuple(bias.shape)} does not fit {out} outputs")
    otherwise = "lower the model in the dtype that you run it in"
    check_together(input, (compressed, meta), dtype, bias, otherwise)


def _forward(
    input: Tensor,
    compressed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    out: int,
    into: int,
    dtype: torch.dtype,
    algorithms: Sequence[int] = (),
) -> Tensor:
    _check(input, compressed, meta, bias, out, into, dtype)
    x = input if input.ndim == 2 else input.reshape(-1, into)
    algorithm = algorithm_for(x.shape[0], algorithms)
    try:
        y = multiply(x, compressed, meta, bias, out, algorithm)
    except RuntimeError:
        if not algorithm:
            raise
        y = multiply(x, compressed, meta, bias, out)  # measured for other rows, and not for these
    return y if input.ndim == 2 else y.view(*input.shape[:-1], out)


def _decompressed_linear(
    input: Tensor, compressed: Tensor, meta: Tensor, bias: Tensor | None, *constants: Any
) -> Tensor:
    """The operator as plain torch. Arguments as there."""
    *weight, _ = constants
    _check(input, compressed, meta, bias, *weight)
    return F.linear(input, decompress(compressed, meta, *weight), bias)


def _forward_fake(
    input: Tensor,
    compressed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    out: int,
    into: int,
    dtype: torch.dtype,
    algorithms: Sequence[int] = (),
) -> Tensor:
    _check(input, compressed, meta, bias, out, into, dtype)
    return input.new_empty(*input.shape[:-1], out)


def _grad_input(grad: Tensor, *weight: Any) -> Tensor:
    return torch.matmul(grad, decompress(*weight))


def _grad_input_fake(
    grad: Tensor, compressed: Tensor, meta: Tensor, out: int, into: int, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], into)


for _name, _kernel, _fake in (
    ("linear_semi_structured", _forward, _forward_fake),
    ("linear_semi_structured_grad_input", _grad_input, _grad_input_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nmfx::{_name}", _fake, lib=_library)
ON_GPU[_op] = _forward


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, compressed, meta, _, *ctx.constants, _ = inputs
    ctx.save_for_backward(compressed, meta)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    compressed, meta = ctx.saved_tensors
    need_input, _, _, need_bias, *_ = ctx.needs_input_grad
    grad_input = grad_bias = None
    if need_input:
        op = torch.ops.nmfx.linear_semi_structured_grad_input
        product = _grad_input if in_forward_mode() else op
        grad_input = product(grad, compressed, meta, *ctx.constants)
    if need_bias:
        grad_bias = bias_grad(grad)
    return grad_input, None, None, grad_bias, None, None, None, None


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.compressed, ctx.meta, *ctx.constants = inputs


def _grad_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The map grad -> grad @ W is linear, and its transpose is the forward without bias.
    again = torch.ops.nmfx.linear_semi_structured(
        grad, ctx.compressed, ctx.meta, None, *ctx.constants
    )
    return again, None, None, None, None, None


torch.library.register_autograd(
    "nmfx::linear_semi_structured", _grad, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "nmfx::linear_semi_structured_grad_input",
    _grad_grad_input,
    setup_context=_save_grad_input,
    lib=_library,
)
