"""Activations that move into the packed layer before them: no pass of their own over the result.

    conv_nm(x, ...) -> relu        becomes        conv_nm(x, ..., activation="relu")

In a graph the activation's node goes; a child module that is called there, and nowhere else,
becomes an nn.Identity. `undo` puts modules and graphs back; `put_back` does so long after, with new
modules and nodes.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from ..errors import NMError
from ..graph.densify import insert_activation
from ..graph.follow import activation, called, only_user
from ..ops.conv_nm import conv_nm
from ..ops.linear_by_rows import linear_by_rows
from ..ops.linear_nm import linear_nm
from .forms import forms_of, packed_names
from .install import refresh
from .lowering import Target
from .neighbours import NORM_NAMES, Neighbour, Neighbours, activation_of
from .site import REPLACES, SITES, get_path

_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
}


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


def behind(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[fx.Node, fx.Node | None]:
    """Past the identities that may stand between a layer and its activation.

    An identity in the place of an activation is none of them: it says that this one is gone.

    Returns:
        The last node that computes what `node` does, and what alone reads it, or None.
    """
    source, after = node, only_user(node)
    while after is not None:
        module = called(modules, after)
        if type(module) is not nn.Identity or module.__dict__.get(REPLACES) not in (
            None,
            *NORM_NAMES,
        ):
            break
        source, after = after, only_user(after)
    return source, after


def put_back(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Gives back the activations that moved into packed layers: a new module, or a new node.

    The layers still apply them; the caller restores their classes.

    Args:
        model: to be changed.
        layers: of leaf capture, with an activation; by the names of their weights.

    Raises:
        NMError: the place of one is not there. The model may be changed in part.
    """
    callers = Neighbours(model, layers.values(), trace=False)
    waiting: dict[str, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        caller, what = callers.caller(layer), layer.__dict__[SITES][0].activation
        if not isinstance(caller, fx.GraphModule) or not _insert_behind(caller, layer, what):
            waiting[what].append(name)
    identities = _identities(model)
    for what, names in waiting.items():
        if len(names) > len(identities[what]):
            raise NMError(
                f"{names[0]}: it applies the {what} that stood behind it, and the nn.Identity in "
                f"its place is gone; fold the whole model that nmfx.lower made"
            )
    for what, found in identities.items():
        if len(found) > len(waiting[what]):
            raise NMError(
                f"{len(found)} nn.Identity stand for a {what} that moved into a layer, and "
                f"{len(waiting[what])} such layers are here; fold the whole model that nmfx.lower "
                f"made"
            )
        for old, places in found.items():
            new = _MODULES[what]()
            new.__dict__.update(old.__dict__)  # its mode, and the hooks it may have got
            del new.__dict__[REPLACES]
            for table, key in places:
                table[key] = new


def _insert_behind(gm: fx.GraphModule, layer: nn.Module, what: str) -> bool:
    """Puts an activation behind the calls of a layer; False if a module is to do it, or nothing."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    ends = [behind(node, modules) for node in gm.graph.nodes if called(modules, node) is layer]
    for _, after in ends:
        module = None if after is None else called(modules, after)
        if type(module) is nn.Identity:  # traced after it was lowered
            return False
    for source, _ in ends:
        insert_activation(source, what)
    gm.recompile()
    return bool(ends)


def _identities(model: nn.Module) -> dict[str, dict[nn.Module, list[tuple[dict[str, Any], str]]]]:
    """What stands in place of activations: activation -> identity -> all its places."""
    found: dict[str, dict[nn.Module, list[tuple[dict[str, Any], str]]]] = defaultdict(dict)
    for owner in model.modules():
        for key, child in owner._modules.items():
            what = None if child is None else child.__dict__.get(REPLACES)
            if child is not None and what in _MODULES:
                found[what].setdefault(child, []).append((owner._modules, key))
    return found
