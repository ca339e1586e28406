"""Files of layers in two forms: both come back; forms that do not agree are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_save import assert_same_model, randomized, saved
from test_save_faults import _content, _forge, outcome, state_of
from torch import Tensor, nn
from two_forms import CALLS, KEEP, SIDES, THRESHOLD, TWO, X, dense, sparse, states, timed

import nmfx
from nmfx.__main__ import main
from nmfx.kernels import semi_structured as semi

CAPTURES = ["leaf", "graph"]


def make(capture: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    timed(monkeypatch)
    return nmfx.lower(sparse(capture), CALLS, keep=KEEP)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_both_forms_come_back(
    capture: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(capture, monkeypatch)
    path = saved(model, tmp_path)
    spec, _ = _content(path)
    layer = spec["layers"][TWO[capture][0]]
    assert (layer["state"], layer["threshold"]) == ("packed+dense", THRESHOLD)
    into = randomized(dense(capture)).to(device)
    name = TWO[capture][0]
    weight = into.get_parameter(name)
    assert nmfx.load(path, into=into) is into
    assert_same_model(model, into, X)
    for rows in SIDES:
        assert torch.equal(model(X[:rows]), into(X[:rows]))
    assert not into.get_parameter(name).requires_grad
    if device == "cpu":
        assert into.get_parameter(name) is weight


def test_a_file_is_loaded_into_its_like_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(make("leaf", monkeypatch), tmp_path)
    other = make("leaf", monkeypatch)
    nmfx.load(path, into=other)
    with monkeypatch.context() as patch:
        timed(patch)
        narrower = nmfx.lower(sparse("leaf"), [(X[:2],), (X,)], keep=KEEP)
    before = state_of(narrower)
    with pytest.raises(nmfx.NMError, match="load into the dense model"):
        nmfx.load(path, into=narrower)
    assert state_of(narrower) == before


@pytest.mark.parametrize("many", ["semi_structured", "dense"])
def test_semi_structured_beside_another_form_comes_back(
    many: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)
    few = "packed" if many == "semi_structured" else "semi_structured"
    timed(monkeypatch, few, many)
    x = X.bfloat16()
    calls = [(x[:4],), (x,)]
    model = nmfx.lower(sparse("leaf").bfloat16(), calls, keep=(few, many))
    assert states(model)["fc1.weight"] == f"{few}+{many}"
    path = saved(model, tmp_path)
    assert_same_model(model, nmfx.load(path, into=randomized(dense("leaf").bfloat16())), x)
    spec, tensors = _content(path)
    tensors["fc1.weight_compressed"] = tensors["fc1.weight_compressed"].flip(0).contiguous()
    _forge(path, spec, tensors)
    with pytest.raises(nmfx.NMError, match=r"fc1.weight: its forms .* not of the same weight"):
        nmfx.load(path, into=dense("leaf").bfloat16())


# --- damage, with digests that are right ----------------------------------------------------------

NAME = "fc1.weight"


def _layer(**fields: Any) -> Callable[[Any, dict[str, Tensor]], Any]:
    return lambda spec, tensors: spec["layers"][NAME].update(fields)


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    return lambda spec, tensors: tensors.update({name: change(tensors[name])})


def _gone(name: str) -> Callable[[Any, dict[str, Tensor]], Any]:
    return lambda spec, tensors: (tensors.pop(name), spec["tensors"].pop(name))


DAMAGES: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "another dense weight": _tensor(NAME, lambda w: w * 2),
    "a dense weight of another dtype": _tensor(NAME, lambda w: w.half()),
    "a dense weight of another shape": _tensor(NAME, lambda w: w[:-1].clone()),
    "a dense weight without zeros": _tensor(NAME, lambda w: torch.ones_like(w)),
    "other values": _tensor(f"{NAME}_values", lambda v: v + 1),
    "an index out of its group": _tensor(f"{NAME}_index", lambda i: torch.full_like(i, -1)),
    "no dense weight": _gone(NAME),
    "no values": _gone(f"{NAME}_values"),
    "one form with a threshold": _layer(state="packed"),
    "two forms without a threshold": _layer(threshold=0),
    "a negative threshold": _layer(threshold=-1),
    "a threshold that is a text": _layer(threshold="12"),
    "no such forms": _layer(state="dense+packed"),
    "three forms": _layer(state="packed+semi_structured+dense"),
    "a form that is not there": _layer(state="packed+semi_structured"),
    "a convolution": _layer(kind="conv", shape=[96, 64, 1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_changes_nothing(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("leaf", monkeypatch)
    path = saved(model, tmp_path)
    spec, tensors = _content(path)
    DAMAGES[damage](spec, tensors)
    _forge(path, spec, tensors)
    assert outcome(path, dense("leaf"), state_of(model)) == "refused"


def test_a_refused_file_leaves_gradients_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer fails, after the first one was given its two forms."""
    path = saved(make("leaf", monkeypatch), tmp_path)
    into = dense("leaf")
    into.head = nn.Linear(64, 5)
    before = copy.deepcopy(into.state_dict())
    with pytest.raises(nmfx.NMError, match=r"head"):
        nmfx.load(path, into=into)
    assert all(parameter.requires_grad for parameter in into.parameters())
    assert type(into.fc1) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())


# --- readers --------------------------------------------------------------------------------------


def test_any_reader_of_safetensors_gets_the_dense_weight_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("leaf", monkeypatch)
    tensors = load_file(saved(model, tmp_path))
    assert torch.equal(tensors[NAME], model.fc1.weight)
    assert tensors.keys() == model.state_dict().keys()


def test_the_report_of_a_file_counts_both_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("leaf", monkeypatch)
    main(["report", str(saved(model, tmp_path)), "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    for row in nmfx.report(model).rows[:3]:
        found = rows[row.fqn]
        assert (found["state"], found["bytes"]) == ("packed+dense", row.bytes)
        assert (found["pattern"], found["density"]) == ("2:4", 0.5)
    assert len(rows) == 4
