"""nmfx.plot, and the forms of a report beside its text."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from fake_timer import PACKED_WINS, install
from torch import nn

import nmfx
from nmfx import plot


def sparse() -> nn.Module:
    layers = [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)]
    return nmfx.sparsify(nn.Sequential(*layers).eval(), "2:4")


def written(figure: object, path: Path) -> int:
    figure.savefig(path)  # type: ignore[attr-defined]
    return path.stat().st_size


@pytest.mark.parametrize(
    ("shape", "pattern", "dim"),
    [((8, 16), "2:4", 1), ((16, 8), "1:8", 0), ((4, 8, 3, 3), "2:4", 1), ((100, 128), None, 1)],
)
def test_masks(shape: tuple[int, ...], pattern: str | None, dim: int, tmp_path: Path) -> None:
    weight = torch.randn(shape)
    figure = plot.masks(weight, pattern, dim=dim)
    left = figure.axes[0]
    assert ("100.0% kept" in left.get_title()) == (pattern is None)
    kept = left.images[0].get_array()
    if pattern is not None:
        mask = nmfx.nm_mask(weight, pattern, dim)
        first = mask[(slice(None), slice(None), *(0,) * (mask.ndim - 2))]
        assert (torch.as_tensor(kept.data) == first).all()
    assert kept.shape == (min(64, shape[0]), min(64, shape[1]))
    assert written(figure, tmp_path / "m.png") > 1000


def test_sad(tmp_path: Path) -> None:
    model = sparse()
    monitor = nmfx.Monitor(model, every=1)
    for _ in range(4):
        with torch.no_grad():
            model[0].weight += 0.1 * torch.randn(24, 16)
        monitor.step()
    figure = plot.sad(monitor.history)
    lines = figure.axes[1].lines
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3, 4]] * 2
    assert list(lines[-1].get_ydata()) == [p["nmfx/sad_since_start"] for p in monitor.history]
    assert written(figure, tmp_path / "s.png") > 1000


def test_speedup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS)
    report = nmfx.report(nmfx.lower(sparse(), (torch.ones(2, 16),)))
    figure = plot.speedup(report)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [3.0]
    assert written(figure, tmp_path / "s.png") > 1000


def test_what_cannot_be_drawn() -> None:
    for bad in (torch.ones(3), torch.empty(0, 4), torch.ones(2, 4, device="meta")):
        with pytest.raises(nmfx.NMError):
            plot.masks(bad)
    with pytest.raises(nmfx.NMError):
        plot.masks(torch.ones(4, 4), "3:5")
    with pytest.raises(nmfx.NMError):
        plot.masks(torch.ones(4, 4), "2:4", dim=2)
    for history in ([], [{"a": 1.0}]):
        with pytest.raises(nmfx.NMError):
            plot.sad(history)
    with pytest.raises(nmfx.NMError, match="timed"):
        plot.speedup(nmfx.report(sparse()))


def test_without_matplotlib_there_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(nmfx.NMError, match="pip install matplotlib"):
        plot.masks(torch.ones(4, 4))


# --- forms of a report --------------------------------------------------------------------------


def test_a_report_as_html_dict_and_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS)
    model = nn.Sequential(nn.ModuleDict({"a[b]<c>": nn.Linear(16, 24)}))
    reports = [
        nmfx.report(nmfx.sparsify(model, {"0.a?b?<c>": "2:4"})),
        nmfx.report(nmfx.lower(sparse(), (torch.ones(2, 16),))),
    ]
    for report in reports:
        page = ElementTree.fromstring(f"<div>{report._repr_html_().replace('<br>', '<br/>')}</div>")
        cells = ["".join(cell.itertext()) for cell in page.iter("td")]
        assert [row.fqn for row in report] == cells[:: len(cells) // len(report)]
        assert "N:M sparse" in "".join(page.find("p").itertext())  # type: ignore[union-attr]
        plain = report.to_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert [row["fqn"] for row in plain["rows"]] == [row.fqn for row in report]
        assert plain["totals"] == report.totals
        path = tmp_path / "report.csv"
        report.to_csv(path)
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["fqn"] for row in rows] == [row.fqn for row in report]
        assert [row["pattern"] for row in rows] == [
            "" if row.pattern is None else row.pattern.text for row in report
        ]
