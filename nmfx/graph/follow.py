"""What comes right after a layer in a graph: the batch norm or activation that could join it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .table import argument

_aten = torch.ops.aten

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    _aten.relu.default: "relu",
    _aten.relu_.default: "relu",
    F.silu: "silu",
    _aten.silu.default: "silu",
    _aten.silu_.default: "silu",
    F.gelu: "gelu",
    _aten.gelu.default: "gelu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}

# Exact types: a subclass may compute something else.
_MODULES: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.ReLU: lambda module: "relu",
    nn.SiLU: lambda module: "silu",
    nn.GELU: lambda module: _gelu(module.approximate),
}


def _gelu(approximate: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def module_activation(module: nn.Module) -> str | None:
    """The activation of `linear_nm` and `conv_nm` that a module computes, or None."""
    find = _MODULES.get(type(module))
    return None if find is None else find(module)


def touched(module: nn.Module) -> bool:
    """Whether somebody watches or replaced what a module computes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in module.__dict__ or any(getattr(module, name) for name in hooks)


def activation(
    node: fx.Node, source: fx.Node, modules: Mapping[str, nn.Module] | None = None
) -> str | None:
    """The same for a node that calls a function, method or module on `source` and nothing else."""
    if node.all_input_nodes != [source] or not node.args or node.args[0] is not source:
        return None
    if node.op == "call_module":
        module = (modules or {}).get(str(node.target))
        return None if module is None or touched(module) else module_activation(module)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    name = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if name == "gelu":
        # aten's `approximate` is keyword-only, as is F.gelu's.
        return _gelu(node.kwargs.get("approximate", "none"))
    return name


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone reads the result of `node`, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def follower(graph: fx.Graph, modules: Mapping[str, nn.Module], layer: nn.Module) -> fx.Node | None:
    """The node that alone reads what `layer` computes, in a graph that calls `layer` once.

    Args:
        graph: calls `modules` by name.
        modules: by qualified name, each under all its names.
        layer: no parameter or buffer of it may be read by the graph itself.
    """
    names = {name for name, module in modules.items() if module is layer}
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in names]
    reads = [node for node in graph.nodes if node.op == "get_attr" and _owner(node) in names]
    return only_user(calls[0]) if len(calls) == 1 and not reads else None


def called(modules: Mapping[str, nn.Module], node: fx.Node) -> Any:
    """The module that a node calls; None if it calls something else."""
    return modules.get(str(node.target)) if node.op == "call_module" else None


def followed_by_module(
    graph: fx.Graph, modules: Mapping[str, nn.Module], layer: nn.Module
) -> nn.Module | None:
    """The module that alone reads what `layer` computes, and reads only that; each called once."""
    node = follower(graph, modules, layer)
    if node is None or node.op != "call_module" or node.kwargs or len(node.args) != 1:
        return None
    module = modules[str(node.target)]
    names = {name for name, other in modules.items() if other is module}
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target in names]
    reads = [n for n in graph.nodes if n.op == "get_attr" and _owner(n) in names]
    return module if calls == [node] and not reads else None


def _owner(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0]


# --- batch norms as functions -----------------------------------------------------------------

# name of each constant -> (position, keyword), for the forms that compute in eval mode
_NORMS: dict[Any, dict[str, tuple[int, str]]] = {
    F.batch_norm: {
        "mean": (1, "running_mean"),
        "var": (2, "running_var"),
        "weight": (3, "weight"),
        "bias": (4, "bias"),
        "training": (5, "training"),
        "eps": (7, "eps"),
    },
    _aten.batch_norm.default: {
        "weight": (1, "weight"),
        "bias": (2, "bias"),
        "mean": (3, "running_mean"),
        "var": (4, "running_var"),
        "training": (5, "training"),
        "eps": (7, "eps"),
    },
    _aten._native_batch_norm_legit_no_training.default: {
        "weight": (1, "weight"),
        "bias": (2, "bias"),
        "mean": (3, "running_mean"),
        "var": (4, "running_var"),
        "eps": (6, "eps"),
    },
}


def batch_norm_arguments(node: fx.Node, source: fx.Node) -> dict[str, Any] | None:
    """mean, var, weight, bias and eps of a batch norm of `source` in eval mode, or None."""
    places = _NORMS.get(node.target) if node.op == "call_function" else None
    if places is None or argument(node, 0, "input") is not source:
        return None
    found = {name: argument(node, *place) for name, place in places.items()}
    if found.pop("training", None):
        return None
    if found["eps"] is None:
        found["eps"] = 1e-5  # F.batch_norm's default
    return found


def batch_norm_result(node: fx.Node) -> fx.Node | None:
    """The node that holds the normalised tensor: the call, or item 0 of the three it returns."""
    if node.target is not _aten._native_batch_norm_legit_no_training.default:
        return node
    item = only_user(node)
    taken = item is not None and item.target is operator.getitem and item.args[1] == 0
    return item if taken else None
