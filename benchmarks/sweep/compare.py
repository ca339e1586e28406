"""How far two results are apart, and whether rounding alone explains it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sweep.case import Case, call, outputs


@dataclass
class Gap:
    """The largest difference, relative to the largest element of the tensor it is in.

    Attributes:
        size: 0 if equal, inf if the structure, the shapes or the places of NaN differ.
        what: where.
        equal: bit for bit.
    """

    size: float
    what: str = "output"
    equal: bool = False

    def wrong(self, most: float) -> bool:
        """Whether it is more than that; NaN is."""
        return not self.size <= most


def compare(got: list[Tensor], wanted: list[Tensor], floor: float = 0.0) -> Gap:
    """Compares two lists of tensors.

    Args:
        got, wanted: floating-point tensors.
        floor: the smallest magnitude that differences are measured against.
    """
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return Gap(float("inf"), f"shapes {_shapes(got)} for {_shapes(wanted)}")
    worst = Gap(0.0, equal=True)
    for i, (left, right) in enumerate(zip(got, wanted, strict=True)):
        size, equal = _difference(left.detach(), right.detach(), floor)
        worst.equal &= equal
        if not size <= worst.size:
            worst.size, worst.what = size, f"{i}"
    return worst


def _shapes(tensors: list[Tensor]) -> str:
    return str([tuple(t.shape) for t in tensors][:4])


def _difference(left: Tensor, right: Tensor, floor: float) -> tuple[float, bool]:
    if not left.numel():
        return 0.0, True
    if torch.equal(left, right):
        return 0.0, True
    left, right = left.double(), right.double()
    finite = right.isfinite()
    odd = torch.where(finite, 0.0, right).nan_to_num(nan=7.0)
    if not torch.equal(odd, torch.where(left.isfinite(), 0.0, left).nan_to_num(nan=7.0)):
        return float("inf"), False
    left, right = left[finite], right[finite]
    if torch.equal(left, right):
        return 0.0, True
    gap = float((left - right).abs().max())
    return gap / max(float(right.abs().max()), floor, 1e-30), False


def nudge_(model: nn.Module, seed: int) -> nn.Module:
    """Moves every weight by one part in a million, some 10 times float32's rounding; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 1e-6 * noise.to(parameter.dtype))
    return model


def within(case: Case, model: nn.Module, gap: Gap) -> bool:
    """Whether the model itself turns rounding into such a gap (routing, top-k, codebooks)."""
    base = outputs(call(model, case.inputs_for(False)))
    for seed in range(3):
        moved = nudge_(copy.deepcopy(model), seed)
        own = compare(outputs(call(moved, case.inputs_for(False))), base)
        if own.wrong(0.1 * gap.size):
            return True
    return False
