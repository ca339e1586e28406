"""nmfx::linear_nm: y = x W^T + b with W in the packed N:M format of `packing.py`.

The kernel here is the reference: it unpacks W and multiplies dense, so it is exact and portable,
and slower than a dense layer. Gradients flow to x and b; the packed weight is constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import NMError
from ..packing import packed_shapes, unpack
from ..pattern import Pattern

_library = torch.library.Library("nmfx", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "linear_nm(Tensor input, Tensor values, Tensor index, Tensor? bias, "
    "int in_features, int n, int m) -> Tensor",
    tags=_tags,
)
_library.define(
    "linear_nm_grad_input(Tensor grad, Tensor values, Tensor index, "
    "int in_features, int n, int m) -> Tensor",
    tags=_tags,
)


def linear_nm(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    in_features: int,
    n: int,
    m: int,
) -> Tensor:
    """A linear layer whose weight is packed; autocast as for `torch.nn.functional.linear`.

    Args:
        input: (..., in_features), the dtype of `values`.
        values: (out_features, in_features / m * n), see `nmfx.packing`.
        index: (out_features, bytes), uint8.
        bias: (out_features,) or None.
        in_features: columns of the dense weight.
        n, m: the pattern.

    Returns:
        (..., out_features), a new tensor.

    Raises:
        NMError: shapes or dtypes that do not fit, or a packed weight that requires a gradient.
    """
    tensors = (input, values, index, bias)
    if has_torch_function(tensors):  # fx proxies record this call as one node
        return handle_torch_function(linear_nm, tensors, *tensors, in_features, n, m)
    if input.is_nested:  # nn.TransformerEncoder makes these from a padding mask
        parts = input.unbind()
        flat = linear_nm(torch.cat(parts), values, index, bias, in_features, n, m)
        return torch.nested.as_nested_tensor(list(flat.split([len(part) for part in parts])))
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, values = _autocast(input, dtype), _autocast(values, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    return torch.ops.nmfx.linear_nm(input, values, index, bias, in_features, n, m)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)  # as torch does


linear_nm.__module__ = "nmfx"  # generated code reads `nmfx_linear_nm(...)`


def _check(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    in_features: int,
    pattern: Pattern,
) -> None:
    if input.ndim == 0 or input.shape[-1] != in_features:
        raise NMError(
            f"input of shape {tuple(input.shape)} does not end in in_features={in_features}"
        )
    expected = packed_shapes(values.shape[0], in_features, pattern)
    if (tuple(values.shape), tuple(index.shape)) != expected or index.dtype != torch.uint8:
        raise NMError(
            f"packed tensors of shapes {tuple(values.shape)} and {tuple(index.shape)} "
            f"({index.dtype}) do not fit in_features={in_features} and {pattern}, which need "
            f"{expected[0]} and {expected[1]} (torch.uint8)"
        )
    if bias is not None and tuple(bias.shape) != (values.shape[0],):
        raise NMError(f"bias of shape {tuple(bias.shape)} does not fit {values.shape[0]} outputs")
    dtypes = {input.dtype, values.dtype, values.dtype if bias is None else bias.dtype}
    if len(dtypes) > 1:
        raise NMError(
            f"input is {input.dtype}, the packed weight {values.dtype}, the bias "
            f"{None if bias is None else bias.dtype}: move the whole model with .to(dtype), "
            f"or run under torch.autocast"
        )


def _forward(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    in_features: int,
    n: int,
    m: int,
) -> Tensor:
    pattern = Pattern(n, m)
    _check(input, values, index, bias, in_features, pattern)
    return F.linear(input, unpack(values, index, in_features, pattern), bias)


def _forward_fake(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    in_features: int,
    n: int,
    m: int,
) -> Tensor:
    _check(input, values, index, bias, in_features, Pattern(n, m))
    return input.new_empty(*input.shape[:-1], values.shape[0])


def _grad_input(
    grad: Tensor, values: Tensor, index: Tensor, in_features: int, n: int, m: int
) -> Tensor:
    return torch.matmul(grad, unpack(values, index, in_features, Pattern(n, m)))


def _grad_input_fake(
    grad: Tensor, values: Tensor, index: Tensor, in_features: int, n: int, m: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


for _name, _kernel, _fake in (
    ("linear_nm", _forward, _forward_fake),
    ("linear_nm_grad_input", _grad_input, _grad_input_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nmfx::{_name}", _fake, lib=_library)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, index, _, *ctx.constants = inputs
    if values.requires_grad:
        raise NMError(
            "a packed weight has no gradient: train the sparsified model and lower it again, or "
            "freeze it with values.requires_grad_(False)"
        )
    ctx.save_for_backward(values, index)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, index = ctx.saved_tensors
    need_input, _, _, need_bias, *_ = ctx.needs_input_grad
    grad_input = (
        torch.ops.nmfx.linear_nm_grad_input(grad, values, index, *ctx.constants)
        if need_input
        else None
    )
    grad_bias = grad.flatten(0, -2).sum(0) if need_bias and grad.ndim > 1 else None
    if need_bias and grad.ndim == 1:
        grad_bias = grad
    return grad_input, None, None, grad_bias, None, None, None


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.values, ctx.index, *ctx.constants = inputs


def _grad_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The map grad -> grad @ W is linear, and its transpose is the forward without bias.
    again = torch.ops.nmfx.linear_nm(grad, ctx.values, ctx.index, None, *ctx.constants)
    return again, None, None, None, None, None


torch.library.register_autograd("nmfx::linear_nm", _grad, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "nmfx::linear_nm_grad_input", _grad_grad_input, setup_context=_save_grad_input, lib=_library
)
