"""Faults of nmfx.save and nmfx.load that were found by trying to break them, each once."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_save import assert_same_model, saved
from torch import Tensor, fx, nn

import nmfx
from nmfx.__main__ import main
from nmfx.storage.writing import Writer


class Shares(nn.Module):
    def __init__(self, share: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a if share else nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()))


@pytest.mark.parametrize("state", ["sparse", "frozen", "packed"])
def test_a_layer_that_is_shared_in_the_file_must_be_shared_here(state: str, tmp_path: Path) -> None:
    model = nmfx.sparsify(Shares().eval(), "2:4")
    if state == "frozen":
        nmfx.freeze(model)
    if state == "packed":
        model = nmfx.lower(model, tune=False)
    path, into = saved(model, tmp_path), Shares(share=False).eval()
    before = copy.deepcopy(into)
    with pytest.raises(nmfx.NMError):
        nmfx.load(path, into=into)
    assert_same_model(into, before)
    assert_same_model(nmfx.load(path, into=Shares().eval()), model, torch.ones(2, 16))


class TwoActivations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(64, 64), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.act(self.fc(x)))


def test_only_the_activation_that_was_fused_leaves_a_graph(tmp_path: Path) -> None:
    x = torch.randn(3, 64)
    model = nmfx.sparsify(TwoActivations().eval(), {"fc": "1:4"})
    lowered = nmfx.lower(model, (x,), tune=False)
    assert type(lowered.act) is nn.Identity
    into = fx.symbolic_trace(TwoActivations().eval())
    nmfx.load(saved(lowered, tmp_path), into=into)
    assert torch.equal(into(x), lowered(x))


def _inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def _expanded() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].bias = nn.Parameter(torch.rand(1).expand(8))
    return model


@pytest.mark.parametrize("make", [_inference, _expanded])
def test_tensors_that_cannot_be_written_are_refused(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    path = saved(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), tmp_path)
    into = make()
    before = [tensor.clone() for tensor in into.parameters()]
    with pytest.raises(nmfx.NMError, match=r"inference_mode|share memory"):
        nmfx.load(path, into=into)
    assert all(torch.equal(a, b) for a, b in zip(before, into.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("state", ["frozen", "packed", "dense"])
def test_what_is_loaded_in_inference_mode_can_be_trained(
    state: str, device: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    if state != "dense":
        nmfx.freeze(nmfx.sparsify(model, "2:4"))
    if state == "packed":
        model = nmfx.lower(model, tune=False)
    with torch.device(device):
        into = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    with torch.inference_mode():
        nmfx.load(saved(model, tmp_path), into=into)
        if state == "frozen":
            nmfx.load_state_dict(into, nmfx.state_dict(model))
    into(torch.randn(2, 16, requires_grad=True)).sum().backward()
    assert into[1].weight.grad is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_while_a_model_is_saved_does_not_keep_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, children = Writer.add, []

    def forks(self: Writer, *arguments: object) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(60)
            os._exit(0)
        add(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", forks)
        nmfx.save(nn.Linear(4, 4), tmp_path)
    try:
        start = time.monotonic()
        nmfx.save(nn.Linear(4, 4), tmp_path)
        assert time.monotonic() - start < 30
    finally:
        os.kill(children[0], 9)
        os.waitpid(children[0], 0)


def test_a_tied_file_does_not_tie_a_model_on_the_meta_device(tmp_path: Path) -> None:
    def make(tie: bool) -> nn.Module:
        model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
        if tie:
            model[1].weight = model[0].weight
        return model

    with torch.device("meta"):
        into = make(tie=False)
    nmfx.load(saved(make(tie=True), tmp_path), into=into)
    assert torch.equal(into[0].weight, into[1].weight)
    assert into[0].weight.data_ptr() != into[1].weight.data_ptr()


def test_convert_keeps_what_else_a_file_says(tmp_path: Path) -> None:
    model = nmfx.fold(nmfx.sparsify(nn.Sequential(nn.Conv2d(16, 16, 3, groups=2)), {"0": "2:4"}))
    out = tmp_path / "out.safetensors"
    main(["convert", str(saved(model, tmp_path)), str(out), "--pattern", "2:4"])
    from nmfx.storage.reading import open_model
    from nmfx.storage.spec import Spec

    layer = Spec.from_json(str(open_model(out).spec)).layers["0.weight"]
    assert (layer.groups, layer.kind, layer.state) == (2, "conv", "folded")


@pytest.mark.parametrize("name", [".hidden.safetensors", "a\\b.safetensors", "\udce9.safetensors"])
def test_names_that_could_not_be_loaded_are_not_saved(name: str, tmp_path: Path) -> None:
    with pytest.raises(nmfx.NMError, match="a name with"):
        nmfx.save(nn.Linear(4, 4), tmp_path / name)


def test_tensors_of_many_dimensions_odd_names_and_shared_memory(tmp_path: Path) -> None:
    model, into = nn.Linear(8, 8), nn.Linear(8, 8)
    shared = torch.randn(64)
    for one, value in ((model, shared), (into, torch.zeros(64))):
        one.register_buffer("deep", value[:1].clone().view([1] * 20))
        one.register_buffer("flat", value)
        one.register_buffer("again", value, persistent=False)
        one.register_buffer("square", value.view(8, 8))
    nmfx.load(saved(model, tmp_path), into=into)
    assert_same_model(model, into)
    for name in ("__metadata__", "\ud800"):
        odd = nn.Module()
        odd.register_buffer(name, torch.ones(1))
        with pytest.raises(nmfx.NMError, match="cannot be the name"):
            nmfx.save(odd, tmp_path)
    with pytest.raises(nmfx.NMError, match="lazy"):
        nmfx.save(nn.LazyLinear(8), tmp_path)
    with torch.device("meta"):
        nmfx.save(model, tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], model.weight)


def test_numbers_that_no_float_holds() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8)), {"0": "2:4"})
    with pytest.raises(nmfx.NMError, match="no float"):
        nmfx.set_lambda(model, 10**400)
    state = nmfx.Monitor(model).state_dict() | {"step": float("inf")}
    with pytest.raises(nmfx.NMError):
        nmfx.Monitor(model).load_state_dict(state)


def test_a_layer_with_a_buffer_of_the_name_of_ours_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].register_buffer("weight_values", torch.ones(3))
    lowered = nmfx.lower(nmfx.sparsify(model, {"0": "2:4"}), tune=False)
    (row,) = nmfx.report(lowered)
    assert row.state == "dense"
    assert "weight_values of its own" in row.reason


def test_a_lack_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8)), {"?*": "2:4"})
    (path,) = nmfx.save(model, tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("unable to mmap 12 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr("safetensors.safe_open", full)
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        nmfx.load(path, into=nn.Sequential(nn.Linear(8, 8)))
