"""Hugging Face's Trainer: with nmfx's callback, and without anything of nmfx but the model."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainers_reference import (
    LAMBDA,
    LR,
    RULES,
    Recording,
    assert_identical,
    assert_trained,
    net,
    rows,
    trained,
)

import nmfx

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
pytest.importorskip("transformers", reason="the Trainer is transformers'")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from nmfx.trainers.hugging_face import FILE, NMCallback

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _collect_fast() -> Iterator[None]:
    """Each `train` collects garbage, which takes most of its time among all that tests import."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def sentences(n: int = 64) -> list[dict[str, torch.Tensor]]:
    make = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 32, (n, 8), generator=make)
    return [{"input_ids": row, "labels": row.sum() % 2} for row in ids]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 4,  # as often as it saves: a mean of losses since the restart is no news
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**settings | changes)


class StopsAt(TrainerCallback):
    """What a cluster does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Traces(TrainerCallback):
    """What each step starts from, as digests: a difference tells its step and where it began."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, str]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = dict(kwargs["model"].named_parameters())
        grads = {f"{n}.grad": p.grad for n, p in parameters.items() if p.grad is not None}
        held = {**parameters, **grads, "random state": torch.get_rng_state()}
        self.steps[state.global_step] = {name: digest(tensor) for name, tensor in held.items()}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha1(tensor.detach().contiguous().view(torch.uint8).numpy()).hexdigest()[:8]


def lambda_of(step: int) -> float:
    return 1e-3 * (1 + step)


def pattern_of(step: int) -> str:
    return "3:4" if step < 3 else "2:4"


def planned(freeze_at: int, **more: Any) -> NMCallback:
    return NMCallback("3:4", lambda_w=lambda_of, pattern=pattern_of, freeze_at=freeze_at, **more)


def trainer_of(
    folder: Path,
    seed: int,
    *callbacks: TrainerCallback,
    model: nn.Module | None = None,
    **changes: Any,
) -> Trainer:
    settings = arguments(folder, gradient_accumulation_steps=2, **changes)
    return Trainer(
        model or bert(seed), settings, train_dataset=sentences(), callbacks=list(callbacks)
    )


def everything(trainer: Trainer) -> dict[str, Any]:
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "nmfx": nmfx.state_dict(trainer.model),
        "masks": nmfx.masks(trainer.model),
        "logs": [line for line in trainer.state.log_history if "train_runtime" not in line],
    }


def interrupted(folder: Path, freeze_at: int, **more: Any) -> None:
    broken = trainer_of(folder, 0, planned(freeze_at, **more), StopsAt(9))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    torch.rand(100)  # a new process has another random state


# With bf16 the last steps differed once, in a worker that had run hundreds of tests, and never in
# 75 runs under load, whatever lay in uninitialised memory: the cause is not known, so it is no gate
# yet. The traces will tell where a difference begins.
BFLOAT16 = pytest.param(10, True, marks=pytest.mark.deep)


@pytest.mark.parametrize(("freeze_at", "bf16"), [(6, False), (10, False), BFLOAT16])
def test_resumed_training_is_bit_identical(freeze_at: int, bf16: bool, tmp_path: Path) -> None:
    all_steps, last_steps = Traces(), Traces()
    ours = planned(freeze_at, per_layer=True)
    whole = trainer_of(tmp_path / "whole", 0, ours, all_steps, bf16=bf16)
    whole.train()
    broken = [planned(freeze_at, per_layer=True), StopsAt(9)]
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "broken", 0, *broken, bf16=bf16).train()
    torch.rand(100)  # a new process has another random state
    ours = planned(freeze_at, per_layer=True)
    resumed = trainer_of(tmp_path / "broken", 5, ours, last_steps, bf16=bf16)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(last_steps.steps) == [8, 9, 10, 11]
    for step, held in last_steps.steps.items():
        assert held == all_steps.steps[step], step
    one, other = everything(whole), everything(resumed)
    assert_identical(one, other)
    layers = one["nmfx"]["layers"].values()
    assert {layer["state"] for layer in layers} == {"frozen"}
    assert {layer["lambda_w"] for layer in layers} == {lambda_of(11)}
    assert {layer["pattern"] for layer in layers} == {"2:4"}


