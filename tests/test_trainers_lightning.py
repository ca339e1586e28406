"""Lightning's Trainer: with nmfx's callback, and without anything of nmfx but the module."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainers_reference import (
    LAMBDA,
    LOOSE,
    LR,
    RULES,
    Net,
    Recording,
    assert_identical,
    assert_trained,
    collate,
    net,
    rows,
    trained,
)

import nmfx

pytest.importorskip("lightning", reason="what is tested here")

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from nmfx.trainers.lightning import NMCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning advises about workers, GPUs, loggers


class Module(lightning.LightningModule):
    """`Net`, with automatic optimization."""

    def __init__(self, seed: int = 0, momentum: float = 0.0) -> None:
        super().__init__()
        self.net, self.momentum = net(seed), momentum

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.net(**batch)["loss"]

    def test_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("loss", self.net(**batch)["loss"])

    validation_step = test_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LR, momentum=self.momentum)


class Manual(Module):
    """The same by hand, two batches to a step."""

    automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.net(**batch)["loss"] / 2)
        if index % 2:
            self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()
            optimizer.zero_grad()


class Two(Module):
    """An optimizer for each layer, as adversaries have them."""

    automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        layers = (self.net.fc1, self.net.fc2)
        return [torch.optim.SGD(layer.parameters(), LR) for layer in layers]

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.net(**batch)["loss"])
        for optimizer in self.optimizers():
            optimizer.step()


NAMES = {f"net.{name}": pattern for name, pattern in RULES.items()}


def fit(
    module: Module, *callbacks: Callback, path: Path | None = None, **settings: Any
) -> tuple[Any, list[dict[str, Tensor]]]:
    collator = Recording()
    if "max_steps" not in settings:
        settings["max_epochs"] = settings.get("max_epochs", 1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=settings.pop("logger", False),
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, DataLoader(rows(), 4, collate_fn=collator), ckpt_path=path)
    return trainer, collator.batches


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.05)])
def test_the_decay_counts_once_per_step(accumulate: int, clip: float | None) -> None:
    module = Module()
    callback = NMCallback(NAMES, lambda_w=lambda step: LAMBDA * (1 + step))
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    _, batches = fit(module, callback, max_steps=4, **settings)
    expected = trained(
        net(),
        batches[: 4 * accumulate],
        accumulate=accumulate,
        clip=clip,
        lambda_w=lambda step: LAMBDA * (1 + step),
    )
    assert_trained(module.net, expected)


def test_the_decay_counts_once_per_step_of_manual_optimization() -> None:
    module = Manual()
    _, batches = fit(module, NMCallback(NAMES, lambda_w=LAMBDA))
    assert_trained(module.net, trained(net(), batches, accumulate=2, clip=0.05))


def test_each_optimizer_adds_the_decay_of_its_own_weights() -> None:
    module = Two()
    callback = NMCallback(NAMES, lambda_w=LAMBDA, every=1)
    trainer, batches = fit(module, callback)
    assert_trained(module.net, trained(net(), batches))
    assert trainer.global_step == 2 * len(batches)


def test_a_loss_scale_does_not_reach_the_decay() -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Scaled(MixedPrecision):
        """float32 with a loss scale, so that only the scale is new."""

        def forward_context(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Module()
    callback = NMCallback(NAMES, lambda_w=LAMBDA)
    plugin = Scaled("16-mixed", "cpu", scaler)
    _, batches = fit(module, callback, plugins=[plugin], gradient_clip_val=0.05)
    assert scaler.get_scale() == 2.0**10
    assert_trained(module.net, trained(net(), batches, clip=0.05))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_callback_is_needed(precision: str) -> None:
    module = Module()
    nmfx.sparsify(module, NAMES, lambda_w=LAMBDA)
    _, batches = fit(module, precision=precision)
    expected = trained(net(), batches)
    assert_trained(module.net, expected, **({} if precision == "32-true" else LOOSE))


def test_nmfx_attach_takes_the_optimizer_that_a_module_sees() -> None:
    class Attaches(Manual):
        def on_train_start(self) -> None:
            # Not kept by anybody: Lightning makes such wrappers anew.
            nmfx.attach(self, self.optimizers())

    module = Attaches()
    nmfx.sparsify(module, NAMES, lambda_w=LAMBDA)
    _, batches = fit(module)
    assert_trained(module.net, trained(net(), batches, accumulate=2, clip=0.05))


class Stops(Callback):
    """What a cluster does: `fit` ends in an exception."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 10:
            raise RuntimeError("stopped")


