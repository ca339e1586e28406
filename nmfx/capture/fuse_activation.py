"""Activations that move into the packed layer before them: no pass of their own over the result.

    conv_nm(x, ...) -> relu        becomes        conv_nm(x, ..., activation="relu")

In a graph the activation's node goes; a child module that is called there, and nowhere else,
becomes an nn.Identity. `undo` puts modules and graphs back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ..graph.follow import activation, only_user
from ..ops.conv_nm import conv_nm
from ..ops.linear_by_rows import linear_by_rows
from ..ops.linear_nm import linear_nm
from .install import refresh
from .lowering import Target
from .neighbours import Neighbour, activation_of
from .site import REPLACES, SITES, forms_of, get_path, packed_names


class ActivationFusing:
    """Fuses activations into packed layers, and undoes that."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self._graphs: dict[fx.GraphModule, fx.Graph] = {}

    def undo(self) -> None:
        """Puts back the modules that became identities, and graphs as they were at the first."""
        while self._graphs:
            gm, graph = next(iter(self._graphs.items()))
            gm.graph = graph
            del self._graphs[gm]
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def fuse_module(self, target: Target, layer: nn.Module, pair: Neighbour) -> str | None:
        """Fuses what `pair` shows behind a packed layer; the name of the activation, or None.

        Args:
            target: packed, of leaf capture.
            layer: its module.
            pair: what stands behind it.
        """
        name = activation_of(pair)
        if name is None or "packed" not in forms_of(target.state):
            return None
        second = pair.second
        if not isinstance(second, nn.Module):
            self._keep(pair.caller)
        site = layer.__dict__[SITES][0]
        site.activation = name
        refresh(layer, layer)
        if isinstance(second, nn.Module):
            table, key = pair.place_of_second()
            self._steps.append(lambda: table.__setitem__(key, second))
            table[key] = nn.Identity().train(second.training)
            table[key].__dict__[REPLACES] = name
        else:
            assert isinstance(pair.caller, fx.GraphModule)
            _drop(second)
            pair.caller.recompile()
        return name

    def _keep(self, gm: nn.Module) -> None:
        assert isinstance(gm, fx.GraphModule)
        if gm not in self._graphs:
            self._graphs[gm] = copy.deepcopy(gm.graph)

    def fuse_graph(self, target: Target) -> str | None:
        """Fuses what stands behind all uses of a packed weight in a graph; or None."""
        gm, path = target.candidate.host, target.candidate.path
        assert isinstance(gm, fx.GraphModule)
        if "packed" not in forms_of(target.state):
            return None
        values = get_path(gm, packed_names(path)[0])
        modules = dict(gm.named_modules(remove_duplicate=False))
        names: list[str] = []
        for node in list(gm.graph.nodes):
            if not _reads(gm, node, values):
                continue
            after = only_user(node)
            name = None if after is None else activation(after, node, modules)
            if after is None or name is None or "activation" in node.kwargs:
                continue
            self._keep(gm)
            node.update_kwarg("activation", name)
            _drop(after)
            names.append(name)
        if names:
            gm.recompile()
        return ", ".join(dict.fromkeys(names)) or None


def _reads(gm: fx.GraphModule, node: fx.Node, values: Tensor) -> bool:
    """Whether a node is a layer on these packed values."""
    if node.op != "call_function" or node.target not in (linear_nm, conv_nm, linear_by_rows):
        return False
    weight: Any = node.args[1]
    if node.target is linear_by_rows:  # ("packed", values, ...) comes first, if it is there
        weight = weight[1]
    return get_path(gm, str(weight.target)) is values


def _drop(node: fx.Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)
