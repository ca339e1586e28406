"""All or nothing: modules as they were, if what follows fails."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import fx, nn

_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def restored_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores class, attributes, tables and graph of `modules` when the block raises.

    Tensors are kept by reference, so the block must replace them rather than write into them.
    """
    unique = list(dict.fromkeys(modules))
    states = [
        {k: copy.copy(v) if k in _TABLES else v for k, v in module.__dict__.items()}
        for module in unique
    ]
    classes = [type(module) for module in unique]
    graphs = [copy.deepcopy(m.graph) if isinstance(m, fx.GraphModule) else None for m in unique]
    try:
        yield
    except BaseException:  # Ctrl-C too
        for module, state, cls, graph in zip(unique, states, classes, graphs, strict=True):
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
            if graph is not None:
                assert isinstance(module, fx.GraphModule)
                module.graph = graph
        raise
