"""nmfx.trace: the whole model as one fx graph, to look at or to transform further."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .capture.generate import is_generated
from .capture.refs import sites_of
from .capture.site import SITES
from .capture.tracer import ThreadAwareTracer
from .errors import NMError


class _Tracer(ThreadAwareTracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_generated(type(m)):
            sites = m.__dict__[SITES]
            if sites and sites[0].capture == "leaf":
                return False  # generated straight-line code: its sr_ste becomes visible
        return super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """One fx graph of a sparsified model, its `nmfx_sr_ste` nodes visible: `print(gm.code)`.

    Without example arguments the model is traced symbolically, by a tracer that leaves other
    threads alone; attention modules stay single call_module nodes. With them it goes through
    torch.export, which follows control flow that fx cannot, for inputs like these.

    The graph shares the parameters of `model`; lambda and N are those of now.

    Args:
        model: a sparsified model.
        *args, **kwargs: optionally one call's arguments.

    Raises:
        NMError: no sparsified layer, or a model that does not trace, with what to do.
    """
    sites_of(model, "trace")
    if args or kwargs:
        return torch.export.export(model, args, kwargs).module()
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise NMError(
            f"{type(model).__name__} does not trace symbolically ({error}); give example "
            f"arguments, nmfx.trace(model, *args), to go through torch.export"
        ) from error
    gm = fx.GraphModule(model, graph, f"{type(model).__name__}")
    _keep_state_dict_keys(gm)
    return gm


def _keep_state_dict_keys(gm: fx.GraphModule) -> None:
    # GraphModule makes buffers of the plain tensors that its graph reads.
    for module in gm.modules():
        names = [name for name in module._buffers if name.startswith("_nmfx_")]
        module._non_persistent_buffers_set.update(names)