def planned(freeze_at: int) -> NMCallback:
    return NMCallback(
        {"net.fc1": "3:4", "net.fc2": "2:4"},
        lambda_w=lambda step: 1e-2 * (1 + step),
        pattern=lambda step: {"net.fc1": "3:4" if step < 3 else "2:4"},
        freeze_at=freeze_at,
        every=3,
        per_layer=True,
    )


def everything(trainer: Any, module: Module, callback: NMCallback) -> dict[str, Any]:
    return {
        "model": dict(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "nmfx": nmfx.state_dict(module),
        "masks": nmfx.masks(module),
        "monitor": callback.state_dict()["monitor"],
    }


@pytest.mark.parametrize(
    ("cls", "precision", "freeze_at"),
    [
        (Module, "32-true", 5),
        (Module, "bf16-mixed", 12),
        (Manual, "32-true", 12),
        (Manual, "bf16-mixed", 5),
    ],
)
def test_resumed_training_is_bit_identical(
    cls: type[Module], precision: str, freeze_at: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"precision": precision, "max_epochs": 2}
    if cls is Module:
        settings |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    whole, ours = cls(momentum=0.9), planned(freeze_at)
    one = everything(fit(whole, ours, **settings)[0], whole, ours)

    # Lightning does not skip the batches of an epoch that a checkpoint cut in two.
    saving = ModelCheckpoint(tmp_path, "at", save_on_train_epoch_end=True)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(cls(momentum=0.9), planned(freeze_at), saving, Stops(), **settings)
    torch.rand(100)
    resumed, ours = cls(seed=5, momentum=0.9), planned(freeze_at)
    trainer, batches = fit(resumed, ours, path=tmp_path / "at.ckpt", **settings)
    assert trainer.global_step == 16
    assert len(batches) == 16
    assert_identical(one, everything(trainer, resumed, ours))
    layers = one["nmfx"]["layers"]
    assert layers["net.fc1.weight"] == {"pattern": "2:4", "lambda_w": 0.16, "state": "frozen"}


def test_what_changes_by_hand_is_resumed_too(tmp_path: Path) -> None:
    class ByHand(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                nmfx.set_lambda(module, 0.125)
                nmfx.freeze(module)

    saving = ModelCheckpoint(tmp_path, "at", every_n_train_steps=6)
    first = Module()
    fit(first, NMCallback(NAMES), ByHand(), saving, max_steps=6)
    second = Module(seed=5)
    fit(second, NMCallback(NAMES), path=tmp_path / "at.ckpt", max_steps=7)
    assert_identical(nmfx.state_dict(first), nmfx.state_dict(second))
    assert nmfx.state_dict(second)["layers"]["net.fc1.weight"]["lambda_w"] == 0.125


def test_checkpoints_are_those_of_the_dense_module(tmp_path: Path) -> None:
    module = Module()
    trainer, _ = fit(module, NMCallback(NAMES), max_steps=3)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    plain = Module.load_from_checkpoint(tmp_path / "it.ckpt")
    assert_identical(dict(plain.state_dict()), dict(module.state_dict()))
    assert all(row.state == "dense" for row in nmfx.report(plain).rows)


def test_a_checkpoint_is_tested_with_its_masks(tmp_path: Path) -> None:
    module = Module()
    trainer, _ = fit(module, planned(4), max_steps=6)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    loader = DataLoader(rows(), 16)
    expected = trainer.test(module, loader, verbose=False)
    fresh = Module(seed=5)
    other = evaluator(planned(4))
    assert other.test(fresh, loader, ckpt_path=tmp_path / "it.ckpt", verbose=False) == expected
    assert_identical(nmfx.state_dict(module), nmfx.state_dict(fresh))


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_dense_module_is_evaluated_as_it_is(verb: str) -> None:
    module = Module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    getattr(evaluator(planned(4)), verb)(module, DataLoader(rows(), 16), verbose=False)
    assert all(row.state == "dense" for row in nmfx.report(module).rows)
    assert type(module.net.fc1) is nn.Linear
    assert_identical(before, dict(module.state_dict()))


def test_masks_are_free_again_in_a_second_fit() -> None:
    module, callback = Module(), planned(4)
    fit(module, callback, max_steps=6)
    assert nmfx.report(module).rows[0].state == "frozen"
    fit(module, callback, max_steps=3)
    assert nmfx.report(module).rows[0].state == "sparse"
    assert nmfx.report(module).rows[0].pattern.text == "3:4"
    fit(module, callback, max_steps=6)
    assert nmfx.report(module).rows[0].state == "frozen"


def evaluator(callback: Callback) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[callback],
    )


def test_masks_are_free_again_whatever_came_between_two_fits(tmp_path: Path) -> None:
    module, callback, loader = Module(), planned(2), DataLoader(rows(), 16)
    trainer, _ = fit(module, callback, max_steps=3)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    evaluator(callback).validate(module, loader, ckpt_path=tmp_path / "it.ckpt", verbose=False)
    fit(Module(seed=3), callback, max_steps=1)  # another module
    assert nmfx.report(module).rows[0].state == "frozen"
    fit(module, callback, max_steps=1)
    assert nmfx.report(module).rows[0].state == "sparse"


def test_a_checkpoint_after_an_evaluation_lacks_nothing(tmp_path: Path) -> None:
    module, callback = Module(), planned(2)
    trainer, _ = fit(module, callback, max_steps=3)
    trainer.validate(module, DataLoader(rows(), 16), verbose=False)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    again = Module(seed=4)
    fit(again, planned(2), path=tmp_path / "it.ckpt", max_steps=4)
    assert nmfx.report(again).rows[0].state == "frozen"


def test_one_trainer_can_fit_test_and_resume(tmp_path: Path) -> None:
    module, callback = Module(), NMCallback(NAMES)
    trainer, _ = fit(module, callback, max_steps=3)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = 6
    loader = DataLoader(rows(), 4)
    trainer.test(module, loader, verbose=False)
    trainer.fit(module, loader, ckpt_path=tmp_path / "it.ckpt")
    assert trainer.global_step == 6
    assert callback.state_dict()["monitor"]["step"] == 6


def test_logs_have_the_numbers_of_the_masks(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    callback = planned(9)
    trainer, _ = fit(Module(), callback, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    with open(Path(trainer.logger.log_dir) / "metrics.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["nmfx/density"]]
    assert len(lines) == 5
    assert float(lines[-1]["nmfx/density"]) == 0.5
    assert float(lines[-1]["nmfx/flips_per_step"]) == 0
    assert float(lines[0]["nmfx/flips_per_step"]) > 0
    assert float(lines[0]["nmfx/density/net.fc1.weight"]) == 0.75
    assert float(trainer.callback_metrics["nmfx/lambda_w"]) == 0.0


def test_a_module_without_a_sparse_layer_is_refused() -> None:
    with pytest.raises(nmfx.NMError, match="has no sparsified layer"):
        fit(Module(), NMCallback())
    with pytest.raises(nmfx.NMError, match="freeze_at=-1 is not a step"):
        NMCallback(freeze_at=-1)


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import os, torch, lightning
from torch.utils.data import DataLoader
from test_trainers_lightning import LAMBDA, Module, NAMES, NMCallback, rows
module = Module()
callback = NMCallback(NAMES, lambda_w=LAMBDA)
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=4, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, callbacks=[callback],
    use_distributed_sampler=False,
)
trainer.fit(module, DataLoader(rows()[int(os.environ.get("LOCAL_RANK", 0)) :: 2], 4))
if trainer.is_global_zero:
    torch.save(module.net.state_dict(), sys.argv[2])
"""


@pytest.mark.deep
def test_the_decay_does_not_grow_with_the_number_of_processes(tmp_path: Path) -> None:
    """Two ranks of four rows each are one process of eight."""
    path = tmp_path / "end.pt"
    script = tmp_path / "run.py"
    script.write_text(PROGRAM)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, script, here, path], check=True, env=environment, timeout=300)
    data = rows()
    batches = [collate(data[8 * i : 8 * i + 8]) for i in range(4)]
    model = Net()
    model.load_state_dict(torch.load(path, weights_only=True))
    assert_trained(model, trained(net(), batches))
