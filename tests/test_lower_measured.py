"""lower as a measured decision: which form each layer gets, what is asked, reported, remembered."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_timer import DENSE_WINS, PACKED_WINS, PREPACKED_WINS, install
from test_lower import Mlp, assert_folded, snapshot
from torch import Tensor, nn

import nmfx
from nmfx.ops.weight_copy import can_prepack
from nmfx.tuning.layers import Layer, multiply_adds
from nmfx.tuning.progress import progress
from nmfx.tuning.shapes import Recorder
from nmfx.tuning.timer import Times

X = torch.linspace(-2, 2, 3 * 16).reshape(3, 16).sin()
PREPACKS = can_prepack(X) is None
ONLY_WITH_ONEDNN = pytest.mark.skipif(not PREPACKS, reason="oneDNN is not available")


def sparse(pattern: str = "2:4") -> nn.Module:
    return nmfx.sparsify(Mlp(), pattern)


def states(model: nn.Module) -> list[str]:
    return [row.state for row in nmfx.report(model)]


@pytest.mark.parametrize(
    ("ms", "state"),
    [
        (PACKED_WINS, "packed"),
        pytest.param(PREPACKED_WINS, "prepacked", marks=ONLY_WITH_ONEDNN),
        (DENSE_WINS, "dense"),
    ],
    ids=["packed", "prepacked", "dense"],
)
@pytest.mark.parametrize("inputs", [(X,), None], ids=["examples", "assumed"])
def test_the_fastest_candidate_is_kept(
    ms: dict[str, float], state: str, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, ms)
    model = sparse().eval()
    folded = nmfx.fold(model)
    lowered = nmfx.lower(model, inputs)
    assert states(lowered) == [state, state, "dense"]
    torch.testing.assert_close(lowered(X), folded(X))
    with torch.no_grad():
        torch.testing.assert_close(lowered(X), folded(X))
    if state == "dense":
        assert type(lowered.fc1) is nn.Linear
        assert nmfx.is_nm(lowered.fc1.weight, "2:4", 1)


def test_layers_are_decided_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda rows: PACKED_WINS if rows == 3 else DENSE_WINS)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[:1])

    lowered = nmfx.lower(nmfx.sparsify(Two(), {"?": "1:4"}), (X,))
    assert states(lowered) == ["packed", "dense"]
    a, b = nmfx.report(lowered)
    assert (a.rows, a.ms_dense, a.ms_chosen, a.ratio) == ((3,), 3.0, 1.0, 3.0)
    assert (b.rows, b.ms_dense, b.ms_chosen, b.ratio) == ((1,), 1.0, 1.0, 1.0)
    assert b.reason.endswith("as fast as dense; folded")


def test_shapes_come_from_all_calls_with_their_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, lambda rows: PACKED_WINS if rows == 1 else DENSE_WINS)
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), {"0": "1:4"})
    lowered = nmfx.lower(model, [(X,), (X[:1],), (X[:1],)])
    row = nmfx.report(lowered).rows[0]
    assert row.rows == (1, 3)
    assert {rows for _, rows in fake.asked} == {1, 3}
    assert row.ms_dense == 2 * PACKED_WINS["dense"] + DENSE_WINS["dense"]
    assert row.state == "packed" if PREPACKS else row.state
    assert row.ms_chosen == 2 * PACKED_WINS["packed"] + DENSE_WINS["packed"]


def test_assumed_rows_are_said_and_lose_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, lambda rows: DENSE_WINS if rows == 8 else PACKED_WINS)
    lowered = nmfx.lower(sparse())
    assert {rows for _, rows in fake.asked} == {1, 8, 128}
    assert states(lowered) == ["dense"] * 3
    report = nmfx.report(lowered)
    assert "no example inputs: rows 1, 8 and 128 assumed" in report.notes
    assert report.rows[0].rows == (1, 8, 128)


SHARE = "packed kernels carry {} of the multiply-adds of the N:M layers that were measured"


def share(model: nn.Module) -> list[str]:
    return [note for note in nmfx.report(model).notes if note.startswith("packed kernels carry")]


def test_the_share_of_packed_multiply_adds_counts_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda rows: PACKED_WINS if rows == 3 else DENSE_WINS)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x))[:1])

    lowered = nmfx.lower(nmfx.sparsify(Two(), {"?": "1:4"}), [(X,), (X,)])
    assert states(lowered) == ["packed", "dense"]
    packed, dense = 2 * 2 * 3 * 16 * 16, 2 * 1 * 16 * 8
    assert share(lowered) == [SHARE.format(f"{packed / (packed + dense):.0%}") + ", counted dense"]
    assert not share(nmfx.lower(sparse())), "of assumed rows it would say nothing"


@pytest.mark.parametrize(
    ("options", "shape", "outputs"),
    [
        ({"padding": 1}, (2, 8, 5, 7), 2 * 5 * 7),
        ({"stride": (2, 1), "padding": (1, 0)}, (1, 8, 5, 7), 3 * 5),
        ({"dilation": 2, "groups": 2, "padding": "same"}, (3, 8, 6, 6), 3 * 6 * 6),
        ({}, (8, 5, 7), 3 * 5),
    ],
)
def test_multiply_adds_of_a_convolution(
    options: dict[str, Any], shape: tuple[int, ...], outputs: int
) -> None:
    conv = nn.Conv2d(8, 4, 3, **options)
    recorder = Recorder({"w": conv.weight})
    with recorder:
        conv(torch.zeros(shape))
    [(seen, count)] = recorder.seen["w"].items()
    layer = Layer("conv", conv.weight, 1, conv.groups, nmfx.Pattern(2, 4), prepack=False)
    assert count == 1
    assert multiply_adds(layer, seen) == outputs * conv.weight.numel()


def test_a_layer_that_is_never_reached_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS)

    class Skips(Mlp):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.fc1(x)

    rows = nmfx.report(nmfx.lower(nmfx.sparsify(Skips(), "2:4"), (X,))).rows
    assert [row.state for row in rows] == ["packed", "dense", "dense"]
    assert rows[1].reason == "the example inputs never reach it; folded"
    assert rows[1].ratio is None


def test_tune_false_packs_everything_and_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, DENSE_WINS)
    lowered = nmfx.lower(sparse(), (X,), tune=False)
    assert states(lowered) == ["packed", "packed", "dense"]
    assert not fake.asked
    report = nmfx.report(lowered)
    assert report.notes[0] == (
        "tune=False: nothing was timed; all is packed or compressed whose row does not say why not"
    )
    assert all(row.ratio is None and row.rows == () for row in report)


def test_a_candidate_that_computes_something_else_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS)
    monkeypatch.setattr("nmfx.tuning.layers.linear_nm", lambda x, *args: x.new_zeros(3, 32))
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)), "2:4")
    lowered = nmfx.lower(model, (X,))
    assert states(lowered)[0] != "packed"
    assert any(
        note == "0.weight: packed differs from dense by 1.0e+00 and was not used"
        for note in nmfx.report(lowered).notes
    )


PICTURE = torch.linspace(-2, 2, 2 * 8 * 5 * 5).reshape(2, 8, 5, 5).sin()


def convs() -> nn.Module:
    return nmfx.sparsify(nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 4, 1)), {"?": "1:4"})


@pytest.mark.parametrize(
    ("ms", "state"),
    [
        (PACKED_WINS, "packed"),
        pytest.param(PREPACKED_WINS, "prepacked", marks=ONLY_WITH_ONEDNN),
        (DENSE_WINS, "dense"),
    ],
    ids=["packed", "prepacked", "dense"],
)
def test_the_fastest_form_of_a_convolution_is_kept(
    ms: dict[str, float], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, ms)
    model = convs()
    lowered = nmfx.lower(model, (PICTURE,))
    assert states(lowered) == [state, state]
    names = {"dense", "packed", *(["prepacked"] if PREPACKS else [])}
    assert [asked for asked, _ in fake.asked] == [names] * 2
    assert [row.rows for row in nmfx.report(lowered)] == [(2,), (2,)], "the batch size"
    torch.testing.assert_close(lowered(PICTURE), nmfx.fold(model)(PICTURE))


def test_convolutions_stay_dense_without_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, PACKED_WINS)
    reason = "without example inputs the size of its pictures is not known; folded"
    report = nmfx.report(nmfx.lower(convs()))
    assert [(row.state, row.reason) for row in report] == [("dense", reason)] * 2
    assert not fake.asked


def test_a_packed_convolution_that_computes_something_else_is_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, PACKED_WINS)
    monkeypatch.setattr(
        "nmfx.tuning.layers.conv_nm", lambda x, *args, **kwargs: x.new_zeros(2, 32, 3, 3)
    )
    lowered = nmfx.lower(nmfx.sparsify(nn.Sequential(nn.Conv2d(8, 32, 3)), "1:4"), (PICTURE,))
    assert states(lowered)[0] != "packed"
    assert (
        "0.weight: packed differs from dense by 1.0e+00 and was not used"
        in nmfx.report(lowered).notes
    )


@pytest.mark.parametrize("large", [False, True])
def test_large_models_are_timed_cold(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, PACKED_WINS)
    monkeypatch.setattr("nmfx.tuning.bench.cache_bytes", lambda device: 1000 if large else 10**9)
    lowered = nmfx.lower(sparse(), (X,))
    assert fake.cold == [large, large]
    assert any(f"weights {'cold' if large else 'warm'}" in n for n in nmfx.report(lowered).notes)


# --- the whole model ---------------------------------------------------------------------------


def test_the_whole_model_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS, whole=(4.0, 2.0))
    report = nmfx.report(nmfx.lower(sparse(), (X,)))
    assert report.notes[0] == "whole model: dense 4.000 ms, lowered 2.000 ms (2.00x)"
    text = str(report)
    assert "rows  ms dense  ms chosen  ratio  reason" in text
    assert "3     3.000      1.000  3.00x" in text


def test_what_a_busy_machine_took_is_said_and_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = install(monkeypatch, PACKED_WINS)

    def busy(*args: Any, **kwargs: Any) -> Times:
        times = Times(fake(*args, **kwargs))
        times.busy = True
        return times

    monkeypatch.setattr("nmfx.tuning.timer.measure", busy)
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), "2:4")
    for _ in range(2):
        notes = nmfx.report(nmfx.lower(model, (X,))).notes
        assert "(layer, shape) pairs timed now: 1, known before: 0" in notes
        assert any(note.startswith("1 of these were timed while something else") for note in notes)


def test_where_everything_stays_dense_fold_takes_that_back(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DENSE_WINS)
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), "2:4")
    fast = nmfx.lower(model, (X,))
    assert {row.state for row in nmfx.report(fast).rows} == {"dense"}
    folded = nmfx.fold(fast)
    assert folded is not fast
    assert not nmfx.report(folded).notes
    assert torch.equal(folded(X), fast(X))
    install(monkeypatch, PACKED_WINS)
    assert "packed" in {row.state for row in nmfx.report(nmfx.lower(folded, (X,))).rows}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_is_slower_as_a_whole_stays_dense(
    inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PACKED_WINS, whole=(4.0, 5.0, 4.1))
    model = sparse()
    folded = nmfx.fold(model)
    lowered = nmfx.lower(model, (X,), inplace=inplace)
    assert states(lowered) == ["dense"] * 3
    report = nmfx.report(lowered)
    assert "lowered, the whole model is slower than dense, so it stays dense" in report.notes
    assert report.rows[0].reason.endswith("but lowered the whole model is slower; folded")
    assert report.rows[0].ratio == 1.0
    assert torch.equal(lowered.fc1.weight, folded.fc1.weight)
    assert list(lowered.state_dict()) == list(folded.state_dict())


def test_a_slow_moment_does_not_undo_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS, whole=(4.0, 5.0, 5.0))
    model = sparse()
    lowered = nmfx.lower(model, (X,))
    assert states(lowered) == ["packed", "packed", "dense"]
    assert nmfx.report(lowered).rows[0].ratio == 3.0
    assert "timed again, dense takes 5.000 ms: lowered is not slower" in nmfx.report(lowered).notes
    torch.testing.assert_close(lowered.eval()(X), nmfx.fold(model).eval()(X))


# --- what must not change ----------------------------------------------------------------------


class Counts(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x, scale) + torch.rand(())


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_else_changes(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmfx.tuning.timer.BUDGET_S", 0.0)
    model = nmfx.sparsify(Counts(), "2:4").train()
    model.drop.eval()
    before, random, threads = snapshot(model), torch.get_rng_state(), torch.get_num_threads()
    grad = torch.is_grad_enabled()
    lowered = nmfx.lower(model, [(X,), (X[:1],)], inplace=inplace)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled() == grad
    assert lowered.calls == 0
    assert [m.training for m in lowered.modules()] == [m.training for m in model.modules()]
    assert lowered.training
    assert not lowered.drop.training
    if not inplace:
        assert snapshot(model) == before


def test_failing_inputs_change_nothing_in_place() -> None:
    model = sparse()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        nmfx.lower(model, (X[:, :5],), inplace=True)
    assert snapshot(model) == before


def test_nothing_is_printed_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    nmfx.lower(sparse(), (X,))
    assert capfd.readouterr() == ("", "")


def test_long_work_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("nmfx.tuning.progress._DELAY_S", 0.0)
    assert list(progress([1, 2, 3], "measuring")) == [1, 2, 3]
    assert "nmfx: measuring" in sys.stderr.getvalue()


# --- the cache ---------------------------------------------------------------------------------


def test_timings_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NMFX_CACHE", "1")
    monkeypatch.setenv("NMFX_CACHE_DIR", str(tmp_path))
    fake = install(monkeypatch, PACKED_WINS)
    first = nmfx.lower(sparse(), (X,))
    assert len(fake.asked) == 2
    second = nmfx.lower(sparse(), (X,))
    assert len(fake.asked) == 2, "asked again"
    assert states(second) == states(first)
    assert "(layer, shape) pairs timed now: 0, known before: 2" in nmfx.report(second).notes
    nmfx.lower(sparse("1:4"), (X,))
    assert len(fake.asked) == 4, "another pattern is another key"
    nmfx.lower(sparse(), (X[:1],))
    assert len(fake.asked) == 6, "another shape is another key"
    monkeypatch.setattr("nmfx.tuning.bench.kernel_status", lambda device: "new kernels")
    nmfx.lower(sparse(), (X,))
    assert len(fake.asked) == 8, "other kernels are another key"


def test_equal_layers_of_a_model_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, PACKED_WINS)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)), nn.Linear(16, 4))
    lowered = nmfx.lower(nmfx.sparsify(model, "2:4"), (X,))
    assert len(fake.asked) == 1
    assert states(lowered) == ["packed"] * 5 + ["dense"]


# --- in place ----------------------------------------------------------------------------------


class Everywhere:
    """Raises KeyboardInterrupt at the n-th line that runs in nmfx, the folding on."""

    def __init__(self, at: int) -> None:
        self.at, self.lines, self.armed = at, 0, False

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if "/nmfx/" not in frame.f_code.co_filename:
            return None
        # Python takes signals after calls, so never between the end of a `with` and its exit. A
        # trace does raise there, and would leave the lock of the one function locked, and the mode
        # of the other active.
        if frame.f_code.co_name in ("generated_class", "_record"):
            return None
        if event == "call" and frame.f_code.co_name == "bake":
            self.armed = True
        if self.armed and event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def interrupted(model: nn.Module, at: int) -> int:
    """Lowers in place until line `at`; returns how many lines ran."""
    everywhere, previous = Everywhere(at), sys.gettrace()
    grad = torch.is_grad_enabled()
    sys.settrace(everywhere.trace)
    try:
        nmfx.lower(model, (X,), inplace=True)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(previous)
        torch.set_grad_enabled(grad)  # raised between the end of a `with no_grad()` and its exit
    return everywhere.lines


def sources() -> dict[str, nn.Module]:
    frozen = sparse()
    nmfx.freeze(frozen)

    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(16, 16)) for _ in "ab")
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(nn.functional.linear(nn.functional.linear(x, self.a), self.b))

    graph = nmfx.sparsify(torch.fx.symbolic_trace(Free()), {"": "1:4", "fc": "2:4"})
    return {"sparse": sparse(), "frozen": frozen, "graph": graph}


@pytest.mark.parametrize("source", ["sparse", "frozen", "graph"])
def test_interrupted_at_any_line_it_leaves_a_whole_folded_model(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PACKED_WINS)
    model = sources()[source].eval()
    folded = nmfx.fold(model)
    interrupted(copy.deepcopy(model), -1)  # the first run fills caches, so it runs more lines
    total = interrupted(copy.deepcopy(model), -1)
    assert total > 300, "too few lines: is the trace armed?"
    # Every line of the end, where layers are swapped one after the other, would take minutes.
    for at in range(1, total + 1, 7):
        one = copy.deepcopy(model)
        lines = interrupted(one, at)
        assert lines == at, "the interruption did not happen"
        if any(site == "packed" for site in states(one)):
            assert states(one).count("packed") == 2 + (source == "graph"), f"line {at}: half packed"
            assert at > total * 0.9, f"line {at} of {total}: not undone"
            torch.testing.assert_close(one(X), folded(X))
        else:
            assert_weights(one, folded, at)


def assert_weights(model: nn.Module, folded: nn.Module, at: int) -> None:
    assert [type(m).__name__ for m in model.modules()] == [
        type(m).__name__ for m in folded.modules()
    ], f"line {at}"
    state, expected = model.state_dict(), folded.state_dict()
    assert list(state) == list(expected), f"line {at}"
    assert all(torch.equal(state[name], expected[name]) for name in state), f"line {at}"
    assert torch.equal(model(X), folded(X)), f"line {at}"


def test_each_layer_interrupted_while_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, PACKED_WINS)
    widths = [16, 20, 24, 28, 32, 8]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = nmfx.sparsify(nn.Sequential(*layers), {"?": "2:4"})
    folded = nmfx.fold(model)
    for number in range(len(layers)):
        one = copy.deepcopy(model)

        def interrupting(rows: int, number: int = number) -> dict[str, float]:
            if len(fake.asked) == number + 1:
                raise KeyboardInterrupt
            return PACKED_WINS

        fake.asked.clear()
        fake.ms = interrupting
        with pytest.raises(KeyboardInterrupt):
            nmfx.lower(one, (X,), inplace=True)
        assert_folded(one, folded)


def test_prepacked_is_no_candidate_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, PREPACKED_WINS)
    model = nmfx.lower(sparse(), (X,), inplace=True)
    assert states(model) == ["packed", "packed", "dense"]
    assert all(names == {"dense", "packed"} for names, _ in fake.asked)
    assert nmfx.report(model).notes[-1].startswith("in place, prepacked dense is no candidate")


PEAK = """
import ctypes, gc, re, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which the system hands out as it likes
import torch, nmfx
from torch import nn
torch.set_num_threads(1)
torch.set_grad_enabled(False)
sys.path.insert(0, {tests!r})
import fake_timer, nmfx.tuning.timer
nmfx.tuning.timer.measure = fake_timer.FakeTimer(fake_timer.PACKED_WINS)
def status(name):
    return int(re.search(name + ':\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
x = torch.randn(2, 512)
small = nmfx.sparsify(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 4)), '2:4')
nmfx.lower(small, (x,), inplace=True)  # what torch and nmfx load is no part of the model
gc.collect()
base, files = status('VmRSS'), status('RssFile')
layers = [nn.Linear(512, 512, bias=False, device='meta') for _ in range(400)]
model = nn.Sequential(*layers, nn.Linear(512, 4)).to_empty(device='cpu')
for p in model.parameters():
    p.normal_(std=0.04)
