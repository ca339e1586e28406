"""nmfx.fold: exact zeros in the weights, original classes, nothing of nmfx left."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .capture.install import check_classes
from .capture.site import SiteRef, iter_sites, sites_of
from .errors import NMError
from .mask import nm_project
from .schedule import site_mask
from .sparsify import restore


def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Bakes the masks into the weights and returns a vanilla dense model.

    Pruned weights become exactly +0.0, kept ones stay bit for bit; classes and graphs are the
    original ones, so ONNX, TensorRT, Hugging Face and torch.export see an ordinary model.

    Args:
        model: a sparsified model.
        inplace: fold `model` itself, reusing its memory; its parameters stay the same objects.

    Returns:
        The folded model: a deep copy, or `model`.

    Raises:
        NMError: no sparsified layer, or one that is on the meta device. Nothing is changed then.
    """
    refs = sites_of(model, "fold")
    check_classes(model)
    for ref in refs:
        if ref.parameter.is_meta:
            raise NMError(f"{ref.name}: it is on the meta device, so there is nothing to fold")
    model = model if inplace else copy.deepcopy(model)
    bake(model)
    return model


@torch.no_grad()
def bake(model: nn.Module) -> None:
    """Writes the masks into all weights that are not lowered, and restores their modules."""
    for ref in iter_sites(model):
        if not ref.site.lowered:
            ref.parameter.copy_(masked_weight(ref))
    restore(model)


def masked_weight(ref: SiteRef) -> Tensor:
    """The weight that a site computes with, detached: its mask applied, +0.0 elsewhere."""
    weight = ref.parameter.detach()
    if ref.site.state == "frozen":
        return torch.where(site_mask(ref), weight, 0.0)
    return nm_project(weight, ref.site.pattern, ref.site.dim)
