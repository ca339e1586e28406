"""lower(keep=...): layers in two forms, in every capture; what they compute, hold, and cost."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import PACKED_WINS, install
from test_lower_measured import Everywhere
from torch import Tensor, nn
from torch.export import Dim
from two_forms import (
    CALLS,
    FEW,
    KEEP,
    MANY,
    SIDES,
    THRESHOLD,
    TWO,
    X,
    each_wins_somewhere,
    sparse,
    states,
    timed,
)

import nmfx
from nmfx.capture.packed import pack_weight
from nmfx.kernels import semi_structured as semi
from nmfx.ops.linear_by_rows import linear_by_rows
from nmfx.ops.linear_nm import linear_nm

CAPTURES = ["leaf", "graph"]
PATTERN = nmfx.Pattern(2, 4)


def lowered(
    capture: str, monkeypatch: pytest.MonkeyPatch, inplace: bool = False
) -> tuple[nn.Module, nn.Module]:
    """(the lowered model, the folded one)."""
    timed(monkeypatch)
    model = sparse(capture)
    folded = nmfx.fold(model)
    return nmfx.lower(model, CALLS, keep=KEEP, inplace=inplace), folded


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_outputs_are_those_of_the_folded_model(
    capture: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, folded = lowered(capture, monkeypatch, inplace)
    assert {n for n, state in states(fast).items() if state == "packed+dense"} == {*TWO[capture]}
    for rows in SIDES:
        torch.testing.assert_close(fast(X[:rows]), folded(X[:rows]))
    for name in TWO[capture]:
        assert torch.equal(fast.get_parameter(name), folded.get_parameter(name))


@pytest.mark.parametrize("rows", SIDES)
def test_each_side_is_its_operator_bit_for_bit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, folded = lowered("leaf", monkeypatch)
    x, bias = X[:rows], folded.fc1.bias
    values, index = pack_weight(folded.fc1.weight, 1, 1, PATTERN)
    few = linear_nm(x, values, index, bias, 96, 64, 2, 4, "relu")
    many = F.relu(F.linear(x, folded.fc1.weight, bias))
    assert torch.equal(fast.fc1(x), few if rows <= THRESHOLD else many)
    values, index = pack_weight(folded.gpt.weight, 0, 1, PATTERN)
    few = linear_nm(x, values, index, folded.gpt.bias, 64, 64, 2, 4)
    assert torch.equal(fast.gpt(x), few if rows <= THRESHOLD else folded.gpt(x))


@pytest.mark.parametrize("rows", SIDES)
def test_the_side_is_told_by_the_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = lowered("leaf", monkeypatch)
    before = fast.fc2(torch.ones(rows, 96))
    with torch.no_grad():
        fast.fc2.weight_values.mul_(2)
    after = fast.fc2(torch.ones(rows, 96))
    assert torch.equal(after, before * 2) is (rows <= THRESHOLD)
    assert torch.equal(after, before) is (rows > THRESHOLD)
    assert torch.equal(fast.fc2(torch.ones(1, rows, 96))[0], after), "rows are counted together"


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_report_says_what_each_number_of_rows_got(
    capture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, _ = lowered(capture, monkeypatch)
    report = nmfx.report(fast)
    row = {row.fqn: row for row in report}[TWO[capture][0]]
    owner = fast.fc1 if capture == "leaf" else fast
    held = [t for n, t in owner.named_buffers() if n.startswith(("weight_", "u_"))]
    assert len(held) == 2
    assert row.bytes == row.bytes_dense + sum(tensor.nbytes for tensor in held)
    assert (row.rows, row.ms_dense, row.ms_chosen) == ((FEW, MANY), 6.0, 2.0)
    assert "packed 5.00x as fast as dense; 36 rows: " in row.reason
    assert ": packed up to 12 rows, dense above (12 is the geometric middle of 4 and 36), " in (
        row.reason
    )
    assert "relu fused" in row.reason
    share = next(note for note in report.notes if note.startswith("packed kernels carry"))
    assert "10%" in share, "4 of 40 rows"
    if capture == "leaf":
        assert "2:4 (keep 2 of every 4) packed+dense at 12 rows relu" in repr(fast.fc1)


def test_a_graph_shows_one_node_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = lowered("graph", monkeypatch)
    calls = [node for node in fast.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [linear_by_rows] * 2
    assert [node.kwargs for node in calls] == [{"activation": "relu"}, {}]
    assert "('packed', u_values, u_index, 2, 4), ('dense', u_1, False), None, 64, 64, 12" in (
        fast.code
    )
    fast.graph.lint()


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_state_dict_holds_both_forms(capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, folded = lowered(capture, monkeypatch)
    state = fast.state_dict()
    added = [f"{name}_{what}" for name in TWO[capture] for what in ("values", "index")]
    assert sorted(state) == sorted([*folded.state_dict(), *added])
    assert list(dict(fast.named_parameters())) == list(dict(folded.named_parameters()))
    twin, _ = lowered(capture, monkeypatch)
    twin.load_state_dict(state)
    for rows in SIDES:
        assert torch.equal(twin(X[:rows]), fast(X[:rows]))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("damage", ["dense only", "packed only", "another weight"])
def test_forms_that_would_differ_are_not_loaded(
    capture: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, _ = lowered(capture, monkeypatch)
    state, name = fast.state_dict(), TWO[capture][0]
    if damage == "another weight":
        state[name] = state[name] * 2
    else:
        gone = (f"{name}_values",) if damage == "dense only" else (name,)
        state = {key: value for key, value in state.items() if key not in gone}
    before = [fast(X[:rows]) for rows in SIDES]
    match = "not of the same weight" if damage == "another weight" else "load both forms"
    with pytest.raises(nmfx.NMError, match=match):
        fast.load_state_dict(state, strict=False)
    assert all(torch.equal(fast(X[:r]), y) for r, y in zip(SIDES, before, strict=True))
    fast.load_state_dict({}, strict=False)


@pytest.mark.parametrize("capture", CAPTURES)
def test_copies_pickles_and_conversions_run(capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, folded = lowered(capture, monkeypatch)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    twins = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    for twin in (*twins, torch.load(file, weights_only=False)):
        assert states(twin) == states(fast)
        assert not twin.get_parameter(TWO[capture][0]).requires_grad
        for rows in SIDES:
            assert torch.equal(twin(X[:rows]), fast(X[:rows]))
    double, expected = copy.deepcopy(fast).double(), folded.double()
    for rows in SIDES:
        torch.testing.assert_close(double(X[:rows].double()), expected(X[:rows].double()))
    double.load_state_dict(double.state_dict())  # the forms were rounded alike


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_autocast(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, folded = lowered("leaf", monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = fast(X[:rows]), folded(X[:rows])
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, atol=0.03, rtol=0.03)


# --- compilers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_both_sides_compile_in_one_graph(
    capture: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, _ = lowered(capture, monkeypatch)
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for rows in (FEW, MANY, THRESHOLD, THRESHOLD + 1):
            torch.testing.assert_close(compiled(X[:rows]), fast(X[:rows]))


def ops(program: Any) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_an_exported_program_holds_one_side(
    dynamic: bool, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, _ = lowered("leaf", monkeypatch)
    x = X[:FEW] if few else X
    rows = Dim("rows", min=2, max=THRESHOLD) if few else Dim("rows", min=THRESHOLD + 1, max=99)
    shapes = ({0: rows},) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(fast, (x,), dynamic_shapes=shapes)
        assert ("nmfx.linear_nm.default" in ops(program)) is few
        torch.testing.assert_close(program.module()(x), fast(x))


# --- what is constant, and what is not ------------------------------------------------------------


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_gradients_reach_all_but_the_weights_in_two_forms(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, folded = lowered("leaf", monkeypatch)
    for model in (fast, folded):
        x = X[:rows].clone().requires_grad_()
        model(x).square().sum().backward()
        model.input_grad = x.grad
    torch.testing.assert_close(fast.input_grad, folded.input_grad)
    for name, parameter in fast.named_parameters():
        if name in TWO["leaf"]:
            assert parameter.grad is None
        else:
            expected = folded.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_training_such_a_weight_is_refused(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = lowered("leaf", monkeypatch)
    fast.requires_grad_()
    with pytest.raises(nmfx.NMError, match=r"no gradient: train the sparsified model and lower"):
        fast(X[:rows])


def test_in_place_the_dense_weight_stays_the_same_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed(monkeypatch)
    model = sparse("leaf")
    weight = model.fc1.weight
    place = weight.data_ptr()
    nmfx.lower(model, CALLS, keep=KEEP, inplace=True)
    assert model.fc1.weight is weight
    assert (weight.data_ptr(), weight.requires_grad) == (place, False)
    copied = sparse("leaf")
    nmfx.lower(copied, CALLS, keep=KEEP)
    assert copied.fc1.weight.requires_grad, "the model given is not touched"


# --- one copy -------------------------------------------------------------------------------------


def test_without_keep_there_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch)
    for row in nmfx.report(nmfx.lower(sparse("leaf"), CALLS)):
        assert "+" not in row.state
        assert "one copy" not in row.reason


@pytest.mark.parametrize("calls", [CALLS, CALLS[:1], None], ids=["two", "one", "assumed"])
def test_a_form_that_wins_everywhere_is_the_only_one(
    calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PACKED_WINS)
    fast = nmfx.lower(sparse("leaf"), calls, keep=KEEP)
    row = nmfx.report(fast).rows[0]
    assert row.state == "packed"
    assert "; one copy: " in row.reason
    assert "weight" not in dict(fast.fc1.named_parameters())


def test_assumed_rows_choose_too(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, each_wins_somewhere())
    fast = nmfx.lower(sparse("leaf"), keep=KEEP)
    row = nmfx.report(fast).rows[0]
    assert (row.state, row.rows) == ("packed+dense", (1, 8, 128))
    assert "packed up to 32 rows" in row.reason


class Others(nn.Module):
    """A convolution, and a layer whose forward does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(64, 64, 1)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.transpose(1, 2)).transpose(1, 2).contiguous()
        return self.fc(self.attention(h, h, h, need_weights=False)[0])


