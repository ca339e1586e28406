"""The coverage sweep finds what it is made to find, and reports crashes and limits as such."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmfx

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from sweep import reference, shrink, stages, table, timm_zoo, torch_zoo  # noqa: E402
from sweep.case import Case, liven  # noqa: E402
from sweep.compare import compare  # noqa: E402


class Reader(nn.Module):
    """Reads the weight of `inner` once more, from where no rewriting finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.other = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)
        self.hidden = [self.inner.weight]

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(self.inner(x).relu())
        return self.head(y + x @ self.hidden[0])


def run_steps(case: Case) -> dict[str, Any]:
    """All steps of the main stage, in this process."""
    row: dict[str, Any] = {"key": "test/model"}

    def note(key: str, value: Any) -> Any:
        return row.get(value) if key == "get" else row.__setitem__(key, value)

    stages.main_steps(case, note)
    return row


def reader() -> Case:
    return Case(Reader().eval(), (torch.randn(3, 16),))


@pytest.mark.parametrize(
    "name", ["Linear", "Conv2d_groups", "translation_tied", "TransformerEncoder"]
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sweep_passes_models_that_are_right(name: str) -> None:
    row = run_steps(torch_zoo.build(name))
    wrong = {step: row.get(step) for step in table.STEPS[:10] if row.get(step) != "pass"}
    assert not wrong, wrong
    assert table.outcome(row) == "pass"
    assert table.passed(row) == "10/10"
    assert 0.3 < row["share"] <= 1.0, row["share"]


def test_sweep_explains_a_raw_read_that_verify_names() -> None:
    row = run_steps(reader())
    assert row["verify"].startswith("explained: verify names 1: inner.weight"), row["verify"]
    assert "with these dense, equal" in row["eval"], row["eval"]
    assert row["fold"].startswith("explained: raw reads"), row["fold"]
    assert table.outcome(row) in ("pass", "nmerror"), table.reasons(row)


def test_sweep_calls_a_raw_read_silent_if_verify_misses_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(nmfx, "verify", lambda model, *args, **kwargs: {})
    row = run_steps(reader())
    assert row["eval"].startswith("fail: SILENT"), row["eval"]
    assert row["train"].startswith("fail: SILENT"), row["train"]
    assert table.outcome(row) == "silent"


def _unmasked(model: nn.Module, **fields: Any) -> nn.Module:
    import copy

    return nmfx.unsparsify(copy.deepcopy(model))


@pytest.mark.parametrize(
    ("verb", "broken", "step"),
    [
        ("fold", _unmasked, "fold"),
        ("lower", lambda model, *args, **kwargs: _unmasked(model), "lower"),
        ("load", lambda path, into: into, "save"),
        ("sparsify", lambda model, rules, lambda_w: SPARSIFY(model, "1:4"), "report"),
        ("sparsify", lambda model, rules, lambda_w: SPARSIFY(model, rules), "eval"),
        ("report", lambda model: nmfx.report.__class__, "report"),
    ],
    ids=["fold", "lower", "load", "pattern", "lambda", "report"],
)
def test_sweep_detects_a_broken_verb(monkeypatch: Any, verb: str, broken: Any, step: str) -> None:
    monkeypatch.setattr(nmfx, verb, broken)
    row = run_steps(torch_zoo.build("Linear"))
    assert row[step].startswith("fail: "), row
    assert table.outcome(row) in ("silent", "fail")


SPARSIFY = nmfx.sparsify


def test_sweep_counts_an_nmerror_as_one() -> None:
    row = run_steps(
        Case(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval(), (torch.ones(1, 3),))
    )
    assert row["sparsify"].startswith("nmerror: nothing to sparsify"), row
    assert table.outcome(row) == "nmerror"
    assert "straddle" in table.reasons(row)


def test_compare_sees_values_shapes_and_nan() -> None:
    x = torch.tensor([1.0, 2.0])
    assert compare([x], [x.clone()]).equal
    assert compare([x], [x + 0.1]).size == pytest.approx(0.1 / 2.1)
    assert compare([x], [x[:1]]).size == float("inf")
    assert compare([x], [torch.tensor([1.0, float("nan")])]).wrong(1e9)
    nan = torch.tensor([1.0, float("nan")])
    assert not compare([nan], [nan.clone()]).wrong(0.0)


def test_reference_mask_keeps_the_larger_and_the_earlier() -> None:
    weight = torch.tensor([[1.0, -2.0, 2.0, 0.5, 3.0, -3.0, 3.0, -3.0]])
    assert reference.nm_mask(weight, 2, 4, 1).nonzero()[:, 1].tolist() == [1, 2, 4, 5]


def test_liven_moves_constants_and_scales_up_what_is_tiny() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    liven(model)
    assert float(model[0].weight.detach().std()) == pytest.approx(64**-0.5, rel=0.1)
    assert float(model[1].weight.detach().std()) == pytest.approx(0.1, rel=0.5)


def test_shrink_keeps_what_must_divide() -> None:
    transformers = pytest.importorskip("transformers", reason="shrinks its configs")
    config = shrink.Shrinker(16).config(transformers.LlamaConfig)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (
        256,
        32,
        2,
    )
    assert config.vocab_size == shrink.VOCAB
    both = shrink.Shrinker(8).config(transformers.CLIPConfig)
    assert both.text_config.hidden_size == 64
    assert both.vision_config.num_hidden_layers == 2


def test_timm_choice_takes_the_smallest_of_each_variety() -> None:
    found = timm_zoo.choose(
        {
            "vit_base_patch16_224": ("vit", 86),
            "vit_tiny_patch16_224": ("vit", 5),
            "vit_relpos_small_patch16_224": ("vit", 22),
            "resnet50": ("resnet", 25),
            "resnet18": ("resnet", 11),
            "seresnet18": ("resnet", 12),
        }
    )
    expected = ["vit_tiny_patch16_224", "resnet18", "seresnet18", "vit_relpos_small_patch16_224"]
    assert found == expected


RUNNER = """
import os, signal, sys, time
from pathlib import Path
from sweep.runner import Limits, run_all  # noqa: E402

def busy(note):
    note("begin", "fold")
    while True: pass

def crash(note):
    note("fold", "pass"); note("begin", "lower")
    os.kill(os.getpid(), signal.SIGSEGV)

def raises(note):
    raise KeyError("gone")

def hungry(note):
    bytearray(3 * 2**30)

jobs = {"busy": busy, "crash": crash, "raises": raises, "hungry": hungry,
        "good": lambda note: note("fold", "pass")}
import json
run_all(jobs, Path(sys.argv[1]), 2, Limits(1, 1.0), lambda key, row: print(json.dumps([key, row])))
"""


def test_runner_reports_crashes_limits_and_errors(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", RUNNER, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = dict(map(json.loads, done.stdout.splitlines()))
    assert rows["busy"]["fold"] == "fail: over the CPU-time limit", rows
    assert rows["crash"]["lower"] == "fail: killed by SIGSEGV", rows
    assert rows["crash"]["fold"] == "pass", rows
    assert rows["raises"]["error"] == "KeyError: 'gone'", rows
    assert rows["hungry"]["error"].startswith("MemoryError"), rows
    assert rows["good"]["end"] == "done", rows


def test_command_writes_the_table_and_resumes(tmp_path: Path) -> None:
    result, work = tmp_path / "coverage.md", tmp_path / "work"
    options = ["--library", "torch", "--only", "torch/*Bilinear", "--stage", "main"]
    command = [sys.executable, str(BENCHMARKS / "coverage.py"), *options]
    command += ["--work", str(work), "--result", str(result)]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torch/Bilinear: ok" in first.stdout, first.stdout + first.stderr
    text = result.read_text(encoding="utf-8")
    assert "| torch | Bilinear |" in text, text
    assert "| all | 1 | 1 | 1 (100.0%) | 0 | 0 | 0 |" in text, text
