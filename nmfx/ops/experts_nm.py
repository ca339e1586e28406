"""nmfx::experts_nm: the products of a mixture of experts, whose matrices are packed N:M.

    rows of the input       0 .. offsets[0]        offsets[0] .. offsets[1]     ...
    packed weight           of expert 0            of expert 1

One operator, so that a compiler sees neither the loop nor the numbers of rows, which the data tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import NMError
from ..packing import unpack
from ..pattern import Pattern
from .forward_mode import in_forward_mode
from .linear_nm import linear_nm
from .packed import autocast_all, is_autocast

_library = torch.library.Library("nmfx", "FRAGMENT")
for _name in ("experts_nm", "experts_nm_grad_input"):
    _library.define(
        f"{_name}(Tensor input, Tensor values, Tensor index, Tensor offsets, "
        "int out_features, int in_features, int n, int m) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def experts_nm(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
) -> Tensor:
    """Each row of `input` times the matrix of its expert, transposed.

    Args:
        input: (rows, in_features), sorted by expert, the dtype of `values`.
        values, index: the packed (experts * out_features, in_features) weight, see `nmfx.packing`;
            `out_features` fills whole blocks.
        offsets: (experts,) integers, where the rows of each expert end.
        out_features, in_features: of one expert.
        n, m: the pattern.

    Returns:
        (rows, out_features); zeros for rows beyond the last offset.

    Raises:
        NMError: shapes, dtypes or devices that do not fit.
    """
    if input.ndim != 2 or input.shape[1] != in_features or offsets.ndim != 1:
        raise NMError(
            f"experts take (rows, {in_features}) and one offset per expert, got "
            f"{tuple(input.shape)} and {tuple(offsets.shape)}"
        )
    if is_autocast(input):
        input, values, _ = autocast_all(input, values, None)
    constants = out_features, in_features, n, m
    product = _forward if in_forward_mode() else torch.ops.nmfx.experts_nm.default
    return product(input, values, index, offsets, *constants)


def _parts(offsets: Tensor, *packed: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """(rows, packed weight) of every expert that has rows."""
    begin, blocks = 0, packed[0].shape[0] // max(1, len(offsets))
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            own = slice(expert * blocks, (expert + 1) * blocks)
            yield slice(begin, end), tuple(tensor[own] for tensor in packed)
            begin = end


def _forward(
    input: Tensor, values: Tensor, index: Tensor, offsets: Tensor, *constants: int
) -> Tensor:
    out, into, n, m = constants
    output = input.new_zeros(len(input), out)
    for rows, (own_values, own_index) in _parts(offsets, values, index):
        output[rows] = linear_nm(input[rows], own_values, own_index, None, out, into, n, m)
    return output


def _grad_input(
    grad: Tensor, values: Tensor, index: Tensor, offsets: Tensor, *constants: int
) -> Tensor:
    out, into, n, m = constants
    output = grad.new_zeros(len(grad), into)
    for rows, (own_values, own_index) in _parts(offsets, values, index):
        output[rows] = grad[rows] @ unpack(own_values, own_index, out, into, Pattern(n, m))
    return output


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, index, offsets, *ctx.constants = inputs
    if values.requires_grad:
        raise NMError("a packed weight has no gradient: values.requires_grad_(False)")
    ctx.save_for_backward(values, index, offsets)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    op = torch.ops.nmfx.experts_nm_grad_input.default
    product = _grad_input if in_forward_mode() else op
    return product(grad, *ctx.saved_tensors, *ctx.constants), *[None] * 7


def _grad_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # grad -> grad @ W is linear, and its transpose is the forward.
    found = torch.ops.nmfx.experts_nm.default(grad, *ctx.saved_tensors, *ctx.constants)
    return found, *[None] * 7


for _name, _kernel, _size, _backward in (
    ("experts_nm", _forward, 4, _grad),
    ("experts_nm_grad_input", _grad_input, 5, _grad_grad),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"nmfx::{_name}",
        lambda *args, size=_size: args[0].new_empty(args[0].shape[0], args[size]),
        lib=_library,
    )
    torch.library.register_autograd(f"nmfx::{_name}", _backward, setup_context=_save, lib=_library)