def test_other_layers_keep_one_copy_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch)
    model = nmfx.sparsify(Others().eval(), {"fc": "2:4", "*": "2:4"})
    calls = [(X[None, :FEW],), (X[None],)]
    rows = {row.fqn: row for row in nmfx.report(nmfx.lower(model, calls, keep=KEEP))}
    assert rows["fc.weight"].state == "packed+dense"
    text = "one copy: only linear layers that are traced hold two forms"
    assert "+" not in rows["conv.weight"].state
    assert text in rows["conv.weight"].reason
    assert rows["attention.out_proj.weight"].state == "packed+dense"
    assert rows["attention.in_proj_weight"].state in ("packed", "dense")
    assert text in rows["attention.in_proj_weight"].reason


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options", [{"keep": "packed"}, {"keep": KEEP, "tune": False}], ids=["value", "tune"]
)
def test_bad_values_change_nothing(options: dict[str, Any], inplace: bool) -> None:
    model = sparse("leaf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(nmfx.NMError, match=r"^keep="):
        nmfx.lower(model, CALLS, inplace=inplace, **options)
    assert set(states(model).values()) == {"sparse", "dense"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- semi-structured ------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(
    ("few", "many"),
    [
        ("packed", "semi_structured"),
        ("semi_structured", "dense"),
        ("dense", "semi_structured"),
    ],
)
def test_any_two_forms(capture: str, few: str, many: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)
    timed(monkeypatch, few, many)
    x = X.bfloat16()
    model = sparse(capture).bfloat16()
    folded = nmfx.fold(model)
    fast = nmfx.lower(model, [(x[:FEW],), (x,)], keep=(many, few))
    assert {states(fast)[name] for name in TWO[capture]} == {f"{few}+{many}"}
    for rows in SIDES:
        torch.testing.assert_close(fast(x[:rows]), folded(x[:rows]), atol=0.05, rtol=0.05)
    owner, name = (fast.fc1, "weight") if capture == "leaf" else (fast, "u")
    expected = folded.get_parameter(TWO[capture][0])
    assert (name in owner._parameters) is ("dense" in (few, many))
    if capture == "leaf" or "dense" in (few, many):
        assert torch.equal(getattr(owner, name), expected)
    assert hasattr(owner, f"{name}_format")
    twin = copy.deepcopy(fast)
    twin.load_state_dict(fast.state_dict())
    state = {
        key: value.flip(0) if key == f"{TWO[capture][0]}_compressed" else value
        for key, value in fast.state_dict().items()
    }
    with pytest.raises(nmfx.NMError, match="not of the same weight"):
        twin.load_state_dict(state)


# --- all or nothing -------------------------------------------------------------------------------


def assert_folded(model: nn.Module, folded: nn.Module, when: str) -> None:
    assert "+" not in "".join(states(model).values()), when
    parameters, expected = (dict(m.named_parameters()) for m in (model, folded))
    assert list(parameters) == list(expected), when
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name]), f"{when}: {name}"
        assert parameter.requires_grad, f"{when}: {name}"
    assert list(model.state_dict()) == list(folded.state_dict()), when
    assert torch.equal(model(X), folded(X)), when


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_slower_whole_model_becomes_dense_again(
    capture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, whole=(1.0, 2.0, 1.0))
    model = sparse(capture)
    folded = nmfx.fold(model)
    fast = nmfx.lower(model, CALLS, keep=KEEP)
    assert_folded(fast, folded, "undone")
    assert "but lowered the whole model is slower" in nmfx.report(fast).rows[0].reason


