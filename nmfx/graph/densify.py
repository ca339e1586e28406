"""Packed and compressed calls of a graph as dense ones again: the way back from `rewrite`.

    nmfx_linear_nm(x, values, index, bias, ..., activation="relu")      becomes
    relu(linear(x, weight, bias))

and so for nmfx_conv_nm, nmfx_linear_semi_structured, nmfx_conv_semi_structured and
nmfx_linear_by_rows. The functions are those of torch.nn.functional (and torch.addmm), also where
aten operators or methods stood before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._pytree import tree_leaves

from ..ops.conv_nm import conv_nm
from ..ops.conv_semi_structured import conv_semi_structured
from ..ops.linear_by_rows import linear_by_rows
from ..ops.linear_nm import linear_nm
from ..ops.linear_semi_structured import linear_semi_structured
from .table import argument

# Where the activation stands: by position in graphs that were unpickled, which traces them again.
_ACTIVATION = {linear_nm: 8, conv_nm: 11, linear_by_rows: 7}
_LOWERED = (
    linear_nm,
    conv_nm,
    linear_semi_structured,
    conv_semi_structured,
    linear_by_rows,
)
_CONVS = {3: F.conv1d, 4: F.conv2d}
_ACTIVATIONS: dict[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "relu": (F.relu, {}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
}


def replace_with_dense(
    graph: fx.Graph, stored: str, weight: str, kind: str, shape: tuple[int, ...]
) -> None:
    """Undoes the replacements of `rewrite` that lower, for one weight.

    Args:
        graph: not recompiled here.
        stored: the attribute that the calls read first: packed values, say, or compressed.
        weight: the attribute that holds the dense weight, now or later.
        kind: "linear", "addmm" or "conv", what consumes it.
        shape: of the dense weight.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _LOWERED:
            continue
        # Two tensors, or two forms (name, tensors, constants).
        tensors = [arg for arg in tree_leaves(node.args[1:3]) if isinstance(arg, fx.Node)]
        if tensors[0].op != "get_attr" or tensors[0].target != stored:
            continue
        with graph.inserting_before(node):
            call = _dense_call(graph, node, graph.create_node("get_attr", weight), kind, shape)
        node.replace_all_uses_with(call)
        name = argument(node, _ACTIVATION.get(node.target, len(node.args)), "activation")
        insert_activation(call, name or "none")
        graph.erase_node(node)
        for tensor in dict.fromkeys(tensors):
            if not tensor.users:
                graph.erase_node(tensor)


def _dense_call(
    graph: fx.Graph, node: fx.Node, weight: fx.Node, kind: str, shape: tuple[int, ...]
) -> fx.Node:
    input, bias = node.args[0], node.args[3]
    if kind == "addmm":
        return graph.call_function(torch.addmm, (bias, input, weight))
    if kind == "conv":  # and stride, padding, dilation, groups
        return graph.call_function(_CONVS[len(shape)], (input, weight, bias, *node.args[4:8]))
    return graph.call_function(F.linear, (input, weight, bias))


def insert_activation(source: fx.Node, name: str) -> None:
    """Has all that read `source` read its activation instead; "none" changes nothing."""
    if name == "none":
        return
    function, options = _ACTIVATIONS[name]
    with source.graph.inserting_after(source):
        call = source.graph.call_function(function, (source,), dict(options))
    source.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
