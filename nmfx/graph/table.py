"""Which operators consume a weight, which argument it is, and which dimension they sum over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_aten = torch.ops.aten


@dataclass(frozen=True)
class Consumer:
    """How an operator takes its weight.

    Attributes:
        position, keyword: where the weight stands in the operator's arguments.
        dim: the dimension of the weight that the operator sums over, and so the group dimension.
        family: "linear", "addmm", "conv" or "conv_transpose".
    """

    position: int
    keyword: str
    dim: int
    family: str


_LINEAR = Consumer(1, "weight", 1, "linear")  # (out, in)
_ADDMM = Consumer(2, "mat2", 0, "addmm")  # (in, out), as in Hugging Face's Conv1D
_CONV = Consumer(1, "weight", 1, "conv")  # (out, in / groups, *kernel)
_CONV_TRANSPOSE = Consumer(1, "weight", 0, "conv_transpose")  # (in, out / groups, *kernel)

TABLE: dict[Any, Consumer] = {
    F.linear: _LINEAR,
    _aten.linear.default: _LINEAR,
    torch.addmm: _ADDMM,
    _aten.addmm.default: _ADDMM,
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    _aten.conv1d.default: _CONV,
    _aten.conv1d.padding: _CONV,
    _aten.conv2d.default: _CONV,
    _aten.conv2d.padding: _CONV,
    _aten.conv3d.default: _CONV,
    _aten.conv3d.padding: _CONV,
    _aten.convolution.default: _CONV,  # or transposed, see `consumer_of`
    F.conv_transpose1d: _CONV_TRANSPOSE,
    F.conv_transpose2d: _CONV_TRANSPOSE,
    F.conv_transpose3d: _CONV_TRANSPOSE,
    _aten.conv_transpose1d.default: _CONV_TRANSPOSE,
    _aten.conv_transpose2d.input: _CONV_TRANSPOSE,
    _aten.conv_transpose3d.input: _CONV_TRANSPOSE,
}

# aten::convolution(input, weight, bias, stride, padding, dilation, transposed, ...)
_TRANSPOSED_POSITION = 6


def consumer_of(node: fx.Node) -> Consumer | None:
    """The table's entry for a node, or None if it does not consume a weight."""
    if node.op != "call_function":
        return None
    consumer = TABLE.get(node.target)
    if node.target is _aten.convolution.default:
        transposed = argument(node, _TRANSPOSED_POSITION, "transposed")
        return _CONV_TRANSPOSE if transposed else _CONV
    return consumer


def argument(node: fx.Node, position: int, keyword: str) -> Any:
    """An argument of a call that may have been given by position or by keyword; None if absent."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword)


def groups_argument(node: fx.Node) -> Any:
    """The `groups` of a convolution node: an int, an fx.Node read at run time, or the default 1."""
    position = 8 if node.target is _aten.convolution.default else 6
    groups = argument(node, position, "groups")
    return 1 if groups is None else groups


def conv_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a call of a convolution, with torch's defaults."""
    names = ["stride", "padding", "dilation", "groups"]
    if target is _aten.convolution.default:
        names = [*names[:3], "transposed", "output_padding", "groups"]
    given = {**dict(zip(names, args[3:], strict=False)), **kwargs}
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {name: given.get(name, default) for name, default in defaults.items()}
