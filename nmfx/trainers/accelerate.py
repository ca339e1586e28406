"""For loops that run on an `accelerate.Accelerator`.

model, optimizer, loader = accelerator.prepare(nmfx.sparsify(model, "2:4"), optimizer, loader)
training = nmfx.trainers.accelerate.follow(accelerator, model, optimizer)
for batch in loader:
    with accelerator.accumulate(model):
        training.before_step(step)           # where lambda, pattern or masks have a schedule
        ...                                  # your own forward, backward, clipping
        optimizer.step(); optimizer.zero_grad()
    if accelerator.sync_gradients:
        accelerator.log(training.after_step(), step := step + 1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..policy import Rules
from .plan import Plan
from .training import Training

if TYPE_CHECKING:
    from accelerate import Accelerator


def follow(
    accelerator: Accelerator,
    model: nn.Module,
    *optimizers: torch.optim.Optimizer,
    lambda_w: float | Callable[[int], float] | None = None,
    pattern: Callable[[int], Rules] | None = None,
    freeze_at: int | None = None,
    every: int | None = None,
    per_layer: bool = False,
) -> Training:
    """Attaches the decay to the optimizers, and saves and loads with the accelerator's state.

    `accelerator.save_state` then writes patterns, lambda, fixed masks and the monitor's state too
    (in one of its "custom_checkpoint_<i>.pkl"), and `load_state` puts them back: call this first,
    and in the same order as other `register_for_checkpointing`.

    Args:
        accelerator: the one that prepared the model.
        model: sparsified, before or after `accelerator.prepare`; what that returned, or the model
            itself.
        *optimizers: those that train it, as they are or as `prepare` returned them.
        lambda_w, pattern, freeze_at, every, per_layer: see `Plan` and `Training`. Schedules act in
            `training.before_step(step)`, measuring in `training.after_step()`.

    Returns:
        The `Training`, which needs no call where nothing is scheduled and nothing logged.

    Raises:
        NMError: no sparsified layer, no optimizer that owns one, or a plan that does not hold.
    """
    training = Training(
        accelerator.unwrap_model(model, keep_torch_compile=False),
        Plan(None, lambda_w, pattern, freeze_at, per_layer),
        every,
    )
    training.attach(optimizers)
    accelerator.register_for_checkpointing(training)
    return training
