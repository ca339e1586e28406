"""Loops on an accelerate.Accelerator: the decay, its state, and what works without either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
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
    net,
    rows,
    trained,
)

import nmfx

pytest.importorskip("accelerate", reason="what is tested here")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from nmfx.trainers.accelerate import follow

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    yield
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()


class Loop:
    """An ordinary loop: what `follow` returns is used only where `plan` is given."""

    def __init__(
        self,
        *,
        seed: int = 0,
        accumulate: int = 1,
        scaler: bool = False,
        precision: str = "no",
        plan: dict[str, Any] | None = None,
        wrapped: bool = True,
        compiled: bool = False,
    ) -> None:
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()  # as in a new process
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        if scaler:  # accelerate makes one on GPUs only
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.raw: Net = nmfx.sparsify(net(seed), RULES, lambda_w=LAMBDA)
        optimizer = torch.optim.SGD(
            self.raw.parameters(), LR, momentum=0.0 if plan is None else 0.9
        )
        self.collator = Recording()
        loader = DataLoader(rows(), 4, collate_fn=self.collator)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            self.raw, optimizer, loader
        )
        self.step = 0
        given = self.optimizer if wrapped else optimizer
        self.training = (
            None if plan is None else follow(self.accelerator, self.model, given, **plan)
        )
        self.logs: list[dict[str, float]] = []

    def run(
        self, steps: int, clip: float | None = None, save: tuple[int, Path] | None = None
    ) -> Loop:
        while self.step < steps:
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    if self.training is not None:
                        self.training.before_step(self.step)
                    self.accelerator.backward(self.model(**batch)["loss"])
                    if clip is not None and self.accelerator.sync_gradients:
                        if self.accelerator.scaler is not None:
                            self.accelerator.scaler.unscale_(self.optimizer.optimizer)
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.step += 1
                    if self.training is not None:
                        self.logs.append(self.training.after_step())
                    if save is not None and save[0] == self.step:
                        self.accelerator.save_state(str(save[1]))
                    if self.step == steps:
                        break
        return self

    def everything(self) -> dict[str, Any]:
        return {
            "model": dict(self.raw.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "nmfx": nmfx.state_dict(self.raw),
            "masks": nmfx.masks(self.raw),
            "monitor": self.training.state_dict()["monitor"],
        }


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.05)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_decay_counts_once_per_step(
    wrapped: bool, accumulate: int, clip: float | None, scaler: bool
) -> None:
    loop = Loop(accumulate=accumulate, scaler=scaler, wrapped=wrapped, plan={})
    for group in loop.optimizer.param_groups:
        group["momentum"] = 0.0
    loop.run(6, clip)
    batches = loop.collator.batches[: 6 * accumulate]
    expected = trained(net(), batches, accumulate=accumulate, clip=clip)
    assert_trained(loop.raw, expected)


def test_a_skipped_step_has_no_decay() -> None:
    loop = Loop(scaler=True, plan={})
    before = {name: value.clone() for name, value in loop.raw.state_dict().items()}
    batch = next(iter(loop.loader))
    loop.accelerator.backward(loop.model(**batch)["loss"] * float("inf"))
    loop.optimizer.step()
    assert loop.optimizer.step_was_skipped
    assert_identical(before, dict(loop.raw.state_dict()))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_nothing_of_nmfx_is_needed_but_the_model(precision: str) -> None:
    loop = Loop(precision=precision).run(6)
    expected = trained(net(), loop.collator.batches[:6])
    assert_trained(loop.raw, expected, **({} if precision == "no" else LOOSE))


def test_nmfx_attach_takes_the_optimizer_that_prepare_returned() -> None:
    loop = Loop(accumulate=2)
    attachment = nmfx.attach(loop.raw, loop.optimizer)
    assert attachment.parameters == ["fc1.weight", "fc2.weight"]
    loop.run(3)
    assert_trained(loop.raw, trained(net(), loop.collator.batches[:6], accumulate=2))


PLAN = {
    "lambda_w": lambda step: 1e-2 * (1 + step),
    "pattern": lambda step: {"fc1": "2:4" if step < 3 else "1:4"},
    "every": 3,
    "per_layer": True,
}


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("freeze_at", [4, 8])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resumed_training_is_bit_identical(
    precision: str, freeze_at: int, scaler: bool, tmp_path: Path
) -> None:
    settings = {
        "accumulate": 2,
        "precision": precision,
        "scaler": scaler,
        "plan": PLAN | {"freeze_at": freeze_at},
    }
    whole = Loop(**settings)
    whole.run(11, clip=0.5, save=(6, tmp_path))
    resumed = Loop(seed=5, **settings)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.step = 6
    epoch = resumed.loader
    resumed.loader = resumed.accelerator.skip_first_batches(epoch, 12)
    resumed.run(8, clip=0.5)  # the rest of the epoch
    resumed.loader = epoch
    resumed.run(11, clip=0.5)
    one, other = whole.everything(), resumed.everything()
    assert_identical(one, other)
    assert_identical(whole.logs[6:], resumed.logs)
    layers = one["nmfx"]["layers"]
    assert layers["fc1.weight"] == {"pattern": "1:4", "lambda_w": 0.11, "state": "frozen"}
    assert one["monitor"]["history"][-1]["nmfx/density/fc1.weight"] == 0.25


def test_saved_weights_are_those_of_the_dense_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    loop = Loop(plan={}).run(2)
    loop.accelerator.save_state(str(tmp_path / "state"))
    loop.accelerator.save_model(loop.model, str(tmp_path / "model"))
    for path in (tmp_path / "state", tmp_path / "model"):
        dense = Net()
        dense.load_state_dict(load_file(path / "model.safetensors"))
        assert_identical(dict(dense.state_dict()), dict(loop.raw.state_dict()))


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    loop = Loop(plan={}).run(1)
    state = loop.training.state_dict()
    other = nmfx.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), {"0": "2:4"})
    training = follow(loop.accelerator, other, torch.optim.SGD(other.parameters(), LR))
    before = nmfx.state_dict(other)
    with pytest.raises(nmfx.NMError, match="sparsified either in the model or in the state"):
        training.load_state_dict(state)
    with pytest.raises(nmfx.NMError, match="not one of nmfx"):
        training.load_state_dict({})
    assert_identical(before, nmfx.state_dict(other))


def test_an_optimizer_of_other_weights_is_refused() -> None:
    loop = Loop()
    foreign = torch.optim.SGD(net().parameters(), LR)
    with pytest.raises(nmfx.NMError, match="no optimizer of this training owns any"):
        follow(loop.accelerator, loop.model, foreign)


def test_a_frozen_base_needs_no_optimizer() -> None:
    loop = Loop()
    head = nn.Linear(4, 4)
    loop.raw.requires_grad_(False)
    training = follow(loop.accelerator, loop.model, torch.optim.SGD(head.parameters(), LR))
    training.before_step(0)
    assert training.measure()["nmfx/density"] == 0.5