def test_a_slow_moment_does_not_undo_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, whole=(1.0, 2.0, 2.0))
    fast = nmfx.lower(sparse("leaf"), CALLS, keep=KEEP)
    assert states(fast)["fc1.weight"] == "packed+dense"
    assert not fast.fc1.weight.requires_grad


@pytest.mark.parametrize("capture", CAPTURES)
def test_interrupted_in_place_it_leaves_a_whole_folded_model(
    capture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch)
    model = sparse(capture)
    folded = nmfx.fold(model)

    def interrupted(one: nn.Module, at: int) -> int:
        everywhere, previous = Everywhere(at), sys.gettrace()
        grad = torch.is_grad_enabled()
        sys.settrace(everywhere.trace)
        try:
            nmfx.lower(one, CALLS, keep=KEEP, inplace=True)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(previous)
            torch.set_grad_enabled(grad)
        return everywhere.lines

    interrupted(copy.deepcopy(model), -1)  # the first run fills caches, so it runs more lines
    total = interrupted(copy.deepcopy(model), -1)
    assert total > 300, "too few lines: is the trace armed?"
    undone = 0
    for at in range(1, total + 1, 29):
        one = copy.deepcopy(model)
        assert interrupted(one, at) == at, "the interruption did not happen"
        if "packed+dense" in states(one).values():
            assert at > total * 0.9, f"line {at} of {total}: not undone"
        else:
            assert_folded(one, folded, f"line {at} of {total}")
            undone += 1
    assert undone > 10
