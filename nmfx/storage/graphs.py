"""A digest of what an fx graph computes, to tell whether two models run the same code.

    weight = self.fc.weight; linear = aten.linear(x, weight); relu = linear.relu()

    %0 placeholder x
    %1 linear %0 @fc.weight None            and whatever reads the last reads relu(%1)

Nodes have numbers, as their names say nothing. Attributes and activations are written where they
are read, and linear layers, convolutions and activations in one way, whichever function computes
them: `nmfx.fold` puts torch.nn.functional's where aten operators or modules stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ..capture.holder import Holder
from ..graph.follow import activation, called, module_activation, only_user
from ..graph.table import argument, consumer_of, conv_arguments
from .spec import digest


def graph_digests(model: nn.Module) -> dict[str, str]:
    """Module name -> digest, for all GraphModules of a model."""
    return {
        name: digest(_text(module))
        for name, module in model.named_modules()
        if isinstance(module, fx.GraphModule) and not isinstance(module, Holder)
    }


def _text(gm: fx.GraphModule) -> str:
    modules = dict(gm.named_modules(remove_duplicate=False))
    words: dict[fx.Node, _Word] = {}
    lines: list[str] = []
    for node in gm.graph.nodes:
        what = _activation(node, modules)
        if node.op == "get_attr":
            words[node] = _Word(f"@{node.target}")
        elif what is not None:
            words[node] = _Word(f"{what}({words[node.all_input_nodes[0]]})")
        else:
            words[node] = _Word(f"%{len(lines)}")
            lines.append(" ".join(_said(part, words) for part in _parts(node)))
    return "\n".join(lines)


def _activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The activation that a node computes of something that nothing else reads, or None."""
    inputs = node.all_input_nodes
    if len(inputs) != 1 or only_user(inputs[0]) is not node:
        return None
    module = called(modules, node)
    if module is None:
        return activation(node, inputs[0])
    plain = node.args == (inputs[0],) and not node.kwargs
    return module_activation(module) if plain else None  # also if somebody watches it


def _parts(node: fx.Node) -> tuple[Any, ...]:
    consumer = consumer_of(node)
    family = None if consumer is None else consumer.family
    operands = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    if family == "linear":
        return (_Word(family), *operands)
    if family == "conv":
        rest = conv_arguments(node.target, node.args, node.kwargs)
        return (_Word(family), *operands, *rest.values())
    if family == "addmm" and len(node.args) == 3 and not node.kwargs:
        return (_Word(family), *node.args)
    return _Word(node.op), _Word(_target(node.target)), node.args, dict(node.kwargs)


def _said(value: Any, words: Mapping[fx.Node, _Word]) -> str:
    return repr(fx.node.map_arg(value, lambda node: words[node]))


class _Word(str):
    def __repr__(self) -> str:
        return str(self)


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
