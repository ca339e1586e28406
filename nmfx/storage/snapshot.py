"""What a model is made of, remembered so that it can be put back: classes, tables, graphs.

No tensor is copied, and writes into tensors are not undone; which parameters require a gradient is.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from ..capture.site import SITES


class Snapshot:
    """The structure of a model at one moment; `restore` puts it back."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_Module(module) for module in model.modules()]

    def restore(self) -> None:
        """Makes the model what it was."""
        for module in self._modules:
            module.restore()


class _Module:
    def __init__(self, module: nn.Module) -> None:
        self._module, self._class = module, type(module)
        self._fields = dict(module.__dict__)
        # The tables stay the same objects, which others may hold.
        self._tables = [(v, copy.copy(v)) for v in self._fields.values() if isinstance(v, dict)]
        self._sites = [(site, dict(vars(site))) for site in self._fields.get(SITES, ())]
        self._grads = [(p, p.requires_grad) for p in module._parameters.values() if p is not None]
        graph = module.graph if isinstance(module, fx.GraphModule) else None
        self._graph: Any = copy.deepcopy(graph)

    def restore(self) -> None:
        if not isinstance(self._module, fx.GraphModule):  # each has a class of its own
            self._module.__class__ = self._class
        self._module.__dict__.clear()
        self._module.__dict__.update(self._fields)
        for table, content in self._tables:
            table.clear()
            table.update(content)
        for site, content in self._sites:
            vars(site).update(content)
        for parameter, requires_grad in self._grads:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        if self._graph is not None:
            self._module.graph = self._graph
