"""`train` is the loop to copy from: nmfx adds one line to it, `nmfx.sparsify`.

Everything else about nmfx in this file measures. All numbers of the demo come from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import nmfx

from .digits import augment, held_out, load, make_model
from .meter import Meter, Packed, rate

BATCH = 64
WARM_UP = 100  # steps


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


def train(run: Run) -> Result:
    """Trains one model and measures it; the same run gives the same result on the same machine."""
    model = make_model(run.seed)
    if run.pattern:
        nmfx.sparsify(model, run.pattern, lambda_w=run.lambda_w)  # the last layer stays dense

    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-5, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(step, run.steps, WARM_UP)
    )
    generator = torch.Generator().manual_seed(run.seed)
    images, digits = load("train")
    meter = Meter(model, bool(run.pattern), run.steps, lambda: evaluate(model, run.split))
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
    sad = meter.moved()
    density, packed = meter.density_and_packing(held_out(run.split)[0])
    return Result(run, meter.curve, meter.flips, sad, density, packed)


@torch.no_grad()
def evaluate(model: nn.Module, split: str) -> float:
    """Accuracy in % on a held-out split; the model comes back in training mode."""
    inputs, digits = held_out(split)
    correct = model.eval()(inputs).argmax(1) == digits
    model.train()
    return 100 * correct.float().mean().item()
