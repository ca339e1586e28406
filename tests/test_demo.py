"""`python -m nmfx demo`: the command end to end, its messages, and the task behind it."""

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
from nmfx.demo import digits, figure, table
from nmfx.demo.command import GRID, add_options, make_plan
from nmfx.demo.meter import FLIPS_EVERY, Packed
from nmfx.demo.rows import Row, spread
from nmfx.demo.study import Plan, Study
from nmfx.demo.training import Result, Run, train

METHODS = ["dense", "2:4 STE", "2:4 SR-STE", "1:16 STE", "1:16 SR-STE"]


def plan_of(*arguments: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return make_plan(parser.parse_args(arguments))


# --- the command -------------------------------------------------------------------------------


def test_quick_demo_prints_the_table_and_draws_the_picture(tmp_path):
    command = [sys.executable, "-m", "nmfx", "demo", "--quick", "--workers", "1"]
    path = {**os.environ, "PYTHONPATH": str(Path(nmfx.__file__).parents[1])}  # also uninstalled
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first_cells = [line.split("│")[1].strip() for line in done.stdout.splitlines() if "│" in line]
    assert first_cells == METHODS, done.stdout
    assert done.stdout.count("outputs differ by at most") == 2, done.stdout
    assert "not shown above" in done.stdout, done.stdout
    assert "14/14" in done.stderr, f"no finished progress bar: {done.stderr}"
    assert "Warning" not in done.stderr, done.stderr
    picture = imread(tmp_path / "nmfx_demo.png")
    assert picture.shape[0] > 400, picture.shape
    assert picture.shape[1] > 800, picture.shape
    colours = torch.from_numpy(picture[..., :3]).flatten(0, 1).mul(255).int().unique(dim=0)
    assert len(colours) > 50, f"a nearly empty picture: {len(colours)} colours"


def test_quick_demo_prints_one_json_document_and_progress_elsewhere(tmp_path):
    command = [sys.executable, "-m", "nmfx", "demo", "--quick", "--workers", "1", "--seeds", "1"]
    path = {**os.environ, "PYTHONPATH": str(Path(nmfx.__file__).parents[1])}  # also uninstalled
    command += ["--json", "--steps", "20"]
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["method"] for row in found["rows"]] == METHODS, found
    assert (tmp_path / found["picture"]).stat().st_size > 1000
    assert "9/9" in done.stderr, f"no finished progress bar: {done.stderr}"


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_missing_extra_is_one_line_and_status_2(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--quick"])
    assert exit.value.code == 2, exit.value.code
    name = {"sklearn": "scikit-learn"}.get(module, module)
    expected = f"python -m nmfx demo: needs {name}: install the extra nmfx-torch[demo]\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: command"),
        (["polish"], "invalid choice: 'polish'"),
        (["demo", "--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["demo", "--seeds", "two"], "'two' is not a whole number"),
        (["demo", "--seed-base", "-1"], "'-1' is not a whole number of at least 0"),
        (["demo", "--steps", "5"], f"at least {FLIPS_EVERY}"),
        (["demo", "--task", "chess"], "invalid choice: 'chess'"),
        (["demo", "--out", "picture.txt"], "--out picture.txt: the suffix is not one of"),
        (["demo", "--out", "no_such_folder/a.png"], "no_such_folder does not exist"),
    ],
)
def test_wrong_request_is_one_line_and_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2, exit.value.code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert words in error, error


@pytest.mark.parametrize(
    ("raised", "status"),
    [(nmfx.NMError("a\nb"), 2), (OSError("full"), 2), (KeyboardInterrupt(), 130)],
)
def test_failures_on_the_way_end_without_a_traceback(raised, status, monkeypatch, capsys):
    def fail(plan):
        raise raised

    monkeypatch.setattr("nmfx.demo.command.run_study", fail)
    with pytest.raises(SystemExit) as exit:
        main(["demo"])
    assert exit.value.code == status, exit.value.code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# --- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--quick",), ("--seeds", "7"), ("--seed-base", "5")])
def test_selection_seeds_are_not_shown(arguments):
    plan = plan_of(*arguments)
    shown, selection = set(plan.shown), set(plan.selection)
    assert shown, plan
    assert selection, plan
    assert not shown & selection, plan


def test_selection_never_sees_the_test_split():
    plan = plan_of()
    assert {run.split for run in plan.selection_runs(("2:4", 1e-3))} == {"validation"}
    assert {run.split for run in plan.shown_runs(("2:4", 1e-3))} == {"test"}


