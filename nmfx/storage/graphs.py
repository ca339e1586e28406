"""A digest of what an fx graph computes, to tell whether two models run the same code."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..capture.site import Holder
from .spec import digest


def graph_digests(model: nn.Module) -> dict[str, str]:
    """Module name -> digest, for all GraphModules of a model."""
    return {
        name: digest(_text(module.graph))
        for name, module in model.named_modules()
        if isinstance(module, fx.GraphModule) and not isinstance(module, Holder)
    }


def _text(graph: fx.Graph) -> str:
    """A graph with numbers in place of the names of its nodes."""
    numbers = {node: f"%{i}" for i, node in enumerate(graph.nodes)}

    def number(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: _Name(numbers[node]))

    return "\n".join(
        f"{node.op} {_target(node.target)} {number(node.args)!r} {number(dict(node.kwargs))!r}"
        for node in graph.nodes
    )


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
