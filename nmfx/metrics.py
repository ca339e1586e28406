"""How masks differ and what they keep: pure functions of masks and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NMError
from .mask import magnitude


@dataclass(frozen=True)
class Sad:
    """The sparse-architecture divergence between two snapshots of masks.

    Attributes:
        per_layer: parameter name -> number of mask entries that differ (a raw count).
        total: the sum over layers.
        weights: the number of mask entries compared.
    """

    per_layer: dict[str, int]
    total: int
    weights: int

    @property
    def per_weight(self) -> float:
        """`total / weights`; between consecutive steps, "flips per weight per step"."""
        return self.total / self.weights if self.weights else 0.0


def mask_sad(before: Tensor, after: Tensor) -> int:
    """||after - before||_1 of two bool masks of one shape: how many entries differ.

    Raises:
        NMError: the shapes differ, or one is not bool.

    Reference: arXiv 2102.04010, the SAD (sparse architecture divergence) metric.
    """
    if before.shape != after.shape or before.dtype != torch.bool or after.dtype != torch.bool:
        raise NMError(
            f"SAD compares two bool masks of one shape, got {before.dtype} {tuple(before.shape)} "
            f"and {after.dtype} {tuple(after.shape)}"
        )
    return int((before != after.to(before.device)).sum())


def sad(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Sad:
    """SAD between two snapshots made by `nmfx.masks`, per layer and in total.

    It is a metric (symmetric, zero only for equal masks, triangle inequality). A lower SAD says
    that the masks are calmer, not that the model is better.

    Args:
        before, after: parameter name -> bool mask, with the same names.

    Raises:
        NMError: no masks, or the names or shapes of the snapshots differ.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise NMError(f"the snapshots do not name the same parameters; only in one: {odd}")
    if not before:
        raise NMError("the snapshots are empty; sparsify the model before taking nmfx.masks")
    per_layer = {}
    for name in before:
        try:
            per_layer[name] = mask_sad(before[name], after[name])
        except NMError as error:
            raise NMError(f"{name}: {error}") from None
    weights = sum(mask.numel() for mask in before.values())
    return Sad(per_layer, sum(per_layer.values()), weights)


def density(tensor: Tensor) -> float:
    """The share of elements that are not zero (-0.0 is, NaN and denormals are not); 1.0 if empty.

    `tensor` is float16/32/64 or bfloat16, like the weights that have a mask.
    """
    if not tensor.numel():
        return 1.0
    flat = torch.atleast_1d(tensor.detach())
    lines = max(1, _PART * len(flat) // flat.numel())
    # By bits: with the flush-denormal flag set, `tensor != 0` calls a denormal zero.
    nonzero = [(magnitude(part) != 0).sum() for part in flat.split(lines)]
    return int(torch.stack(nonzero).sum()) / flat.numel()


# Elements that are counted together: what is made of them stays in the cache, see `packing.py`.
_PART = 2**19


def kept_energy(weight: Tensor, mask: Tensor) -> float:
    """sum(w[mask]^2) / sum(w^2), in float64: the share of the squared norm that a mask keeps.

    1.0 for a weight of zeros. `mask` is bool, of the shape of `weight`.
    """
    squared = weight.detach().double() ** 2
    total = float(squared.sum())
    return float(torch.where(mask, squared, 0.0).sum()) / total if total else 1.0
