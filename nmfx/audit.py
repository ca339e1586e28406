"""nmfx.verify: does anything read a sparsified weight around its mask?"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .capture.site import sites_of

# What may read a raw weight: the op itself, and the select of a frozen layer.
_ALLOWED = {"nmfx::sr_ste", "nmfx::sr_ste_backward"}


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, set[str]]:
    """Runs the model and names every sparsified parameter that is read around its mask.

    Some models read a projection's weight outside its layer (a fused kernel, a dtype trick, a
    product with the transposed weight); such a read sees the dense weight. The check sits below
    autograd, where fused fast paths cannot hide. The model runs twice, with and without gradients,
    in the mode (train or eval) it is in; its buffers and torch's CPU and CUDA random state are
    restored.

    Args:
        model: a sparsified model.
        *args, **kwargs: one call's arguments.

    Returns:
        {parameter name: names of the operators that read it raw}; empty if all is well.

    Raises:
        NMError: no sparsified layer.
    """
    refs = sites_of(model, "verify")
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    audit = _Audit({_key(ref.parameter): ref.name for ref in refs})
    try:
        with torch.random.fork_rng():
            for grad in (True, False):
                with torch.set_grad_enabled(grad), audit:
                    model(*args, **kwargs)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    return dict(audit.found)


def _key(tensor: Tensor) -> tuple[Any, ...]:
    # Aliases made by .data, detach() or a view from the first element share the address.
    return (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())


class _Audit(TorchDispatchMode):
    def __init__(self, weights: dict[tuple[Any, ...], str]) -> None:
        super().__init__()
        self.weights = weights
        self.found: dict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name not in _ALLOWED:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                    self._check(leaf, name, args)
        return func(*args, **(kwargs or {}))

    def _check(self, tensor: Tensor, operator: str, args: Any) -> None:
        parameter = self.weights.get(_key(tensor))
        # A frozen layer selects with aten::where(mask, weight, 0.0): that read is masked.
        masked = operator == "aten::where" and args[0].dtype == torch.bool
        if parameter is not None and not masked:
            self.found[parameter].add(operator)
