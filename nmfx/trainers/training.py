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
from ..capture.site import iter_sites, sites_of
from ..errors import NMError
from ..monitor import Monitor
from ..policy import Rules, check_lambda
from ..schedule import freeze, set_lambda, set_pattern
from ..sparsify import DEFAULT_LAMBDA_W, sparsify
from ..state import load_state_dict, state_dict

_VERSION = 1
_STEP = "nmfx/step"  # trainers know their steps themselves


class Training:
    """A sparsified model while a foreign loop trains it.

    A step is an update by the optimizer, however many backward passes lead to it; the first is 0.

    Args:
        model: sparsified.
        lambda_w: of each step: a number, or a function of the step. None: as the model has it.
        pattern: function of the step, to what `nmfx.set_pattern` takes. None: as the model has it.
        freeze_at: the step before which all masks are fixed; `pattern` is not asked from then on.
        every: steps between two measurements; None measures only when asked to, by `measure`.
        per_layer: whether measurements have the numbers of each layer, too.

    Raises:
        NMError: no sparsified layer, or an argument that is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lambda_w: float | Callable[[int], float] | None = None,
        pattern: Callable[[int], Rules] | None = None,
        freeze_at: int | None = None,
        every: int | None = None,
        per_layer: bool = False,
    ) -> None:
        check_plan(lambda_w, pattern, freeze_at)
        sites_of(model, "trainers")
        self._model, self._per_layer = model, per_layer
        self._lambda_w, self._pattern, self._freeze_at = lambda_w, pattern, freeze_at
        self._monitor = Monitor(model, every=sys.maxsize if every is None else every)
        self._in_force: dict[str, Any] = {}

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
        if self._lambda_w is not None:
            planned = self._lambda_w(step) if callable(self._lambda_w) else self._lambda_w
            self._once("lambda_w", planned, set_lambda)
        if self._freeze_at is not None and step >= self._freeze_at:
            self._once("frozen", True, lambda model, _: freeze(model))
        elif self._pattern is not None:
            rules = self._pattern(step)
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
            if name != _STEP and (self._per_layer or name.count("/") == 1)
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the model lacks: `nmfx.state_dict`, and the monitor's state."""
        return {
            "version": _VERSION,
            "model": state_dict(self._model),
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


def sparsify_for(
    model: nn.Module, rules: Rules, lambda_w: float | Callable[[int], float] | None, step: int
) -> None:
    """`nmfx.sparsify` with the lambda of a step, unless a layer of the model is sparse already."""
    if not any(iter_sites(model)):
        planned = lambda_w(step) if callable(lambda_w) else lambda_w
        sparsify(model, rules, lambda_w=DEFAULT_LAMBDA_W if planned is None else planned)


def check_plan(lambda_w: Any, pattern: Any, freeze_at: Any) -> None:
    """Refuses a plan before anything is trained.

    Raises:
        NMError: neither a number >= 0 nor a function, no function, no step.
    """
    if lambda_w is not None and not callable(lambda_w):
        check_lambda(lambda_w)
    if pattern is not None and not callable(pattern):
        raise NMError(
            f"pattern={pattern!r} is no function of the step, like lambda step: '2:4' if step > 9 "
            f"else '3:4'; a pattern for the whole training goes to nmfx.sparsify"
        )
    if freeze_at is not None and (type(freeze_at) is not int or freeze_at < 0):
        raise NMError(f"freeze_at={freeze_at!r} is not a step from 0 on, or None")
