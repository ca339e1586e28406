"""What is measured around every training loop: the quality curve, mask flips, SAD, packing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import nmfx

from ..metrics import density

EVALUATIONS = 20  # points of the quality curve
FLIPS_EVERY = 20  # steps; comparing the masks around every single step would double the time


@dataclass(frozen=True)
class Packed:
    """The lowered model against the folded one: largest output difference, bytes of both."""

    max_difference: float
    folded_bytes: int
    lowered_bytes: int


class Meter:
    """Watches the masks of a model while it trains; all of it is empty for a dense one.

    Attributes:
        curve: (step, `evaluate()`), the last one after the last step.
        flips: (step, share of mask entries that this one step changed), every 20th step.
    """

    def __init__(
        self, model: nn.Module, sparse: bool, steps: int, evaluate: Callable[[], float]
    ) -> None:
        self.model, self.sparse, self.steps, self.evaluate = model, sparse, steps, evaluate
        self.curve: list[tuple[int, float]] = []
        self.flips: list[tuple[int, float]] = []
        self.evaluate_every = max(FLIPS_EVERY, steps // EVALUATIONS)
        self.first = self._masks()
        self.before = self.first

    def before_update(self, step: int) -> None:
        """Call it right before `optimizer.step()`."""
        if self.first and step % FLIPS_EVERY == 0:
            self.before = self._masks()

    def after_update(self, step: int) -> None:
        """Call it right after `optimizer.step()`."""
        if self.first and step % FLIPS_EVERY == 0:
            self.flips.append((step, nmfx.sad(self.before, self._masks()).per_weight))
        if step % self.evaluate_every == 0 or step == self.steps:
            self.curve.append((step, self.evaluate()))

    def moved(self) -> float:
        """SAD: share of mask entries that differ from those before the first step."""
        return nmfx.sad(self.first, self._masks()).per_weight if self.first else 0.0

    def density_and_packing(self, inputs: Tensor) -> tuple[float, Packed | None]:
        """Share of nonzeros in the sparsified weights after folding, and the packed model."""
        if not self.first:
            return 1.0, None
        folded = nmfx.fold(self.model.eval())
        weights = torch.cat([folded.get_parameter(name).flatten() for name in self.first])
        return density(weights), pack_and_check(self.model, folded, inputs)

    def _masks(self) -> dict[str, Tensor]:
        return nmfx.masks(self.model) if self.sparse else {}


@torch.no_grad()
def pack_and_check(model: nn.Module, folded: nn.Module, inputs: Tensor) -> Packed:
    """Lowers a sparsified model in eval mode and compares it with the folded one on `inputs`."""
    # The table shows what packing saves, on any machine; layers this small are rarely faster.
    lowered = nmfx.lower(model, (inputs,), tune=False)
    difference = (lowered(inputs) - folded(inputs)).abs().max().item()
    return Packed(difference, _state_bytes(folded), _state_bytes(lowered))


def _state_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def rate(step: int, steps: int, warm_up: int) -> float:
    """Cosine to zero with a linear warm-up; a factor on the learning rate."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