def test_explicit_numbers_win_over_quick():
    plan = plan_of("--quick", "--steps", "77", "--seeds", "4", "--seed-base", "3", "--workers", "1")
    assert (plan.steps, list(plan.shown), plan.workers) == (77, [3, 4, 5, 6], 1), plan


# --- the task ----------------------------------------------------------------------------------


def test_splits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    pieces = [digits.load(split) for split in digits.SPLITS]
    assert [len(labels) for _, labels in pieces] == [1000, 300, 497]
    images = torch.cat([images.flatten(1) for images, _ in pieces])
    everything = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    # As multisets: the data set holds a few identical images.
    assert sorted(map(tuple, images.tolist())) == sorted(map(tuple, everything.tolist()))


def test_augment_shifts_scales_and_adds_noise(monkeypatch):
    images = torch.zeros(4000, 8, 8)
    images[:, 3, 4] = 1.0
    generator = torch.Generator().manual_seed(0)
    noisy = digits.augment(images, generator)
    assert noisy.shape == (4000, 64)
    assert noisy.dtype == torch.float32
    monkeypatch.setattr(digits, "NOISE", 0.0)
    pixels = digits.augment(images, generator).view(-1, 8, 8) * 0.45 + 0.3
    _, rows, columns = pixels.gt(0.5).nonzero().unbind(1)
    assert len(rows) == 4000, "each image keeps its one bright pixel"
    assert rows.unique().tolist() == [1, 2, 3, 4, 5], rows.unique()
    assert columns.unique().tolist() == [2, 3, 4, 5, 6], columns.unique()
    gains = pixels.flatten(1).max(1).values
    assert 0.59 < gains.min() < 0.61, gains.min()
    assert 1.39 < gains.max() < 1.41, gains.max()
    spread = (noisy * 0.45 + 0.3).std()
    assert 0.34 < spread < 0.40, f"noise of 0.35 beside one bright pixel in 64: {spread}"


def test_augment_shifts_zeros_in(monkeypatch):
    monkeypatch.setattr(digits, "NOISE", 0.0)
    images = torch.ones(500, 8, 8)
    pixels = digits.augment(images, torch.Generator().manual_seed(0)).view(-1, 8, 8) * 0.45 + 0.3
    lit = (pixels > 0.3).sum((1, 2))
    assert set(lit.tolist()) == {a * b for a in (6, 7, 8) for b in (6, 7, 8)}, lit.unique()


def test_held_out_inputs_are_the_same_in_every_call():
    first = digits.held_out("test")[0].clone()
    digits.held_out.cache_clear()
    assert torch.equal(first, digits.held_out("test")[0])


def test_model_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    digits.make_model(3)
    assert torch.equal(before, torch.random.get_rng_state())


# --- training ----------------------------------------------------------------------------------

SHORT = Run("2:4", 1e-3, seed=0, steps=2 * FLIPS_EVERY, split="validation")


def test_training_repeats_exactly():
    assert train(SHORT) == train(SHORT)


@pytest.mark.parametrize("change", [{"seed": 1}, {"lambda_w": 1.0}, {"pattern": "1:16"}])
def test_training_depends_on_the_run(change):
    base, other = train(SHORT), train(replace(SHORT, **change))
    assert (base.accuracy, base.flips, base.sad) != (other.accuracy, other.flips, other.sad)


@pytest.mark.parametrize(("pattern", "density"), [("2:4", 0.5), ("1:16", 0.0625)])
def test_training_measures_density_flips_and_packing(pattern, density):
    result = train(replace(SHORT, pattern=pattern))
    assert result.density == density, result
    assert [step for step, _ in result.flips] == [FLIPS_EVERY, 2 * FLIPS_EVERY], result
    assert 0 < result.sad < 1, result
    assert result.accuracy[-1][0] == SHORT.steps, result
    assert result.packed is not None, result
    assert result.packed.max_difference < 1e-4, result
    assert result.packed.lowered_bytes < result.packed.folded_bytes, result


def test_dense_training_has_no_masks():
    result = train(replace(SHORT, pattern=None, lambda_w=0.0))
    assert (result.density, result.flips, result.sad, result.packed) == (1.0, [], 0.0, None), result


# --- what is printed and drawn: results go in, nothing else comes out --------------------------