def test_what_changes_by_hand_is_resumed_too(tmp_path: Path) -> None:
    class ByHand(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                nmfx.set_lambda(kwargs["model"], 0.125)
            if state.global_step == 3:
                nmfx.freeze(kwargs["model"])

    def make(folder: str, seed: int, *more: TrainerCallback) -> Trainer:
        model = nmfx.sparsify(bert(seed), "2:4")
        settings = arguments(tmp_path / folder)
        given = [NMCallback(), ByHand(), *more]
        return Trainer(model, settings, train_dataset=sentences(), callbacks=given)

    whole = make("a", 0)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("b", 0, StopsAt(9)).train()
    resumed = make("b", 5)
    resumed.train(resume_from_checkpoint=True)
    assert_identical(everything(whole), everything(resumed))
    layers = nmfx.state_dict(resumed.model)["layers"].values()
    assert {(layer["lambda_w"], layer["state"]) for layer in layers} == {(0.125, "frozen")}


def test_masks_are_free_again_when_one_trainer_trains_twice(tmp_path: Path) -> None:
    callback = planned(4)
    trainer = trainer_of(tmp_path, 0, callback, max_steps=6)
    trainer.train()
    assert {row.state for row in nmfx.report(trainer.model) if row.pattern} == {"frozen"}
    first = nmfx.masks(trainer.model)
    trainer.args.max_steps = 3
    trainer.train()
    assert {row.state for row in nmfx.report(trainer.model) if row.pattern} == {"sparse"}
    trainer.args.max_steps = 6
    trainer.train()
    assert {row.state for row in nmfx.report(trainer.model) if row.pattern} == {"frozen"}
    assert nmfx.sad(first, nmfx.masks(trainer.model)).total > 0
    with pytest.raises(nmfx.NMError, match="is frozen"):  # by hand: not the plan's to undo
        trainer_of(tmp_path, 0, planned(4), max_steps=6, model=trainer.model).train()


def test_masks_are_free_again_after_a_best_model_was_loaded(tmp_path: Path) -> None:
    trainer = Trainer(
        bert(),
        arguments(
            tmp_path, max_steps=4, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True
        ),
        train_dataset=sentences(),
        eval_dataset=sentences(4),
        callbacks=[planned(2)],
    )
    trainer.train()
    assert {row.state for row in nmfx.report(trainer.model) if row.pattern} == {"frozen"}
    trainer.args.max_steps, trainer.args.load_best_model_at_end = 1, False
    trainer.train()
    assert {row.state for row in nmfx.report(trainer.model) if row.pattern} == {"sparse"}


def test_a_checkpoint_elsewhere_is_named_and_recognized_by_its_weights(tmp_path: Path) -> None:
    interrupted(tmp_path / "one", 6)
    checkpoint = tmp_path / "one" / "checkpoint-8"
    # A checkpoint of another run that stands where the Trainer would have left its own.
    other = tmp_path / "two" / "checkpoint-8"
    trainer_of(tmp_path / "two", 3, planned(6), max_steps=8).train()
    assert (other / FILE).exists()

    lost = trainer_of(tmp_path / "two", 5, planned(6))
    with pytest.raises(nmfx.NMError, match=r"at step 8, and no nmfx.pt .*\(resume_from=\.\.\."):
        lost.train(resume_from_checkpoint=str(checkpoint))
    found = trainer_of(tmp_path / "two", 5, planned(6, resume_from=checkpoint))
    found.train(resume_from_checkpoint=str(checkpoint))
    straight = trainer_of(tmp_path / "three", 0, planned(6))
    straight.train()
    assert_identical(everything(straight), everything(found))


def test_a_dense_run_goes_on_sparse(tmp_path: Path) -> None:
    dense = trainer_of(tmp_path, 0, max_steps=4)
    dense.train()
    refused = trainer_of(tmp_path, 5, NMCallback("2:4"))
    with pytest.raises(nmfx.NMError, match="resume_from=False if nothing was sparse"):
        refused.train(resume_from_checkpoint=True)
    sparse = trainer_of(tmp_path, 5, NMCallback("2:4", resume_from=False))
    sparse.train(resume_from_checkpoint=True)
    assert sparse.state.global_step == 12
    assert nmfx.state_dict(sparse.model)["layers"]


def test_checkpoints_are_those_of_the_dense_model(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 0, NMCallback("2:4"), max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-4", "final"):
        plain = BertForSequenceClassification.from_pretrained(tmp_path / folder)
        assert_identical(dict(plain.state_dict()), dict(trainer.model.state_dict()))
        assert all(row.state == "dense" for row in nmfx.report(plain).rows)
    nmfx.fold(trainer.model).save_pretrained(tmp_path / "folded")
    folded = BertForSequenceClassification.from_pretrained(tmp_path / "folded")
    for name, mask in nmfx.masks(trainer.model).items():
        assert torch.equal(folded.get_parameter(name) != 0, mask), name
    content = torch.load(tmp_path / "checkpoint-4" / FILE, weights_only=True)
    assert content["step"] == 4


def test_the_best_model_comes_with_its_own_masks(tmp_path: Path) -> None:
    """Its checkpoint was saved at 3:4 and unfrozen, the last step has frozen 2:4 masks."""
    scores = iter([1.0, 5.0, 6.0])
    trainer = Trainer(
        bert(),
        arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=4,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=False,
        ),
        train_dataset=sentences(),
        eval_dataset=sentences(4),
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[
            NMCallback(
                "3:4",
                lambda_w=lambda_of,
                pattern=lambda step: "3:4" if step < 6 else "2:4",
                freeze_at=9,
            )
        ],
    )
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    plain = BertForSequenceClassification.from_pretrained(best)
    assert_identical(dict(plain.state_dict()), dict(trainer.model.state_dict()))
    layers = nmfx.state_dict(trainer.model)["layers"].values()
    assert {(one["pattern"], one["state"], one["lambda_w"]) for one in layers} == {
        ("3:4", "sparse", lambda_of(3))
    }


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.05)])
def test_the_decay_counts_once_per_step(accumulate: int, clip: float, tmp_path: Path) -> None:
    model, collator = net(), Recording()
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=4,
            save_strategy="no",
            gradient_accumulation_steps=accumulate,
            max_grad_norm=clip,
            lr_scheduler_type="constant",
        ),
        train_dataset=rows(),
        data_collator=collator,
        optimizers=(torch.optim.SGD(model.parameters(), LR), None),
        callbacks=[NMCallback(RULES, lambda_w=lambda step: LAMBDA * (1 + step))],
    )
    trainer.train()
    expected = trained(
        net(),
        collator.batches[: 4 * accumulate],
        accumulate=accumulate,
        clip=clip or None,
        lambda_w=lambda step: LAMBDA * (1 + step),
    )
    assert_trained(model, expected)


PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_trainers_hugging_face import *
model, collator = net(), Recording()
settings = arguments(Path(sys.argv[2]), max_steps=4, save_strategy="no", max_grad_norm=0.05,
                     lr_scheduler_type="constant", ddp_backend="gloo")
optimizer = torch.optim.SGD(model.parameters(), LR)
trainer = Trainer(model, settings, train_dataset=rows(), data_collator=collator,
                  optimizers=(optimizer, None), callbacks=[NMCallback(RULES, lambda_w=LAMBDA)])
trainer.train()
assert torch.distributed.get_world_size() == 2
torch.save((model.state_dict(), collator.batches), f"{sys.argv[2]}/{os.environ['RANK']}.pt")
"""


@pytest.mark.deep
def test_the_decay_does_not_grow_with_the_number_of_processes(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(here), str(tmp_path)]
    subprocess.run([sys.executable, *command], check=True, env=environment, timeout=300)
    ends = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_identical(ends[0][0], ends[1][0])
    batches = [
        {key: torch.cat([one[key], other[key]]) for key in one}
        for one, other in zip(ends[0][1][:4], ends[1][1][:4], strict=True)
    ]
    model = net()
    model.load_state_dict(ends[0][0])
    assert_trained(model, trained(net(), batches, clip=0.05))


@pytest.mark.deep
def test_a_compiled_model_is_trained_and_resumed(tmp_path: Path) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    whole = trainer_of(tmp_path, 0, planned(6), **compiled)
    whole.train()
    resumed = trainer_of(tmp_path, 5, planned(6), **compiled)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_identical(everything(whole), everything(resumed))


def test_no_callback_is_needed(tmp_path: Path) -> None:
    model, collator = nmfx.sparsify(net(), RULES, lambda_w=LAMBDA), Recording()
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=4,
            save_strategy="no",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        ),
        train_dataset=rows(),
        data_collator=collator,
        optimizers=(torch.optim.SGD(model.parameters(), LR), None),
    )
    trainer.train()
    assert_trained(model, trained(net(), collator.batches[:4]))


def test_an_optimizer_as_accelerate_wraps_it_can_be_attached(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 0, NMCallback("2:4"), max_steps=1)
    trainer.train()
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer"
    attachment = nmfx.attach(trainer.model, trainer.optimizer)
    assert len(attachment.parameters) == len(nmfx.masks(trainer.model))


def test_logs_have_the_numbers_of_the_masks(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        """Stands where TensorBoard and W&B do."""

        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            self.seen.append(dict(logs))

    ours, reporter = planned(8), Reporter()
    trainer = trainer_of(tmp_path, 0, reporter, ours)
    ours.go_first(trainer)
    trainer.train()
    history = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in history] == [4, 8, 12]
    assert [line["nmfx/density"] for line in history] == [0.5, 0.5, 0.5]
    assert [line["nmfx/lambda_w"] for line in history] == [lambda_of(3), lambda_of(7), 0.0]
    flips = [line["nmfx/flips_per_step"] for line in history]
    assert flips[0] >= 0.25 / 4  # a third of 3:4's weights goes at 2:4
    assert flips[1] > 0
    assert flips[2] == 0  # frozen
    for line, seen in zip(history, reporter.seen, strict=False):
        assert seen["nmfx/density"] == line["nmfx/density"]
    assert not any("weight" in name for line in history for name in line)
    saved = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert saved["log_history"][-1]["nmfx/density"] == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rules": "4:2"}, "4:2"),
        ({"lambda_w": -1.0}, "lambda_w=-1.0"),
        ({"pattern": "2:4"}, "pattern='2:4' is no function of the step"),
        ({"freeze_at": 0.5}, "freeze_at=0.5 is not a step"),
        ({"resume_from": True}, "resume_from=True names no checkpoint"),
    ],
)
def test_a_plan_that_does_not_hold_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(nmfx.NMError, match=message):
        NMCallback(**given)


def test_a_dense_model_is_refused_before_a_step_is_trained(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 0, NMCallback())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(nmfx.NMError, match="has no sparsified layer"):
        trainer.train()
    assert_identical(before, dict(trainer.model.state_dict()))


def test_a_schedule_that_does_not_hold_stops_the_training(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 0, NMCallback("2:4", lambda_w=lambda step: 2.0 - step))
    with pytest.raises(nmfx.NMError, match=r"lambda_w=-1\.0"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_a_saved_file_that_is_none_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, 6)
    torch.save([1], tmp_path / "checkpoint-8" / FILE)
    with pytest.raises(nmfx.NMError, match=r"nmfx.pt is not a file of nmfx.trainers"):
        trainer_of(tmp_path, 5, planned(6)).train(resume_from_checkpoint=True)


def test_the_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    model = bert()
    parameters: list[nn.Parameter] = list(model.parameters())
    settings = arguments(tmp_path, max_steps=1)
    Trainer(model, settings, train_dataset=sentences(), callbacks=[NMCallback("2:4")]).train()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_adapters_over_a_frozen_sparse_base_are_resumed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")

    def make(folder: str, seed: int, *more: TrainerCallback) -> Trainer:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = peft.get_peft_model(bert(), config)
        return Trainer(
            model,
            arguments(tmp_path / folder, label_names=["labels"]),
            train_dataset=sentences(),
            callbacks=[NMCallback("2:4", freeze_at=2), *more],
        )

    whole = make("a", 0)
    base = {n: p.clone() for n, p in whole.model.named_parameters() if not p.requires_grad}
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("b", 0, StopsAt(9)).train()
    resumed = make("b", 5)
    resumed.train(resume_from_checkpoint=True)
    assert_identical(everything(whole), everything(resumed))
    for name, value in base.items():
        assert torch.equal(value, resumed.model.get_parameter(name)), name
    assert not any("lora_" in name for name in nmfx.masks(resumed.model))
    saved = {path.name for path in (tmp_path / "b" / "checkpoint-12").iterdir()}
    assert {FILE, "adapter_model.safetensors"} <= saved
    assert "model.safetensors" not in saved