nmfx.sparsify(model, '2:4')
if not {sparsified}:
    nmfx.fold(model, inplace=True)
dense = sum(p.nbytes for p in model.parameters())
gc.collect()  # traced graphs are cycles, and when Python collects them is chance
open('/proc/self/clear_refs', 'w').write('5')  # forget the peak so far
nmfx.lower(model, (x,), inplace=True)
states = {{row.state for row in nmfx.report(model).rows[:-1]}}
kept = sum(t.nbytes for t in model.state_dict().values())
base += max(0, status('RssFile') - files)  # libraries, of which the system reads pages back
found = [(status(name) - base) / dense for name in ('VmHWM', 'VmRSS')]
print(states == {{'packed'}}, *found, kept / dense)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "sparsified", [True, pytest.param(False, marks=pytest.mark.deep)], ids=["sparse", "folded"]
)
def test_peak_memory_in_place(sparsified: bool) -> None:
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(tests=tests, sparsified=sparsified)],
        cwd=Path(nmfx.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    packed, peak, after, kept = done.stdout.split()
    assert packed == "True"
    assert float(peak) < 1.15, f"peak is {peak} of the dense weights"
    assert float(after) < 0.8, f"{after} of the dense weights stay resident, {kept} are stored"


def test_a_cuda_graph_needs_a_gpu_and_examples() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 16)), "2:4").eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 16)
    with pytest.raises(nmfx.NMError, match="a CUDA graph is of one GPU, and the model is on none"):
        nmfx.lower(model, (x,), cuda_graph=True, inplace=True)
    for kwargs in ({}, {"example_inputs": (x,), "tune": False}):
        with pytest.raises(nmfx.NMError, match="give some, and tune=True"):
            nmfx.lower(model, cuda_graph=True, **kwargs)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before), "nothing is changed"
    assert [row.state for row in nmfx.report(model)] == ["sparse"]
