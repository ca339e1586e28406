"""`train` is the loop to copy from: nmfx adds one line to it, `nmfx.sparsify`.

Everything else about nmfx in this file measures. All numbers of the demo come from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmfx

from ..metrics import density
from .digits import augment, held_out, load, make_model

BATCH = 64
WARM_UP = 100  # steps
EVALUATIONS = 20  # points of the accuracy curve
FLIPS_EVERY = 20  # steps; comparing the masks around every single step would double the time


@dataclass(frozen=True)
class Run:
    """One training run: `pattern` is None for a dense one, `lambda_w` = 0 is STE."""

    pattern: str | None
    lambda_w: float
    seed: int
    steps: int
    split: str  # the held-out images it is judged on: "validation" or "test"


@dataclass(frozen=True)
class Result:
    """What one run measured.

    Attributes:
        run: the run.
        accuracy: (step, accuracy in % on the held-out split), the last one after the last step.
        flips: (step, share of mask entries that this one step changed), every 20th step.
        sad: share of mask entries that differ between the first and the last step; raw SAD
            divided by the number of weights.
        density: share of nonzeros in the sparsified weights after folding; 1.0 if dense.
        packed: the lowered model against the folded one; None for a dense run.
    """

    run: Run
    accuracy: list[tuple[int, float]]
    flips: list[tuple[int, float]]
    sad: float
    density: float
    packed: Packed | None

    @property
    def final_accuracy(self) -> float:
        return self.accuracy[-1][1]


@dataclass(frozen=True)
class Packed:
    """The lowered model against the folded one: largest output difference, bytes of both."""

    max_difference: float
    folded_bytes: int
    lowered_bytes: int


def train(run: Run) -> Result:
    """Trains one model and measures it; the same run gives the same result on the same machine."""
    model = make_model(run.seed)
    if run.pattern:
        nmfx.sparsify(model, run.pattern, lambda_w=run.lambda_w)  # the last layer stays dense

    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-5, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, run.steps))
    generator = torch.Generator().manual_seed(run.seed)
    images, digits = load("train")
    meter = _Meter(model, run)
    for step in range(1, run.steps + 1):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        logits = model(augment(images[batch], generator))
        loss = F.cross_entropy(logits, digits[batch])
        optimizer.zero_grad()
        loss.backward()
        meter.before_update(step)
        optimizer.step()
        schedule.step()
        meter.after_update(step)
    return meter.result()


def _rate(step: int, steps: int) -> float:
    """Cosine to zero with a linear warm-up; a factor on the learning rate."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


class _Meter:
    """Collects a `Result` while a model trains."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model, self.run = model, run
        self.accuracy: list[tuple[int, float]] = []
        self.flips: list[tuple[int, float]] = []
        self.evaluate_every = max(FLIPS_EVERY, run.steps // EVALUATIONS)
        self.first = self._masks()
        self.before = self.first

    def before_update(self, step: int) -> None:
        if self.first and step % FLIPS_EVERY == 0:
            self.before = self._masks()

    def after_update(self, step: int) -> None:
        if self.first and step % FLIPS_EVERY == 0:
            self.flips.append((step, nmfx.sad(self.before, self._masks()).per_weight))
        if step % self.evaluate_every == 0 or step == self.run.steps:
            self.accuracy.append((step, evaluate(self.model, self.run.split)))

    def result(self) -> Result:
        if not self.first:
            return Result(self.run, self.accuracy, [], sad=0.0, density=1.0, packed=None)
        moved = nmfx.sad(self.first, self._masks()).per_weight
        folded = nmfx.fold(self.model.eval())
        weights = torch.cat([folded.get_parameter(name).flatten() for name in self.first])
        packed = pack_and_check(self.model, folded, held_out(self.run.split)[0])
        return Result(self.run, self.accuracy, self.flips, moved, density(weights), packed)

    def _masks(self) -> dict[str, Tensor]:
        return nmfx.masks(self.model) if self.run.pattern else {}


@torch.no_grad()
def evaluate(model: nn.Module, split: str) -> float:
    """Accuracy in % on a held-out split; the model comes back in training mode."""
    inputs, digits = held_out(split)
    correct = model.eval()(inputs).argmax(1) == digits
    model.train()
    return 100 * correct.float().mean().item()


@torch.no_grad()
def pack_and_check(model: nn.Module, folded: nn.Module, inputs: Tensor) -> Packed:
    """Lowers a sparsified model in eval mode and compares it with the folded one on `inputs`."""
    # The table shows what packing saves, on any machine; layers this small are rarely faster.
    lowered = nmfx.lower(model, (inputs,), tune=False)
    difference = (lowered(inputs) - folded(inputs)).abs().max().item()
    return Packed(difference, _state_bytes(folded), _state_bytes(lowered))


def _state_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
