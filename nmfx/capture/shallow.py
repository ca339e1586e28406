"""The forward of one module as a graph in which every module that it calls is a single node.

It is only looked at, to prove that a batch norm or an activation reads nothing but the layer before
it; nothing is generated from it. Branches that depend on the module itself are followed as they go
today, those that depend on optional arguments both ways.
"""

from __future__ import annotations

import inspect

from torch import fx, nn

from .generate import base_class
from .tracer import ThreadAwareTracer, Untraceable


class _Tracer(ThreadAwareTracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def shallow_graphs(module: nn.Module) -> list[fx.Graph]:
    """The graphs of a module's forward, with all arguments given and with optional ones left out.

    Raises:
        Untraceable: its control flow depends on values.
    """
    if "forward" in module.__dict__:
        raise Untraceable("its forward was replaced on the instance")
    base = base_class(module)
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    defaults = {
        p.name: p.default
        for p in parameters
        if p.default is None or isinstance(p.default, (bool, int, float, str))
    }
    graphs = []
    for given in [{}, defaults] if defaults else [{}]:
        try:
            graphs.append(_Tracer().trace(_stand_in(module, base), given or None))
        except Exception as error:
            # Whatever a foreign forward raises when it meets a proxy means the same.
            raise Untraceable(f"{base.__name__}.forward does not trace: {error}") from error
    return graphs


def _stand_in(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """A shallow copy: what a forward sets on itself while it is traced must not stay."""
    copy = object.__new__(base)
    tables = {name: dict(getattr(module, name)) for name in ("_parameters", "_buffers", "_modules")}
    copy.__dict__.update(module.__dict__, **tables)
    return copy
