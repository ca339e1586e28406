"""What holds for all trainers, and needs none of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import nmfx
from nmfx.trainers.plan import Plan
from nmfx.trainers.training import Training

PROGRAM = """
import sys
import nmfx, nmfx.trainers, nmfx.trainers.accelerate
for name in ("transformers", "accelerate", "lightning", "pytorch_lightning", "peft"):
    assert name not in sys.modules, name
for name in ("transformers", "lightning", "lightning.pytorch", "pytorch_lightning"):
    sys.modules[name] = None  # not installed
for module, package in (("hugging_face", "transformers"), ("lightning", "lightning")):
    try:
        __import__(f"nmfx.trainers.{module}")
    except ImportError as error:
        assert f"pip install {package}" in str(error), error
    else:
        raise AssertionError(module)
"""


def test_optional_packages_are_imported_when_asked_for_and_missed_by_name() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)


def sparse() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    return nmfx.sparsify(model, {"0": "2:4", "2": "2:4"})


def test_a_step_changes_what_is_planned_for_it_and_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    module = sys.modules["nmfx.trainers.training"]
    for name in ("set_lambda", "set_pattern", "freeze"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))
        )
    model = sparse()
    training = Training(
        model,
        Plan(
            lambda_w=lambda step: 0.5 if step < 2 else 0.25,
            pattern=lambda step: {"0": "2:4" if step < 1 else "1:4"},
            freeze_at=3,
        ),
    )
    seen = []
    for step in (0, 0, 1, 1, 2, 3, 4):
        calls.clear()
        training.before_step(step)
        seen.append(list(calls))
    both, nothing = ["set_lambda", "set_pattern"], []
    assert seen == [both, nothing, both[1:], nothing, both[:1], ["freeze"], nothing]
    layers = nmfx.state_dict(model)["layers"]
    assert layers["0.weight"] == {"pattern": "1:4", "lambda_w": 0.25, "state": "frozen"}
    assert layers["2.weight"]["pattern"] == "2:4"


def test_what_failed_is_tried_again() -> None:
    values = iter([-1.0, -1.0])
    training = Training(sparse(), Plan(lambda_w=lambda step: next(values)))
    for _ in range(2):
        with pytest.raises(nmfx.NMError, match=r"lambda_w=-1\.0"):
            training.before_step(0)


def test_a_wrapper_without_an_optimizer_inside_is_refused() -> None:
    model = sparse()

    class Odd(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.param_groups = [{"params": list(model.parameters())}]
            self.optimizer = self

    with pytest.raises(nmfx.NMError, match="Odd has no step hooks"):
        nmfx.attach(model, Odd())
