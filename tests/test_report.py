"""report: a row for every linear and conv weight, whatever became of it."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import nmfx
from nmfx.kernels import cpu
from nmfx.kernels.cpu import status
from nmfx.pattern import Pattern
from nmfx.report_table import Report, Row


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3, bias=False)
        self.attention = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.table = nn.Embedding(10, 8)


def lines(report: Report) -> list[str]:
    return str(report).splitlines()


def test_table_of_a_dense_model() -> None:
    assert lines(nmfx.report(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))) == [
        "parameter  kind    shape  pattern  state  bytes  reason",
        "0.weight   linear  4x8    -        dense    128  not sparsified",
        "1.weight   linear  2x4    -        dense     32  not sparsified",
        "",
        "0 of 2 layers and 0.0% of their 40 weights are N:M sparse (N:M keeps N of every M); "
        "160 bytes dense, 160 as stored",
    ]


def test_table_of_a_mixed_model() -> None:
    model = nmfx.sparsify(Net(), {"fc": "4:8", "*": "2:4"})
    assert lines(nmfx.report(model)) == [
        "parameter                  kind    shape    pattern  state   bytes  reason",
        "stem.weight                conv    8x3x3x3  -        dense     864  "
        "in_channels/groups=3 is not a multiple of 4, so 2:4 groups would straddle kernel "
        "positions",
        "conv.weight                conv    8x8x3x3  2:4      sparse  2,304",
        "attention.in_proj_weight   linear  24x8     2:4      sparse    768",
        "attention.out_proj.weight  linear  8x8      2:4      sparse    256",
        "fc.weight                  linear  8x8      4:8      sparse    256",
        "head.weight                linear  4x8      -        dense     128  "
        "the output layer stays dense by default; name it in a rule to include it",
        "",
        f"4 of 6 layers and {896 / 1144:.1%} of their 1,144 weights are N:M sparse "
        "(N:M keeps N of every M); 4,576 bytes dense, 4,576 as stored",
        "SR-STE decay of pruned weights: lambda_w=0.0002, inside backward (layers: 4)",
    ]


def test_table_of_a_lowered_model() -> None:
    model = nn.Sequential(
        *(nn.Linear(16, 32), nn.Conv1d(8, 32, 1), nn.ConvTranspose1d(8, 8, 1), nn.Linear(8, 8))
    )
    lowered = nmfx.lower(nmfx.sparsify(model, {"3": None, "?": "1:4"}), tune=False)
    assert lines(nmfx.report(lowered)) == [
        "parameter  kind            shape   pattern  state   bytes  reason",
        "0.weight   linear          32x16   1:4      packed    640",
        "1.weight   conv            32x8x1  1:4      packed    384",
        "2.weight   conv_transpose  8x8x1   -        dense     256  "
        "conv_transpose has no packed kernel yet; folded",
        "3.weight   linear          8x8     -        dense     256  kept dense by rule '3'",
        "",
        f"2 of 4 layers and {768 / 896:.1%} of their 896 weights are N:M sparse "
        "(N:M keeps N of every M); 3,584 bytes dense, 1,536 as stored",
        "tune=False: nothing was timed; all is packed or compressed whose row does not say why not",
        status(),
    ]


def test_rows_hold_every_field() -> None:
    model = nmfx.sparsify(Net(), {"fc": "1:4", "attention.out_proj": "2:4"}, lambda_w=0.5)
    optimizer = torch.optim.SGD(
        model.fc.parameters(), lr=0.1
    )  # the decay is its as long as it lives
    nmfx.attach(model, optimizer)
    rows = {row.fqn: row for row in nmfx.report(model)}
    assert rows["fc.weight"] == Row(
        fqn="fc.weight",
        kind="linear",
        shape=(8, 8),
        pattern=Pattern(1, 4),
        state="sparse",
        capture="leaf",
        lambda_w=0.5,
        attached=True,
        bytes_dense=256,
        bytes=256,
        reason="",
    )
    assert rows["attention.out_proj.weight"] == Row(
        *("attention.out_proj.weight", "linear", (8, 8), Pattern(2, 4), "sparse", "scoped"),
        *(0.5, False, 256, 256, ""),
    )
    assert rows["stem.weight"] == Row(
        *("stem.weight", "conv", (8, 3, 3, 3), None, "dense", ""),
        *(None, False, 864, 864, "no rule matches"),
    )
    assert str(nmfx.report(model)).splitlines()[-2:] == [
        "SR-STE decay of pruned weights: lambda_w=0.5, inside backward (layers: 1)",
        "SR-STE decay of pruned weights: lambda_w=0.5, once per optimizer step (layers: 1)",
    ]


def test_frozen_and_packed_rows() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)), {"?": "2:4"})
    nmfx.freeze(model)
    assert [row.state for row in nmfx.report(model)] == ["frozen", "frozen"]
    assert "SR-STE decay" not in str(nmfx.report(model)), "frozen layers have no decay"
    (row, _) = nmfx.report(nmfx.lower(model, tune=False))
    assert row == Row(
        *("0.weight", "linear", (32, 16), Pattern(2, 4), "packed", "leaf", None, False),
        *(2048, 32 * 8 * 4 + 32 * 4, ""),
    )


def test_bytes_follow_the_dtype() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 32)), "1:4").bfloat16()
    assert nmfx.report(model).totals["bytes"] == 32 * 16 * 2
    assert nmfx.report(nmfx.lower(model, tune=False)).totals["bytes"] == 32 * 4 * 2 + 32 * 4


def test_rows_that_fill_up_a_block_are_stored_and_counted() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 8)), "2:4")
    (row,) = nmfx.report(nmfx.lower(model, tune=False))
    assert (row.bytes_dense, row.bytes) == (8 * 16 * 4, 16 * 8 * 4 + 16 * 4)


def test_totals() -> None:
    model = nmfx.sparsify(Net(), {"fc": "4:8", "*": "1:4"})
    assert nmfx.report(model).totals == {
        "layers": 6,
        "layers_sparse": 4,
        "weights": 1144,
        "weights_sparse": 896,
        "weights_kept": (896 - 64) // 4 + 32,
        "bytes_dense": 4576,
        "bytes": 4576,
    }


def test_a_report_is_a_sequence_of_rows() -> None:
    report = nmfx.report(Net())
    assert len(report) == len(report.rows) == len(list(report)) == 6
    assert isinstance(report, nmfx.Report)


def test_a_model_without_layers_has_an_empty_report() -> None:
    report = nmfx.report(nn.ReLU())
    assert len(report) == 0
    assert lines(report)[-1] == (
        "0 of 0 layers and 0.0% of their 0 weights are N:M sparse (N:M keeps N of every M); "
        "0 bytes dense, 0 as stored"
    )


def test_report_changes_nothing() -> None:
    model = nmfx.sparsify(Net(), "2:4")
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    random = torch.get_rng_state()
    nmfx.report(model)
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), random)


def test_rich_prints_the_same_table() -> None:
    report = nmfx.report(nn.Sequential(nn.Linear(8, 4)))
    file = io.StringIO()
    Console(file=file, width=200, color_system=None).print(report)
    assert [line.rstrip() for line in file.getvalue().splitlines()] == lines(report)[:2]


def test_long_names_and_markup_are_printed_in_full() -> None:
    name = "a_very_long_module_name_" * 12
    model = nn.Module()
    model.add_module(name, nn.Linear(8, 8))
    model.add_module("[bold]odd[/bold]", nn.Linear(8, 8))
    nmfx.sparsify(model, {"[a-z]*": None, "?*": "2:4"})
    text = str(nmfx.report(model))
    assert "kept dense by rule '[a-z]*'" in text
    assert f"{name}.weight " in text
    assert "[bold]odd[/bold].weight " in text, "a name was taken for markup"


def test_every_dense_row_has_a_reason() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Linear(8, 8)
            self.b.weight = self.a.weight

    model = nn.ModuleDict(
        {
            "net": Net(),
            "depthwise": nn.Conv1d(8, 8, 3, groups=8),
            "lstm": nn.LSTM(8, 8),
            "lazy": nn.LazyLinear(8),
            "tied": Tied(),
            "graph": fx.symbolic_trace(Graph()),
            "odd": nn.Linear(6, 8),
            "head": nn.Linear(8, 8),
        }
    )
    for sparsified in (False, True):
        if sparsified:
            nmfx.sparsify(model, {"net.conv": None, "*": "2:4"})
        for row in nmfx.report(model):
            if row.state == "dense":
                assert row.reason, f"{row.fqn} has no reason (sparsified={sparsified})"
    reasons = {row.fqn: row.reason for row in nmfx.report(model)}
    assert reasons["net.conv.weight"] == "kept dense by rule 'net.conv'"
    assert {row.fqn for row in nmfx.report(model) if row.state == "sparse"} == {
        *("net.attention.in_proj_weight", "net.attention.out_proj.weight", "net.fc.weight"),
        *("net.head.weight", "graph.w", "lstm.weight_ih_l0", "lstm.weight_hh_l0"),
    }


def test_a_scoped_linear_says_so() -> None:
    class Branches(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    (row,) = nmfx.report(nmfx.sparsify(Branches(8, 8), "2:4"))
    assert (row.capture, row.reason) == (
        "scoped",
        "its forward does not trace, so it runs on a stand-in with the masked weight",
    )


def test_reasons_of_an_earlier_call_are_replaced() -> None:
    model = nmfx.sparsify(Net(), {"fc": "2:4"})
    assert {r.fqn: r.reason for r in nmfx.report(model)}["conv.weight"] == "no rule matches"
    nmfx.sparsify(model, {"conv": None, "*": "2:4"})
    reasons = {r.fqn: r.reason for r in nmfx.report(model)}
    assert reasons["conv.weight"] == "kept dense by rule 'conv'"
    nmfx.sparsify(model, {"conv": "1:4"})
    rows = {r.fqn: r for r in nmfx.report(model)}
    assert (rows["conv.weight"].state, rows["conv.weight"].reason) == ("sparse", "")
    nmfx.unsparsify(model)
    reasons = {r.fqn: r.reason for r in nmfx.report(model)}
    assert reasons["conv.weight"] == "not sparsified"


def test_table_of_a_folded_model() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.Linear(4, 4))
    folded = nmfx.fold(nmfx.sparsify(model, {"0": "1:4", "2": "2:4"}))
    assert lines(nmfx.report(folded)) == [
        "parameter  kind    shape  pattern  state   bytes  reason",
        "0.weight   linear  32x16  1:4      folded  2,048  25.0% nonzero",
        "2.weight   conv    4x8x3  2:4      folded    384  50.0% nonzero",
        "3.weight   linear  4x4    -        dense      64  not sparsified",
        "",
        f"2 of 3 layers and {608 / 624:.1%} of their 624 weights are N:M sparse "
        "(N:M keeps N of every M); 2,496 bytes dense, 2,496 as stored",
    ]


@pytest.mark.parametrize("state", ["sparse", "frozen"])
def test_a_report_survives_folding_and_sparsifying_again(state: str) -> None:
    model = nmfx.sparsify(Net(), "2:4")
    if state == "frozen":
        nmfx.freeze(model)
    folded = nmfx.fold(model)
    sparse = {row.fqn for row in nmfx.report(model) if row.pattern is not None}
    for row in nmfx.report(folded):
        assert (row.state, row.reason) == (
            ("folded", "50.0% nonzero") if row.fqn in sparse else ("dense", "not sparsified")
        ), row.fqn
        assert row.pattern == (Pattern(2, 4) if row.fqn in sparse else None), row.fqn
        assert row.bytes == row.bytes_dense
    again = nmfx.report(nmfx.sparsify(folded, "2:4"))
    assert {row.fqn for row in again if row.state == "sparse"} == sparse
    assert {row.state for row in again} == {"sparse", "dense"}, "a rule's reason comes first"


def test_weights_without_values_to_look_at_are_dense() -> None:
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(8, 8))
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(8, 8))
    freed = nn.Sequential(nn.Linear(8, 8))
    freed[0].weight.untyped_storage().resize_(0)
    empty = nn.Sequential(nn.Linear(8, 1))
    empty[0].weight = nn.Parameter(torch.empty(0, 8))
    for model in (meta, fake, freed, empty):
        assert [row.state for row in nmfx.report(model)] == ["dense"]


def test_masks_without_kernels_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), {"[01]": "2:4"})
    note = "masks come from plain torch, many times slower than a kernel (layers: 2): not built"
    if cpu.isa() is not None:
        assert nmfx.report(model).notes == ()
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_missing", "not built")
    assert nmfx.report(model).notes == (note,)
    assert str(nmfx.report(model)).endswith(note)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    assert nmfx.report(nmfx.sparsify(meta, {"[01]": "2:4"})).notes == ()
