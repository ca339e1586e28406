"""Joins a mask and the only layer that reads it into one call, for code that runs eagerly.

    sr_ste = nmfx_sr_ste(weight, control, 4, 1)
    linear = linear(x, sr_ste, bias)                becomes
    linear = nmfx_masked_linear(x, weight, bias, control, 4, 1)

and so for nmfx_keep, addmm and convolutions. The call is the same to compilers and tracers, which
look into it (ops/masked.py).

Requires: nodes as `insert_sr_ste` and `insert_keep` make them.
Ensures: everything else stays, as do masks with several readers or one without a joined call.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from ..ops.masked import masked_addmm, masked_conv, masked_linear
from .rewrite import added, find_inserted
from .table import argument, consumer_of, conv_arguments

_CONV_DIMS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


def fuse_masks(graph: fx.Graph) -> int:
    """Joins what can be joined, in place; returns how many calls were made."""
    count = 0
    for mask in find_inserted(graph):
        users = list(mask.users)
        if len(users) == 1 and _fuse(graph, mask, users[0]):
            graph.erase_node(mask)
            count += 1
    return count


def _fuse(graph: fx.Graph, mask: fx.Node, node: fx.Node) -> bool:
    consumer = consumer_of(node)
    if consumer is None or argument(node, consumer.position, consumer.keyword) is not mask:
        return False
    weight, side, *constants = mask.args
    m, dim = constants or (1, 0)  # of no account for a fixed mask
    input, bias = argument(node, 0, "input"), argument(node, 2, "bias")
    with graph.inserting_before(node):
        if consumer.family == "linear":
            call = graph.call_function(masked_linear, (input, weight, bias, side, m, dim))
        elif consumer.family == "addmm" and not node.kwargs.keys() & {"alpha", "beta"}:
            input = argument(node, 1, "mat1")
            call = graph.call_function(masked_addmm, (added(node), input, weight, side, m, dim))
        elif node.target in _CONV_DIMS:
            rest = conv_arguments(node.target, node.args, node.kwargs).values()
            arguments = (_CONV_DIMS[node.target], input, weight, bias, *rest, side, m, dim)
            call = graph.call_function(masked_conv, arguments)
        else:
            return False
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return True
