"""What all trainers share: the decay at the optimizer, the schedules, the log, and their state.

before_step(step)     lambda, pattern and freezing as they are planned for this step
    forward, backward, update        the trainer's own; `attach` adds the decay to it
after_step()          the monitor counts, and measures where it is due
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..attach import Attachment, attach, innermost
from ..capture.refs import sites_of
from ..errors import NMError
from ..monitor import Monitor
from ..schedule import freeze, set_lambda, set_pattern, unfreeze
from ..state import load_state_dict, state_dict
from .plan import Plan

_VERSION = 1
_STEP = "nmfx/step"  # trainers know their steps themselves


class Training:
    """A sparsified model while a foreign loop trains it.

    A step is an update by the optimizer, however many backward passes lead to it; the first is 0.

    Args:
        model: sparsified.
        plan: what changes with the steps. Masks that it fixed in an earlier training of this model
            are free again until its `freeze_at`, unless this one goes on where that one was.
        every: steps between two measurements; None measures only when asked to, by `measure`.

    Raises:
        NMError: no sparsified layer.
    """

    def __init__(self, model: nn.Module, plan: Plan, every: int | None = None) -> None:
        sites_of(model, "trainers")
        self._model, self._plan = model, plan
        self._monitor = Monitor(model, every=sys.maxsize if every is None else every)
        self._in_force: dict[str, Any] = {}
        self._resumed = False

    def attach(self, optimizers: Iterable[torch.optim.Optimizer]) -> list[Attachment]:
        """`nmfx.attach`, to each of the optimizers that owns some of the sparsified weights.

        Raises:
            NMError: none of them owns any, although some are trained.
        """
        weights = [ref.parameter for ref in sites_of(self._model, "attach")]
        ids = {id(weight) for weight in weights}
        optimizers = [innermost(optimizer) for optimizer in optimizers]
        owners = [
            optimizer
            for optimizer in optimizers
            if any(id(p) in ids for group in optimizer.param_groups for p in group["params"])
        ]
        # A frozen base under adapters belongs to no optimizer, and has no decay.
        if not owners and any(weight.requires_grad for weight in weights):
            raise NMError(
                "no optimizer of this training owns any of the sparsified weights; sparsify the "
                "model that it was built from"
            )
        return [attach(self._model, optimizer) for optimizer in owners]

    def before_step(self, step: int) -> None:
        """Does what is planned for a step; called again for the same step, it changes nothing.

        Raises:
            NMError: what a function returned is no lambda or pattern for this model.
        """
        lambda_w, freeze_at = self._plan.lambda_at(step), self._plan.freeze_at
        if lambda_w is not None:
            self._once("lambda_w", lambda_w, set_lambda)
        if freeze_at is not None and step >= freeze_at:
            self._once("frozen", True, lambda model, _: freeze(model))
            self._plan.fixed.add(self._model)
            return
        if self._model in self._plan.fixed and not self._resumed:
            unfreeze(self._model)
            self._plan.fixed.discard(self._model)
        if self._plan.pattern is not None:
            rules = self._plan.pattern(step)
            self._once("pattern", dict(rules) if isinstance(rules, Mapping) else rules, set_pattern)

    def _once(self, what: str, value: Any, change: Callable[[nn.Module, Any], None]) -> None:
        # Finding all layers of a large model takes longer than a step should.
        if what not in self._in_force or self._in_force[what] != value:
            change(self._model, value)
            self._in_force[what] = value

    def after_step(self) -> dict[str, float]:
        """Call it once after each step; the measurement (`Monitor.step`), if this one is due."""
        return self._loggable(self._monitor.step())

    def measure(self) -> dict[str, float]:
        """Measures now: see `Monitor.step` for the names."""
        return self._loggable(self._monitor.measure())

    def _loggable(self, values: dict[str, float]) -> dict[str, float]:
        return {
            name: value
            for name, value in values.items()
            if name != _STEP and (self._plan.per_layer or name.count("/") == 1)
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the model lacks: `nmfx.state_dict`, and the monitor's state."""
        return {
            "version": _VERSION,
            "model": state_dict(self._model),
            "fixed": self._model in self._plan.fixed,
            "monitor": self._monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a training of this model was; the weights are loaded by the trainer.

        Raises:
            NMError: a state that is none, or of another model.
        """
        if not isinstance(state, dict) or state.get("version") != _VERSION:
            raise NMError("the state is not one of nmfx.trainers, or of another version of it")
        load_state_dict(self._model, state.get("model", {}))
        self._monitor.load_state_dict(state.get("monitor", {}))
        self._in_force.clear()
        self._resumed = True
        change = self._plan.fixed.add if state.get("fixed") else self._plan.fixed.discard
        change(self._model)
