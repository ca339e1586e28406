"""preview: the table before training; nothing is changed, neither the model nor random states."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from fake_timer import DENSE_WINS, PACKED_WINS, PREPACKED_WINS, install
from test_lower import Mlp, snapshot
from torch import Tensor, nn

import nmfx
from nmfx.ops.weight_copy import can_prepack
from nmfx.tuning import timer

X = torch.linspace(-2, 2, 3 * 16).reshape(3, 16).sin()


class Net(nn.Module):
    """A layer for every reason not to pack, and three that can be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 16, 1)
        self.up = nn.ConvTranspose1d(16, 16, 1)
        self.odd = nn.Linear(6, 6)
        self.fc = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.up(self.conv(x)).mean(-1)
        return self.head(self.fc(self.last)) + torch.rand(())


Y = torch.randn(2, 4, 5)


@pytest.mark.parametrize("inputs", [(Y,), None, [{"x": Y}, (Y[:1],)]], ids=["one", "none", "two"])
@pytest.mark.parametrize("sparse", [False, True])
def test_preview_changes_nothing(
    inputs: Any, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timer, "BUDGET_S", 0.0)
    model = Net().train()
    model.fc.eval()
    if sparse:
        nmfx.sparsify(model, "2:4")
    before, states = snapshot(model), [dict(m.__dict__) for m in model.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    python_state = random.getstate()
    nmfx.preview(model, "2:4", inputs)
    assert snapshot(model) == before
    assert [dict(m.__dict__) for m in model.modules()] == states
    assert not hasattr(model, "last")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002
    assert random.getstate() == python_state
    assert model.training
    assert not model.fc.training


def test_preview_is_the_table_of_a_lowered_model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS)
    report = nmfx.preview(Net(), "2:4", (Y,))
    assert isinstance(report, nmfx.Report)
    assert [(row.fqn, row.state, row.reason) for row in report] == [
        ("conv.weight", "would pack", report.rows[0].reason),
        ("up.weight", "dense", "conv_transpose has no packed kernel yet"),
        (
            "odd.weight",
            "dense",
            "in_features=6 is not a multiple of 4, so 2:4 groups would straddle rows",
        ),
        ("fc.weight", "would pack", report.rows[3].reason),
        ("unused.weight", "dense", "the example inputs never reach it"),
        (
            "head.weight",
            "dense",
            "the output layer stays dense by default; name it in a rule to include it",
        ),
    ]
    conv, fc = report.rows[0], report.rows[3]
    assert conv.reason.endswith("packed 3.00x as fast as dense")
    assert (conv.rows, conv.ms_dense, conv.ms_chosen, conv.ratio) == ((2,), 3.0, 1.0, 3.0)
    # 16 rows of 2 values and of one word of index
    assert (conv.bytes_dense, conv.bytes) == (16 * 4 * 4, 16 * 2 * 4 + 16 * 4)
    assert fc.reason.endswith("packed 3.00x as fast as dense")
    assert (fc.rows, fc.ms_dense, fc.ms_chosen, fc.ratio) == ((2,), 3.0, 1.0, 3.0)
    assert (fc.bytes_dense, fc.bytes) == (1024, 16 * 8 * 4 + 16 * 4)
    assert fc.pattern.text == "2:4"
    text = str(report)
    assert "preview: nothing was changed; timed with random weights under random masks" in text
    assert "all timed layers: dense 6.000 ms, as chosen 2.000 ms (3.00x)" in text
    assert "fc.weight      linear          16x16    2:4      would pack" in text


@pytest.mark.parametrize("ms", [PACKED_WINS, PREPACKED_WINS, DENSE_WINS])
@pytest.mark.parametrize("inputs", [(X,), None])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_preview_agrees_with_lower(
    ms: dict[str, float], inputs: Any, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, ms)
    before = nmfx.preview(Mlp(), pattern, inputs)
    after = nmfx.report(nmfx.lower(nmfx.sparsify(Mlp(), pattern), inputs))
    names = {"would pack": "packed", "would prepack": "prepacked", "dense": "dense"}
    for row, lowered in zip(before, after, strict=True):
        assert names[row.state] == lowered.state, row
        assert (row.rows, row.ms_dense, row.ms_chosen, row.bytes) == (
            *(lowered.rows, lowered.ms_dense, lowered.ms_chosen, lowered.bytes),
        )
    if ms is PREPACKED_WINS and can_prepack(X) is None:
        assert before.rows[0].state == "would prepack"


def test_preview_without_inputs_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, PACKED_WINS)
    report = nmfx.preview(Mlp(), "2:4")
    assert {rows for _, rows in fake.asked} == {1, 8, 128}
    assert "no example inputs: rows 1, 8 and 128 assumed" in report.notes


def test_preview_where_every_layer_stays_dense() -> None:
    report = nmfx.preview(nn.Sequential(nn.Linear(6, 6), nn.Conv1d(3, 3, 1)), "2:4")
    assert [row.state for row in report] == ["dense", "dense"]
    assert all(row.reason for row in report)
    assert len(nmfx.preview(nn.ReLU(), "2:4")) == 0


def test_preview_shares_its_timings_with_lower(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NMFX_CACHE", "1")
    monkeypatch.setenv("NMFX_CACHE_DIR", str(tmp_path))
    fake = install(monkeypatch, PACKED_WINS)
    nmfx.preview(Mlp(), "2:4", (X,))
    assert len(fake.asked) == 2
    nmfx.lower(nmfx.sparsify(Mlp(), "2:4"), (X,))
    assert len(fake.asked) == 2, "timed again"


def test_preview_of_a_lowered_model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS)
    lowered = nmfx.lower(nmfx.sparsify(Mlp(), "2:4"), tune=False)
    report = nmfx.preview(lowered, "2:4", (X,))
    assert report.rows[0].reason == "it is lowered already"


def test_preview_errors() -> None:
    with pytest.raises(nmfx.NMError) as error:
        nmfx.preview("model", "2:4")  # type: ignore[arg-type]
    assert str(error.value) == "nmfx.preview takes an nn.Module, got str"
    with pytest.raises(nmfx.NMError, match=r"^odd: in_features=6 is not a multiple of 4"):
        nmfx.preview(Net(), {"odd": "2:4"})
    with pytest.raises(nmfx.NMError, match=r"^fc1: it is 2:4 .* already, not 1:4"):
        nmfx.preview(nmfx.sparsify(Mlp(), "2:4"), "1:4")
    with pytest.raises(nmfx.NMError, match="example_inputs holds a Tensor"):
        nmfx.preview(Mlp(), "2:4", X)
    with pytest.raises(nmfx.NMError, match="it is on the meta device, so there is nothing to time"):
        nmfx.preview(Mlp().to("meta"), "2:4")