def made_up_study() -> Study:
    def result(pattern, lambda_w, seed, accuracy):
        run = Run(pattern, lambda_w, seed, 40, "test")
        if pattern is None:
            return Result(run, [(40, accuracy)], [], 0.0, 1.0, None)
        flips = [(20, 2e-3), (40, 0.0)]
        return Result(run, [(40, accuracy)], flips, 0.125, 0.5, Packed(1e-6 * seed, 3000, 1500))

    rows = []
    for pattern, lambda_w, accuracies in [
        (None, 0.0, (70.0, 72.0)),
        ("2:4", 0.0, (60.0, 61.0)),
        ("2:4", 1e-3, (59.0, 61.5)),
        ("1:16", 0.0, (50.0, 50.0)),
        ("1:16", 3e-3, (49.0, 49.0)),
    ]:
        results = [result(pattern, lambda_w, *pair) for pair in enumerate(accuracies)]
        rows.append(Row(pattern, lambda_w, results))
    plan = replace(plan_of("--quick"), steps=40)
    validation = {(p, value): 55.0 for p in ("2:4", "1:16") for value in plan.grid}
    return Study(plan, rows, validation)


def test_table_shows_means_and_spreads_in_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    table.print_study(made_up_study(), console)
    text = console.export_text()
    assert max(map(len, text.splitlines()[:12])) <= 80
    for words in ("71.00 +- 1.41", "60.50 +- 0.71", "1.00e-03", "0.125", "50.00 %", "0.003"):
        assert words in text, f"{words} is missing:\n{text}"


def test_json_holds_the_numbers_of_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("nmfx.demo.command.run_study", lambda plan: made_up_study())
    main(["demo", "--json", "--out", str(tmp_path / "picture.png")])
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["steps"], found["seeds"]) == ("digits", 40, [0, 1])
    dense, ste, _, _, sr_ste = found["rows"]
    assert dense["accuracy"] == {
        "mean": 71.0,
        "deviation": pytest.approx(2**0.5),
        "each": [70.0, 72.0],
    }
    assert {dense[key] for key in ("pattern", "flips", "sad", "max_difference")} == {None}
    assert ste == {
        "method": "2:4 STE",
        "pattern": "2:4",
        "lambda_w": 0.0,
        "flips": pytest.approx(1e-3),
        "sad": 0.125,
        "density": 0.5,
        "max_difference": 1e-6,
        "folded_bytes": 3000,
        "lowered_bytes": 1500,
        "accuracy": {"mean": 60.5, "deviation": pytest.approx(0.5**0.5), "each": [60.0, 61.0]},
    }
    assert (sr_ste["method"], sr_ste["lambda_w"]) == ("1:16 SR-STE", 3e-3)
    tried = [(one["pattern"], one["lambda_w"]) for one in found["selection"]["tried"]]
    assert tried == [(p, value) for p in ("2:4", "1:16") for value in GRID[:2]]
    first, second = found["sr_ste_minus_ste"]
    assert (first["pattern"], first["mean"], first["ahead"]) == ("2:4", -0.25, 1)
    assert (second["each"], second["ahead"]) == ([-1.0, -1.0], 0)
    assert found["picture"] == str(tmp_path / "picture.png")


def test_losses_of_sr_ste_are_shown():
    lines = table.difference_lines(made_up_study())
    assert "-0.25 +- 1.06, ahead on 1 of 2 seeds" in lines[1], lines
    assert "-1.00 +- 0.00, ahead on 0 of 2 seeds" in lines[2], lines


def test_packed_difference_is_the_worst_seed():
    lines = table.packed_lines(made_up_study())
    assert "at most 1.0e-06; bytes of the state dict 3,000 -> 1,500" in lines[1], lines


def test_spread_of_one_value_claims_no_deviation():
    assert spread([1.5]) == "1.50"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_of_one_seed_without_flips_at_the_end(suffix, tmp_path):
    study = made_up_study()
    rows = [replace(row, results=row.results[:1]) for row in study.rows]
    path = tmp_path / f"picture.{suffix}"
    figure.draw(replace(study, rows=rows), path)
    assert path.stat().st_size > 1000


def test_bands_stay_above_zero_on_the_log_axis():
    study = made_up_study()
    rows = []
    for row in study.rows:
        # One seed flips nothing at step 40: there the deviation is larger than the mean.
        last = [[(20, 2e-3), (40, rate)] for rate in (0.0, 1e-3)]
        pairs = zip(row.results, last, strict=True)
        rows.append(replace(row, results=[replace(one, flips=flips) for one, flips in pairs]))
    accuracy, flips = figure.make_figure(replace(study, rows=rows)).axes
    assert (len(accuracy.lines), len(flips.lines)) == (5, 4)
    assert flips.get_yscale() == "log"
    for band in flips.collections:
        for path in band.get_paths():
            assert path.vertices[:, 1].min() > 0, path.vertices
