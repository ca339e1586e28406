"""nmfx.verify: does anything read a sparsified weight around its mask?"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .capture.refs import SiteRef, check_parameter, sites_of
from .capture.sharding import BEFORE, refuse_sharded
from .errors import NMError
from .schedule import site_mask

# What may read a raw weight: the op in its forms, and the select of a frozen layer.
_ALLOWED = {
    "nmfx::sr_ste",
    "nmfx::sr_ste_project",
    "nmfx::sr_ste_backward",
    "nmfx::sr_ste_gradient",
    "nmfx::sr_ste_decay_",
}
_SELECTS = {"aten::where": 0, "nmfx::keep_project": 1}  # the position of the mask


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
        NMError: no sparsified layer, or one that is on the meta device.
    """
    refs = sites_of(model, "verify")
    refuse_sharded(model, "verify", BEFORE)
    for ref in refs:
        check_parameter(ref)
        if ref.parameter.is_meta:
            raise NMError(f"{ref.name}: it is on the meta device, so there is nothing to run")
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    audit = _Audit(refs)
    try:
        with torch.random.fork_rng():
            for grad in (True, False):
                with torch.set_grad_enabled(grad), audit:
                    model(*args, **kwargs)
    finally:
        for table, entries in tables:
            table.clear()
            table.update(entries)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return dict(audit.found)


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after the last; (0, 0) if empty."""
    if not tensor.numel():
        return 0, 0
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in strides)
    return first * tensor.dtype.itemsize, (last + 1) * tensor.dtype.itemsize


class _Audit(TorchDispatchMode):
    def __init__(self, refs: list[SiteRef]) -> None:
        super().__init__()
        # Storages are shared by aliases (.data, detach(), views) and by flattened parameters.
        self.weights: dict[tuple[Any, ...], list[tuple[int, int, SiteRef]]] = defaultdict(list)
        for ref in refs:
            self.weights[_storage(ref.parameter)].append((*_span(ref.parameter), ref))
        self.found: dict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name not in _ALLOWED:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                    self._check(leaf, name, args)
        return func(*args, **(kwargs or {}))

    def _check(self, tensor: Tensor, operator: str, args: Any) -> None:
        weights = self.weights.get(_storage(tensor))
        if weights is None:  # a nested tensor, for one, has no span to ask for
            return
        first, end = _span(tensor)
        read = [ref for start, stop, ref in weights if first < stop and start < end]
        if not any(_is_keep(operator, args, ref) for ref in read):  # tied: by the mask of one
            for ref in read:
                self.found[ref.name].add(operator)


def _is_keep(operator: str, args: Any, ref: SiteRef) -> bool:
    """Whether this is the select of a frozen layer by its mask."""
    return (
        ref.site.state == "frozen"
        and operator in _SELECTS
        and _storage(args[_SELECTS[operator]]) == _storage(site_mask(ref))
    )
