"""linear_by_rows: a linear layer whose weight is held in two forms, and which rows get which.

    rows <= threshold       the form for few rows: packed, say (a decoding step)
    rows > threshold        the form for many: dense, say (a prompt)

A form is a tuple of its name, its tensors and its constants:

    ("packed", values, index, n, m)                   nmfx.linear_nm
    ("semi_structured", compressed, meta, dtype, algorithms)    linear_semi_structured
    ("dense", weight, transposed)                     F.linear, or torch.addmm if it is transposed

The number of rows is known on the host, so nothing waits for a GPU; under torch.compile and
torch.export the comparison is a guard, and only one side is in the code. In eager mode it all takes
1.1 us more than the operator alone (AMD EPYC, Python 3.11), and a module 0.9 us more for each
tensor of the other form that it looks up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..errors import NMError
from .linear_nm import linear_nm
from .linear_semi_structured import linear_semi_structured
from .packed import ACTIVATIONS

Form = tuple[Any, ...]


def linear_by_rows(
    input: Tensor,
    few: Form,
    many: Form,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    threshold: int,
    activation: str = "none",
) -> Tensor:
    """A linear layer with one form of its weight for few rows and another one for many.

    Gradients reach input and bias. The weight is constant: training one of its forms would leave
    the other behind.

    Args:
        input: (..., in_features).
        few, many: forms of the same (out_features, in_features) weight.
        bias: (out_features,) or None.
        out_features, in_features: of the dense weight.
        threshold: inputs of up to so many rows, all dimensions but the last one together, use
            `few`.
        activation: applied to the result, as for `nmfx.linear_nm`.

    Returns:
        (..., out_features), a new tensor, bit for bit what the operator of the form returns.

    Raises:
        NMError: a weight that requires a gradient, and what the operator raises.
    """
    if has_torch_function_variadic(input, few[1], many[1], bias):
        tensors = (input, few[1], many[1], bias)  # fx proxies record this call as one node
        constants = (out_features, in_features, threshold, activation)
        return handle_torch_function(linear_by_rows, tensors, input, few, many, bias, *constants)
    if torch.is_grad_enabled() and (few[1].requires_grad or many[1].requires_grad):
        raise NMError(
            "a weight that is held in two forms has no gradient: train the sparsified model and "
            "lower it again, or freeze it with weight.requires_grad_(False)"
        )
    # One function and no table of functions: each further call costs what the comparison does.
    form = few if input.numel() // in_features <= threshold else many
    if form[0] == "packed":
        _, values, index, n, m = form
        return linear_nm(input, values, index, bias, out_features, in_features, n, m, activation)
    if form[0] == "semi_structured":
        weight = form[1], form[2], bias, out_features, in_features, *form[3:]
        y = linear_semi_structured(input, *weight)
    elif form[2]:
        y = torch.addmm(bias, input, form[1])  # type: ignore[arg-type]  # it has a bias
    else:
        y = F.linear(input, form[1], bias)
    return y if activation == "none" else ACTIVATIONS[activation](y)


linear_by_rows.__module__ = "nmfx"  # generated code reads `nmfx_linear_by_rows(...)`
