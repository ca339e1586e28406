"""`python -m nmfx demo --task lm`: the command end to end, its messages, text, model, training."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

import nmfx
from nmfx.__main__ import main
from nmfx.demo.command import add_options
from nmfx.demo.lm import figure, options, table, text, training
from nmfx.demo.lm.model import make_model
from nmfx.demo.lm.study import Plan, Study, reports
from nmfx.demo.lm.training import Result, Run, Setup, prepare, train
from nmfx.demo.meter import FLIPS_EVERY, Packed
from nmfx.demo.rows import Row

TINY = Setup(40, 4, 32, 32, 1, 2, 4e-3, "step", compiled=False)
SPARSE = Run("2:4", 2e-4, 0, TINY)


@pytest.fixture(autouse=True)
def few_windows(monkeypatch):
    monkeypatch.setattr(training, "CURVE_WINDOWS", 8)
    monkeypatch.setattr(training, "FINAL_WINDOWS", 32)


def plan_of(*arguments: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return options.make_plan(parser.parse_args(["--task", "lm", *arguments]))


def without_time(result: Result) -> Result:
    return replace(result, milliseconds=0.0)


# --- the command -------------------------------------------------------------------------------


def test_quick_lm_demo_prints_report_and_table_and_draws_the_picture(tmp_path):
    command = [sys.executable, "-m", "nmfx", "demo", "--task", "lm", "--quick", "--workers", "1"]
    command += ["--no-compile", "--seeds", "1", "--steps", "20", "--patterns", "2:4", "--width=32"]
    path = {**os.environ, "PYTHONPATH": str(Path(nmfx.__file__).parents[1])}  # also uninstalled
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first_cells = [line.split("│")[1].strip() for line in done.stdout.splitlines() if "│" in line]
    assert first_cells == ["dense", "2:4 STE", "2:4 SR-STE"], done.stdout
    assert "the output layer stays dense by default" in done.stdout, done.stdout
    assert "lambda_w=0.02, once per optimizer step" in done.stdout, done.stdout
    assert "3/3" in done.stderr, f"no finished progress bar: {done.stderr}"
    assert "Warning" not in done.stderr, done.stderr
    assert imread(tmp_path / "nmfx_demo.png").shape[0] > 400


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "30"], "--width 30 is not a multiple of --heads 4"),
        (["--width", "0"], "'0' is not a whole number of at least 1"),
        (["--steps", "5"], f"at least {FLIPS_EVERY}"),
        (["--patterns", "2:4", "4:2"], "argument --patterns: "),
        (["--patterns", "1:7"], "not a multiple of 7"),
        (["--lambdas", "0"], "'0' is not a finite number above 0"),
        (["--lambdas", "nan"], "'nan' is not a finite number above 0"),
        (["--decay", "never"], "invalid choice: 'never'"),
        (["--rate", "fast"], "'fast' is not a finite number"),
        (["--out", "picture.txt"], "--out picture.txt: the suffix is not one of"),
        (["--task", "digits", "--no-compile"], "--no-compile is for --task lm"),
        (["--task", "digits", "--lambdas", "1"], "--lambdas is for --task lm"),
    ],
)
def test_wrong_lm_request_is_one_line_and_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--task", "lm", *arguments])
    assert exit.value.code == 2, exit.value.code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert words in error, error


def test_missing_compiler_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--task", "lm", "--quick"])
    assert exit.value.code == 2, exit.value.code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "no-such-compiler was not found" in error, error
    assert "--no-compile" in error, error
    assert not plan_of("--no-compile").setup.compiled


def test_python_without_source_is_one_line_and_status_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    text.load.cache_clear()
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--task", "lm", "--quick", "--no-compile"])
    assert exit.value.code == 2, exit.value.code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "trains on Python's own source" in error, error


def test_explicit_options_win_over_quick():
    plan = plan_of("--quick", "--width", "48", "--heads", "3", "--context", "16", "--no-compile")
    assert (plan.setup.width, plan.setup.heads, plan.setup.context) == (48, 3, 16), plan
    assert plan.setup.steps < plan_of().setup.steps, plan


def test_methods_are_dense_then_ste_and_every_lambda_of_each_pattern():
    plan = plan_of("--patterns", "1:4", "2:8", "1:4", "--lambdas", "1e-3", "0.01")
    sparse = [(pattern, value) for pattern in ("1:4", "2:8") for value in (0.0, 1e-3, 0.01)]
    assert plan.methods == [(None, 0.0), *sparse], plan.methods


# --- the text ----------------------------------------------------------------------------------


def test_split_is_deterministic_disjoint_and_complete(tmp_path):
    for name in ("ast.py", "os.py", "email/a.py", "email/b.py", "test/x.py", "json/tests/y.py",
                 "site-packages/z.py", "_sysconfigdata_here.py", "note.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    found = [path.as_posix() for path in text.files(tmp_path)]
    assert found == ["ast.py", "email/a.py", "email/b.py", "os.py"], found
    # Fixed by the names: another machine, or another Python, holds out the same modules.
    assert [text.is_held_out(Path(name)) for name in found] == [True, True, True, False]


def test_both_splits_hold_text_and_no_module_is_in_both():
    folder = Path(os.__file__).parent
    files = text.files(folder)
    sides = {side: {f.parts[0] for f in files if text.is_held_out(f) == side} for side in (0, 1)}
    assert not sides[0] & sides[1], sides
    train_bytes, held_bytes = len(text.load("train")), len(text.load("held out"))
    assert train_bytes + held_bytes == sum((folder / file).stat().st_size for file in files)
    assert 0.03 < held_bytes / train_bytes < 0.3, (held_bytes, train_bytes)


def test_load_is_the_same_in_every_call():
    first = text.load("held out").clone()
    text.load.cache_clear()
    assert torch.equal(first, text.load("held out"))


def test_windows_are_text_and_the_byte_after_each():
    for inputs, following in (text.draw(5, 16, torch.Generator()), text.held_out(5, 16)):
        assert inputs.shape == following.shape == (5, 16)
        assert torch.equal(inputs[:, 1:], following[:, :-1])
    source = bytes(text.load("held out").tolist())
    inputs, following = text.held_out(5, 16)
    last = bytes([*inputs[-1].tolist(), following[-1, -1].item()])
    assert source.endswith(last), "the last window ends with the text"
    assert source.startswith(bytes(inputs[0].tolist())), "the first one starts with it"


# --- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("place", [1, 7, 15])
def test_model_is_causal(pattern, place):
    model = make_model(32, 2, 2, 16, seed=0).eval()
    if pattern:
        nmfx.sparsify(model, pattern)
    bytes_before, _ = text.draw(3, 16, torch.Generator().manual_seed(0))
    bytes_after = bytes_before.clone()
    bytes_after[:, place] = (bytes_after[:, place] + 1) % 256
    before, after = model(bytes_before), model(bytes_after)
    torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=1e-6)
    moved = (before - after).abs().amax((0, 2))[place:]
    assert (moved > 1e-5).all(), f"every later place sees the byte: {moved}"


def test_untrained_model_guesses():
    bits = training.evaluate(make_model(32, 1, 2, 32, seed=0), windows=8, context=32)
    assert 7.9 < bits < 8.1, bits


def test_model_and_training_leave_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    train(replace(SPARSE, setup=replace(TINY, steps=20)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_block_matrices_are_made_sparse_and_nothing_else():
    model, _ = prepare(SPARSE)
    sparse = set(nmfx.masks(model))
    matrices = {
        name
        for name, parameter in model.named_parameters()
        if name.startswith("blocks.") and parameter.dim() == 2
    }
    assert len(matrices) == 4, matrices
    assert sparse == matrices, sparse ^ matrices
    (report,) = reports(plan_of("--patterns", "2:4", "--no-compile"))
    assert "head.weight" in report, report
    assert "12 of 13 layers" in report, report


def test_weight_decay_is_on_block_matrices_only():
    model, optimizer = prepare(SPARSE)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (training.WEIGHT_DECAY, 0.0)
    counts = len(decayed["params"]), len(others["params"])
    assert counts == (4, len(list(model.parameters())) - 4), counts


@pytest.mark.parametrize(
    ("decay", "words"), [("step", "once per optimizer step"), ("backward", "inside backward")]
)
def test_decay_is_where_it_was_asked_for(decay, words):
    model, _optimizer = prepare(replace(SPARSE, setup=replace(TINY, decay=decay)))
    assert words in str(nmfx.report(model)), nmfx.report(model)


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "density"), [(None, 1.0), ("2:4", 0.5), ("1:4", 0.25), ("1:16", 0.0625)]
)
def test_training_learns_and_keeps_n_of_m(pattern, density):
    result = train(Run(pattern, 0.0, 0, TINY))
    assert result.bits < 6.0, f"far below guessing, 8 bits: {result}"
    assert result.curve[0][1] > result.curve[-1][1], result.curve
    assert result.density == density, result
    assert result.milliseconds > 0, result
    if pattern is None:
        assert (result.flips, result.sad, result.packed) == ([], 0.0, None), result
        return
    assert [step for step, _ in result.flips] == [20, 40], result
    assert 0 < result.sad < 1, result
    assert result.packed is not None, result
    assert result.packed.max_difference < 1e-4, result
    assert result.packed.lowered_bytes < result.packed.folded_bytes, result


def test_every_group_keeps_n_of_m_at_the_end(monkeypatch):
    models = []

    def keep(run):
        models.append(prepare(run))
        return models[-1]

    monkeypatch.setattr(training, "prepare", keep)
    train(SPARSE)
    model = models[0][0]
    folded = nmfx.fold(model)
    for name in nmfx.masks(model):
        assert nmfx.is_nm(folded.get_parameter(name).detach(), "2:4", dim=1), name


def test_same_run_gives_the_same_numbers():
    assert without_time(train(SPARSE)) == without_time(train(SPARSE))


@pytest.mark.parametrize("change", [{"seed": 1}, {"lambda_w": 10.0}, {"pattern": "1:4"}])
def test_training_depends_on_the_run(change):
    base, other = train(SPARSE), train(replace(SPARSE, **change))
    assert (base.bits, base.flips, base.sad) != (other.bits, other.flips, other.sad)


def test_compiled_training_gives_the_numbers_of_eager():
    eager = train(SPARSE)
    compiled = train(replace(SPARSE, setup=replace(TINY, compiled=True)))
    # Fused kernels round differently, and 40 steps let that grow.
    assert abs(eager.bits - compiled.bits) < 0.02, (eager.bits, compiled.bits)
    assert compiled.density == 0.5, compiled


# --- what is printed and drawn: results go in, nothing else comes out --------------------------


def made_up_study() -> Study:
    plan = replace(plan_of("--quick", "--no-compile", "--lambdas", "2e-4", "1e-3"), workers=2)

    def row(method, values):
        results = []
        for run, bits in zip(plan.runs(method), values, strict=True):
            curve = [(20, 5.0), (40, bits)]
            if run.pattern is None:
                results.append(Result(run, bits, curve, [], 0.0, 1.0, None, 10.0))
                continue
            flips, packed = [(20, 2e-3), (40, 0.0)], Packed(1e-6 * run.seed, 3000, 1500)
            results.append(Result(run, bits, curve, flips, 0.125, 0.5, packed, 16.0))
        return Row(*method, results)

    values = [(3.0, 3.2), (3.25, 3.35), (3.2, 3.4), (3.5, 3.6), (4.0, 4.0), (3.9, 3.9), (4.1, 4.1)]
    return Study(plan, [row(*pair) for pair in zip(plan.methods, values, strict=True)])


def test_lm_table_shows_means_spreads_and_speed_in_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    assert len(table.title(plan_of("--no-compile"))) < 76, "one line above the table"
    console.print(table.make_table(made_up_study()))
    output = console.export_text()
    for words in ("3.100 +- 0.141", "3.300 +- 0.071", "1.00e-03", "0.125", "16.0", "62.5"):
        assert words in output, f"{words} is missing:\n{output}"


def test_lm_json_holds_the_numbers_of_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("nmfx.demo.command.run_lm_study", lambda plan: made_up_study())
    picture = str(tmp_path / "picture.png")
    main(["demo", "--task", "lm", "--quick", "--no-compile", "--json", "--out", picture])
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["seeds"], found["picture"]) == ("lm", [0, 1], picture)
    assert found["setup"]["compiled"] is False
    assert len(found["rows"]) == 7
    assert found["rows"][1] == {
        "method": "2:4 STE",
        "pattern": "2:4",
        "lambda_w": 0.0,
        "flips": pytest.approx(1e-3),
        "sad": 0.125,
        "density": 0.5,
        "max_difference": 1e-6,
        "folded_bytes": 3000,
        "lowered_bytes": 1500,
        "bits_per_byte": {
            "mean": pytest.approx(3.3),
            "deviation": pytest.approx(0.005**0.5),
            "each": [3.25, 3.35],
        },
        "ms_per_step": 16.0,
    }
    names = [(one["method"], one["minus"], one["better"]) for one in found["differences"][:3]]
    assert names == [
        ("2:4 STE", "dense", 0),
        ("2:4 SR-STE 0.0002", "2:4 STE", 1),
        ("2:4 SR-STE 0.001", "2:4 STE", 0),
    ]
    assert found["differences"][0]["mean"] == pytest.approx(0.2)


def test_lm_legend_says_how_the_numbers_were_made():
    study = made_up_study()
    lines = "\n".join(table.legend(study.plan))
    assert "eager, one thread, up to 2 runs" in lines, lines
    assert "at the optimizer step (nmfx.attach)" in lines, lines
    compiled = replace(study.plan.setup, compiled=True, decay="backward")
    lines = "\n".join(table.legend(replace(study.plan, setup=compiled)))
    assert "torch.compile, one thread" in lines, lines
    assert "lambda_W acts inside backward" in lines, lines


def test_wins_and_losses_of_sr_ste_are_shown():
    lines = table.difference_lines(made_up_study())
    assert "2:4 STE minus dense" in lines[1], lines
    assert "+0.2000 +- 0.0707, better on 0 of 2 seeds" in lines[1], lines
    assert "+0.0000 +- 0.0707, better on 1 of 2 seeds" in lines[2], lines
    assert "+0.2500 +- 0.0000, better on 0 of 2 seeds" in lines[3], lines
    assert "-0.1000 +- 0.0000, better on 2 of 2 seeds" in lines[5], lines


def test_lm_packed_difference_is_the_worst_seed():
    lines = table.packed_lines(made_up_study())
    assert "50.00 % nonzeros; outputs differ by at most 1.0e-06; bytes 3,000 -> 1,500" in lines[1]


def test_lm_picture_tells_all_methods_apart():
    quality, flips = figure.make_figure(made_up_study()).axes
    looks = {(line.get_color(), line.get_linestyle()) for line in quality.lines}
    assert len(looks) == len(quality.lines) == 7, looks
    assert len(flips.lines) == 6, flips.lines
