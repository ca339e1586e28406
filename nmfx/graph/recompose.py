"""Linear layers of decomposed graphs, put together again.

    permute = aten.permute(weight, [1, 0])           becomes
    aten.addmm(bias, x, permute)                     aten.linear(x, weight, bias)
    aten.mm(x, permute)                              aten.linear(x, weight)

`ExportedProgram.run_decompositions` makes these of a linear layer; this way its weight is seen as
one. What else reads a transposed weight stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_SWAPS: dict[Any, tuple[Any, ...]] = {
    _aten.permute.default: ([1, 0],),
    _aten.t.default: (),
    _aten.transpose.int: (0, 1),
}


def decomposed_linears(
    graph: fx.Graph, is_parameter: Callable[[Any, int], bool]
) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]]:
    """(the product, its input, weight, bias) of each.

    Args:
        graph: of aten operators.
        is_parameter: whether a node is a parameter with so many dimensions.
    """
    for node in graph.nodes:
        if node.op != "call_function" or node.kwargs:
            continue
        if node.target is _aten.addmm.default:
            bias, x, swapped = node.args
            if not is_parameter(bias, 1):
                continue
        elif node.target is _aten.mm.default:
            bias, (x, swapped) = None, node.args
        else:
            continue
        swaps = swapped.target in _SWAPS and tuple(swapped.args[1:]) == _SWAPS[swapped.target]
        if swaps and is_parameter(swapped.args[0], 2):
            yield node, x, swapped.args[0], bias


def recompose_linears(graph: fx.Graph, is_parameter: Callable[[Any, int], bool]) -> int:
    """Replaces all of them; returns how many. The graph is to be recompiled then."""
    found = list(decomposed_linears(graph, is_parameter))
    for node, x, weight, bias in found:
        swapped = node.args[-1]
        assert isinstance(swapped, fx.Node)
        with graph.inserting_before(node):
            arguments = (x, weight) if bias is None else (x, weight, bias)
            call = graph.call_function(_aten.linear.default, arguments)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        if not swapped.users:
            graph.erase_node(swapped)
    return len(found)
