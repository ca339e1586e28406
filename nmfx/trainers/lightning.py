"""A callback for Lightning's `Trainer`.

    from nmfx.trainers.lightning import NMCallback

    trainer = lightning.Trainer(..., callbacks=[NMCallback("2:4")])
    trainer.fit(module, loader)

The `state_dict` in its checkpoints is that of the dense module, which `load_from_checkpoint` of its
class reads; what it lacks is among the states of callbacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..capture.refs import iter_sites
from ..policy import Rules
from .plan import Plan
from .training import Training

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as error:
    try:
        from pytorch_lightning.callbacks import Callback  # the same under its older name
    except ModuleNotFoundError:
        raise ImportError(
            "nmfx.trainers.lightning needs Lightning: pip install lightning"
        ) from error


class NMCallback(Callback):
    """Sparsifies (if asked to), attaches the decay, runs the schedules, logs, saves and resumes.

    When fitting begins, the decay moves to the optimizers (`nmfx.attach`), so that accumulation,
    clipping, precision and the number of processes do not change it; with automatic and manual
    optimization alike. The module logs "nmfx/density", "nmfx/flips_per_step", "nmfx/lambda_w" and
    the other numbers of `nmfx.Monitor`. Checkpoints hold patterns, lambda, fixed masks and the
    monitor's state; `fit(..., ckpt_path=...)` goes on bit for bit. `validate`, `test` and `predict`
    run a module as it is, or as the checkpoint that they are given says.

    Args:
        rules: sparsify the module with these when fitting begins, as `nmfx.sparsify` does, unless
            it is sparsified by then. None: it is sparsified before (in `configure_model`, say).
        lambda_w: strength of the decay: a number, or a function of the step. None: the module's
            own, or with `rules` the default of `nmfx.sparsify`.
        pattern: function of the step, to a pattern or rules, see `nmfx.set_pattern`.
        freeze_at: the step at which masks are fixed, before its forward. When the same callback
            trains the same model once more, they are free again until then.
        every: steps between two measurements; None: the Trainer's `log_every_n_steps`.
        per_layer: also log the numbers of each layer.

    Steps are those of the Trainer (`trainer.global_step`), which counts updates, of all optimizers
    together; the first is 0.

    Raises:
        NMError: rules or a plan that do not hold; when fitting begins, no sparsified layer, or a
            checkpoint that is not of this module.
    """

    def __init__(
        self,
        rules: Rules | None = None,
        *,
        lambda_w: float | Callable[[int], float] | None = None,
        pattern: Callable[[int], Rules] | None = None,
        freeze_at: int | None = None,
        every: int | None = None,
        per_layer: bool = False,
    ) -> None:
        self._plan, self._every = Plan(rules, lambda_w, pattern, freeze_at, per_layer), every
        self._training: Training | None = None
        self._loaded: dict[str, Any] | None = None
        self._step = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Lightning restores callbacks after this, and before there are optimizers.
        self._training = self._loaded = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        training = self._prepared(trainer, pl_module)
        training.attach(trainer.optimizers)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        # A checkpoint brings masks of its own, and one that is saved then must not lack them.
        if self._loaded is not None or any(iter_sites(pl_module)):
            self._prepared(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def _prepared(self, trainer: Any, module: Any) -> Training:
        """The module sparsified, with what a checkpoint said of it."""
        if self._training is None:
            # Not the step of a resumed run, which is not known yet: before_step follows.
            self._plan.sparsify(module, 0)
            every = self._every if self._every is not None else max(1, trainer.log_every_n_steps)
            training = Training(module, self._plan, every)
            if self._loaded is not None:
                training.load_state_dict(self._loaded)
                self._loaded = None
            self._training = training
        return self._training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._prepared(trainer, pl_module).before_step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        values: dict[str, float] = {}
        while self._step < trainer.global_step:  # none while gradients accumulate
            self._step += 1
            values |= self._prepared(trainer, pl_module).after_step()
        if values:
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._training is None:
            self._loaded = state_dict
        else:  # a strategy that restores after its setup
            self._training.load_state_dict(state_dict)
