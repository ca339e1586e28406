"""A callback for Hugging Face's `Trainer`.

    from nmfx.trainers.hugging_face import NMCallback

    trainer = Trainer(model, args, ..., callbacks=[NMCallback("2:4")])
    trainer.train()
    nmfx.fold(trainer.model).save_pretrained("sparse")      # exact zeros, an ordinary checkpoint

Checkpoints are those of the dense model: `from_pretrained` of its class loads them, with the
weights as trained, pruned ones included. Beside them lies `nmfx.pt`, with what they lack.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture.refs import sites_of
from ..errors import NMError
from ..policy import Rules
from .plan import Plan
from .training import Training

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError(
        "nmfx.trainers.hugging_face needs transformers: pip install transformers accelerate"
    ) from error

FILE = "nmfx.pt"
_SAMPLES = 256  # of each weight; an update changes nearly all of them


class NMCallback(TrainerCallback):
    """Sparsifies (if asked to), attaches the decay, runs the schedules, logs, saves and resumes.

    When training begins, the decay moves to the optimizer (`nmfx.attach`), so that accumulation,
    clipping, loss scales and the number of processes do not change it. What the Trainer logs gets
    "nmfx/density", "nmfx/flips_per_step", "nmfx/lambda_w" and the other numbers of `nmfx.Monitor`,
    measured when it logs. Each checkpoint gets a file "nmfx.pt" with patterns, lambda, fixed masks
    and the monitor's state; a training that is resumed from it goes on bit for bit, and with
    `load_best_model_at_end` the model ends with what belongs to its best checkpoint.

    The Trainer calls reporters (TensorBoard, W&B) before the callbacks that it is given: with
    `callback.go_first(trainer)` they see the numbers, too. `log_history` always has them.

    Args:
        rules: sparsify the model with these when training begins, as `nmfx.sparsify` does, unless
            it is sparsified by then. None: it is sparsified before.
        lambda_w: strength of the decay: a number, or a function of the step. None: the model's own,
            or with `rules` the default of `nmfx.sparsify`.
        pattern: function of the step, to a pattern or rules, see `nmfx.set_pattern`.
        freeze_at: the step at which masks are fixed, before its forward. When the same callback
            trains the same model once more, they are free again until then.
        per_layer: also log the numbers of each layer.
        resume_from: the checkpoint that `train(resume_from_checkpoint=...)` is given, if that is
            not one of `output_dir` (the Trainer does not tell its callbacks). False: resume from a
            checkpoint that has no "nmfx.pt", because nothing was sparse then.

    Steps are those of the Trainer (`state.global_step`), the first is 0.

    Raises:
        NMError: rules or a plan that do not hold; when training begins, no sparsified layer, or a
            checkpoint to resume from whose "nmfx.pt" is not found.
    """

    def __init__(
        self,
        rules: Rules | None = None,
        *,
        lambda_w: float | Callable[[int], float] | None = None,
        pattern: Callable[[int], Rules] | None = None,
        freeze_at: int | None = None,
        per_layer: bool = False,
        resume_from: str | os.PathLike[str] | bool | None = None,
    ) -> None:
        self._plan = Plan(rules, lambda_w, pattern, freeze_at, per_layer)
        if resume_from is True:
            raise NMError("resume_from=True names no checkpoint; give its folder, or False")
        self._resume_from = resume_from
        self._training: Training | None = None
        self._logged_at = 0

    def go_first(self, trainer: Any) -> None:
        """Puts this callback before all others of a Trainer, so that reporters log its numbers."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self._plan.sparsify(model, state.global_step)
        self._training = Training(model, self._plan)
        if state.global_step and self._resume_from is not False:
            self._training.load_state_dict(self._saved_state(args, state, model))
        self._training.attach([kwargs["optimizer"]])
        self._logged_at = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._running().before_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._running().after_step()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        if self._training is None or logs is None or state.global_step == self._logged_at:
            return
        self._logged_at = state.global_step
        values = self._training.measure()
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.should_save:
            return
        folder = _folder(args, state)
        if not folder.is_dir():
            # A search for hyperparameters keeps its runs in folders that callbacks are not told of.
            warnings.warn(f"{folder} is not there, so {FILE} was not saved beside it", stacklevel=2)
            return
        content = {
            "step": state.global_step,
            "digest": _digest(kwargs["model"]),
            "training": self._running().state_dict(),
        }
        temporary = folder / f".{FILE}.{os.getpid()}"
        torch.save(content, temporary)
        os.replace(temporary, folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None:
            content = _read(Path(best))
            if content is None:
                raise NMError(f"{best} has no {FILE}, so its masks cannot be loaded with the model")
            self._running().load_state_dict(content["training"])

    def _running(self) -> Training:
        if self._training is None:
            raise NMError("this callback was added after training began; give it to the Trainer")
        return self._training

    def _saved_state(self, args: Any, state: Any, model: nn.Module) -> dict[str, Any]:
        """The state in the checkpoint that the weights of the model came from."""
        given = [self._resume_from, args.resume_from_checkpoint]
        folders = [Path(one) for one in given if isinstance(one, (str, os.PathLike))]
        folders.append(_folder(args, state))
        digest = _digest(model)
        for folder in folders:
            content = _read(folder)
            if content is not None and content["digest"] == digest:
                return content["training"]
        looked_at = ", ".join(dict.fromkeys(map(str, folders)))
        raise NMError(
            f"training resumes at step {state.global_step}, and no {FILE} saved with these weights "
            f"is in {looked_at}; name the checkpoint with NMCallback(resume_from=...), or "
            f"write resume_from=False if nothing was sparse when it was saved"
        )


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / FILE
    if not path.is_file():
        return None
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not {"digest", "training"} <= content.keys():
        raise NMError(f"{path} is not a file of nmfx.trainers.hugging_face")
    return content


def _digest(model: nn.Module) -> str:
    """Of a few elements of each sparsified weight: tells one checkpoint of a model from another."""
    digest = hashlib.sha256()
    for ref in sites_of(model, "trainers"):
        digest.update(ref.name.encode())
        weight = ref.parameter.detach()
        if hasattr(weight, "placements"):  # sharded: other elements on each process
            continue
        sample = weight.flatten()[:: max(1, weight.numel() // _SAMPLES)].cpu().contiguous()
        digest.update(bytes(sample.view(torch.uint8).tolist()))
    return digest.hexdigest()
