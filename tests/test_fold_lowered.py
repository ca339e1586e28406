"""fold of lowered models: what lower did is taken back, and can be done again."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import PACKED_WINS, PREPACKED_WINS, install
from test_fusing import Block, graph
from test_fusing import X as IMAGE
from test_graph_module import Functional, exported, traced
from test_graph_module import X as ROWS
from test_save_faults import state_of
from test_save_interrupted import interrupted
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import nmfx
from nmfx.capture.refs import iter_sites
from nmfx.capture.site import FOLDED, REPLACES, marks_of
from nmfx.kernels import semi_structured as semi
from nmfx.ops.weight_copy import can_prepack

# torch's own, when it copies an exported program.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")

SEMI_WINS = {"dense": 3.0, "prepacked": 3.0, "packed": 2.0, "semi_structured": 1.0}
PREPACKS = can_prepack(ROWS) is None


class Encoder(nn.Module):
    """Guards over packed layers, and attention, which is sparsified but never packed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.repeat(1, 1, 2))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(24, 8), Conv1D(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def convs() -> nn.Module:
    return nn.Sequential(nn.Conv1d(5, 8, 2), nn.Tanh(), nn.Conv1d(8, 8, 3, groups=2, padding=1))


# A dense model without batch norms, its input, and how many weights of it can be packed.
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), ROWS, 2),
    "conv": (convs, ROWS, 1),
    "gpt": (Gpt, ROWS, 2),
    "encoder": (Encoder, ROWS, 4),
    "traced": (lambda: traced(Functional()), ROWS, 4),
    "exported": (lambda: exported(Functional()), ROWS, 4),
    "gpt traced": (lambda: fx.symbolic_trace(Gpt()), ROWS, 2),
    "gpt exported": (lambda: exported(Gpt()), ROWS, 2),
}
models = pytest.mark.parametrize("name", MODELS)


def evaluating(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    return model if hasattr(model, "_guards_fn") else model.eval()  # an exported one has no modes


def sparse(make: Callable[[], nn.Module]) -> nn.Module:
    """With every weight 2:4 that can be."""
    model = evaluating(make)
    rules = {"?*": "2:4"} if any(model.children()) else {}
    own = any(True for _ in model.parameters(recurse=False))  # that a graph reads itself
    return nmfx.sparsify(model, rules | ({"": "2:4"} if own else {}))


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """(folded, lowered, input)."""
    make, x, count = MODELS[name]
    model = sparse(make)
    fast = nmfx.lower(model, (x,), tune=False)
    assert states(fast).count("packed") == count
    return nmfx.fold(model), fast, x


def states(model: nn.Module) -> list[str]:
    return [row.state for row in nmfx.report(model)]


def left(model: nn.Module) -> set[str]:
    """What of nmfx is in the modules."""
    keys = {key for m in model.modules() for key in {**vars(m), **marks_of(m), **m._modules}}
    classes = {type(m).__name__ for m in model.modules() if type(m).__name__.startswith("NM")}
    return {key for key in keys if "nmfx" in key} | classes


def assert_same(one: nn.Module, two: nn.Module, *inputs: Tensor) -> None:
    """The same names in the same order, and the same bits."""
    state, expected = one.state_dict(), two.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
    for x in inputs:
        assert torch.equal(one(x), two(x))


# --- every capture and form ---------------------------------------------------------------------


@models
@pytest.mark.parametrize("inplace", [False, True])
def test_packed_layers_become_the_folded_model(name: str, inplace: bool) -> None:
    folded, fast, x = pair(name)
    before = state_of(fast)
    back = nmfx.fold(fast, inplace=inplace)
    assert (back is fast) is inplace
    if not inplace:
        assert state_of(fast) == before
    assert_same(back, folded, x)
    parameters = [[list(m._parameters) for m in model.modules()] for model in (back, folded)]
    assert parameters[0] == parameters[1]
    assert [type(m).__name__ for m in back.modules()] == [
        type(m).__name__ for m in folded.modules()
    ]
    assert not left(back)
    if isinstance(back, fx.GraphModule):
        back.graph.lint()
        assert "_nm(" not in back.code
    assert not any(b in ("packed", "semi_structured", "prepacked") for b in states(back))


@models
def test_gradients_flow_and_it_can_be_lowered_again(name: str) -> None:
    folded, fast, x = pair(name)
    back = nmfx.fold(fast)
    for model in (back, folded):
        model(x).square().sum().backward()
    for key, parameter in back.named_parameters():
        assert torch.equal(parameter.grad, folded.get_parameter(key).grad), key
    again = nmfx.lower(back, (x,), tune=False)
    # Not the reports: the pattern is told from the zeros now.
    assert list(again.state_dict()) == list(fast.state_dict())
    assert states(again).count("packed") == states(fast).count("packed")
    torch.testing.assert_close(again(x), fast(x))


@models
def test_copies_of_lowered_models_fold(name: str) -> None:
    folded, fast, x = pair(name)
    assert_same(nmfx.fold(copy.deepcopy(fast)), folded, x)
    if name not in ("exported", "gpt traced", "gpt exported"):  # torch cannot pickle those
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        assert_same(nmfx.fold(torch.load(buffer, weights_only=False)), folded, x)


@pytest.mark.skipif(not PREPACKS, reason="oneDNN is not available")
@pytest.mark.parametrize("name", ["linear", "conv", "gpt"])
def test_prepacked_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x, _ = MODELS[name]
    install(monkeypatch, PREPACKED_WINS)
    model = sparse(make)
    fast = nmfx.lower(model, (x,))
    assert "prepacked" in states(fast)
    back = nmfx.fold(fast)
    assert_same(back, nmfx.fold(model), x)
    assert not left(back)
    one = nmfx.fold(fast, inplace=True)
    assert_same(one, back)
    assert not left(one)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(128, n)) for n in (64, 72))
        self.bias = nn.Parameter(torch.randn(72))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, F.linear(x, self.w).relu(), self.v)


SEMI: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 72)),
    "gpt": lambda: nn.Sequential(Conv1D(128, 64), nn.Tanh(), Conv1D(72, 128)),
    "graph": lambda: fx.symbolic_trace(Reads()),
}


def compressed(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module, Tensor]:
    """(folded, lowered, input); every machine here "has" CUTLASS."""
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)
    install(monkeypatch, SEMI_WINS)
    x = torch.randn(3, 64).bfloat16()
    model = sparse(lambda: SEMI[name]().bfloat16())
    fast = nmfx.lower(model, (x,))
    assert states(fast) == ["semi_structured"] * 2
    return nmfx.fold(model), fast, x


@pytest.mark.parametrize("name", SEMI)
def test_semi_structured_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folded, fast, x = compressed(name, monkeypatch)
    back = nmfx.fold(fast)
    assert_same(back, folded, x)
    assert not left(back)
    again = nmfx.lower(back, (x,))
    assert_same(again, fast, x)


# --- what moved into layers ---------------------------------------------------------------------


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("form", ["modules", "symbolic", "exported", "traced when lowered"])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, bias=False)])
def test_activations_come_back(name: str, form: str, layer: nn.Module) -> None:
    def act() -> nn.Module:
        return ACTIVATIONS[name]()

    model: Any = nn.Sequential(copy.deepcopy(layer), act(), nn.Conv2d(8, 8, 1), act()).eval()
    model = nmfx.fold(nmfx.sparsify(model, {"?": "2:4"}))
    model = graph(model, form) if form in ("symbolic", "exported") else model
    fast: Any = nmfx.lower(model, (IMAGE,), tune=False)
    assert [row.reason for row in nmfx.report(fast)] == [f"{name} fused"] * 2
    fast = fx.symbolic_trace(fast) if form == "traced when lowered" else fast
    back: Any = nmfx.fold(fast)
    assert_same(back, model, IMAGE)
    assert not left(back)
    # But for the root, whose class a copy of a graph does not keep.
    for module, original in zip([*back.modules()][1:], [*model.modules()][1:], strict=True):
        assert type(module).__name__ == type(original).__name__
        assert module.extra_repr() == original.extra_repr()
    assert [row.reason for row in nmfx.report(nmfx.lower(back, (IMAGE,), tune=False))] == [
        f"{name} fused"
    ] * 2


@pytest.mark.parametrize("form", ["modules", "symbolic", "exported", "decomposed"])
def test_folded_norms_stay_and_all_else_comes_back(form: str) -> None:
    model = nmfx.fold(nmfx.sparsify(Block().eval(), {"?*": "2:4"}))
    model = model if form == "modules" else graph(model, form)
    fast: Any = nmfx.lower(model, (IMAGE,), tune=False)
    back: Any = nmfx.fold(fast)
    torch.testing.assert_close(back(IMAGE), model(IMAGE))
    assert left(back) <= {FOLDED, REPLACES}
    for name in ("c1", "c2"):
        values = fast.get_buffer(f"{name}.weight_values")
        found = back.get_parameter(f"{name}.weight")
        assert found[found != 0].sort().values.equal(values[values != 0].sort().values)
        assert back.get_parameter(f"{name}.bias") is not None
    if form in ("modules", "symbolic"):
        assert type(back.b1) is type(back.b2) is nn.Identity
        assert type(back.act) is nn.GELU
    again = nmfx.lower(back, (IMAGE,), tune=False)
    assert_same(again, fast, IMAGE)


def test_what_was_put_on_an_identity_moves_to_the_activation() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"0": "2:4"})
    fast: Any = nmfx.lower(model, (ROWS,), tune=False)
    calls: list[str] = []
    fast[1].register_forward_hook(lambda *_: calls.append("hook"))
    fast[1].eval()
    back: Any = nmfx.fold(fast, inplace=True)
    back(ROWS)
    assert calls == ["hook"]
    assert not back[1].training
    assert back[0].training


# --- parts, files, modes ------------------------------------------------------------------------


def test_layers_that_are_sparsified_beside_lowered_ones() -> None:
    torch.manual_seed(3)
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    fast: Any = nmfx.lower(nmfx.sparsify(model, {"0": "2:4", "2": "1:4"}), (ROWS,), tune=False)
    nmfx.sparsify(fast, {"3": "2:4"})
    nmfx.freeze(fast)
    assert states(fast) == ["packed", "packed", "frozen"]
    raw = fast[3].weight.clone()
    expected = fast(ROWS)
    back: Any = nmfx.fold(fast)
    torch.testing.assert_close(back(ROWS), expected)
    assert torch.equal(fast[3].weight, raw)
    assert [nmfx.is_nm(back[i].weight, p, 1) for i, p in ((0, "2:4"), (2, "1:4"), (3, "2:4"))]
    assert nmfx.is_nm(back[3].weight, "2:4", 1)
    assert not left(back)
    weight = fast[3].weight
    nmfx.fold(fast, inplace=True)
    assert fast[3].weight is weight
    assert_same(fast, back, ROWS)


def test_requires_grad_is_what_it_was() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    model[1].weight.requires_grad_(True)
    back: Any = nmfx.fold(nmfx.lower(nmfx.sparsify(model, {"?": "2:4"}), tune=False))
    grads = {name: p.requires_grad for name, p in back.named_parameters()}
    assert grads == {"0.weight": False, "0.bias": False, "1.weight": True, "1.bias": False}


def test_what_is_folded_in_inference_mode_can_be_trained() -> None:
    _, fast, x = pair("linear")
    with torch.inference_mode():
        nmfx.fold(fast, inplace=True)
    fast(x).sum().backward()
    assert all(p.grad is not None for p in fast.parameters())


@pytest.mark.parametrize("name", ["linear", "gpt", "encoder", "traced", "block"])
def test_a_loaded_model_can_be_lowered_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, x, _ = MODELS.get(name, (Block, IMAGE, 2))
    torch.manual_seed(5)
    fast = nmfx.lower(sparse(make), (x,), tune=False)
    (path,) = nmfx.save(fast, tmp_path / "model.safetensors")
    loaded = nmfx.load(path, into=evaluating(make))
    back = nmfx.fold(loaded)
    assert_same(back, nmfx.fold(fast), x)
    assert left(back) <= {FOLDED, REPLACES}
    fake = install(monkeypatch, PACKED_WINS)
    again = nmfx.lower(back, (x,))
    assert fake.asked, "it was measured"
    torch.testing.assert_close(again(x), fast(x))
    # And the file loads into it once more.
    assert torch.equal(nmfx.load(path, into=nmfx.fold(again))(x), fast(x))


class Both(nn.Module):
    """Layers that a graph calls, layers that it reads, and a batch norm; relu in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.w = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu().permute(0, 2, 3, 1)
        h = self.a(y)
        g = torch.relu(self.b(y))
        return torch.relu_(h) + F.silu(F.linear(g, self.w))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (Block, "modules"),
        (Block, "symbolic"),
        (Block, "exported"),
        (Block, "decomposed"),
        (Both, "symbolic"),
        (Both, "exported"),
    ],
)
def test_a_model_that_was_taken_back_is_saved_and_loaded(
    kind: type[nn.Module], form: str, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        return kind().eval() if form == "modules" else graph(kind().eval(), form)

    back = nmfx.fold(nmfx.lower(sparse(make), (IMAGE,), tune=False))
    (path,) = nmfx.save(back, tmp_path / "model.safetensors")
    loaded = nmfx.load(path, into=make())
    assert torch.equal(loaded(IMAGE), back(IMAGE))
    assert loaded.state_dict().keys() == back.state_dict().keys()


# --- nothing half done --------------------------------------------------------------------------


def _alone() -> nn.Module:
    fast: Any = nmfx.lower(
        nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"0": "2:4"}), (ROWS,), tune=False
    )
    return fast[0]


def _identity_gone() -> nn.Module:
    fast: Any = nmfx.lower(sparse(Block), (IMAGE,), tune=False)
    fast.act = nn.Dropout()
    return fast


def _layer_gone() -> nn.Module:
    fast: Any = nmfx.lower(sparse(Block), (IMAGE,), tune=False)
    fast.c1 = nn.Conv2d(8, 16, 3, padding=1)
    return fast


def _meta() -> nn.Module:
    return pair("traced")[1].to("meta")


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a part": (_alone, "weight: it applies the relu that stood behind it, and the nn.Identity"),
    "no identity": (_identity_gone, "c1.weight: it applies the gelu_tanh that stood behind it"),
    "no layer": (_layer_gone, "1 nn.Identity stand for a gelu_tanh that moved into a layer, and 0"),
    "meta": (_meta, "w: it is on the meta device, so there is nothing to fold"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_cannot_be_taken_back_is_refused(case: str, inplace: bool) -> None:
    make, message = REFUSED[case]
    model = make()
    before, classes = str(nmfx.report(model)), [type(m) for m in model.modules()]
    names = list(model.state_dict())
    with pytest.raises(nmfx.NMError) as caught:
        nmfx.fold(model, inplace=inplace)
    assert str(caught.value).startswith(message)
    assert str(nmfx.report(model)) == before
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("inplace", [False, True])
def test_what_cusparselt_compressed_is_read_on_its_gpu_only(
    inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fast, _ = compressed("linear", monkeypatch)
    ref = [*iter_sites(fast)][1]
    ref.site.format = "cuSPARSELt torch.bfloat16 (7, 1) for 9.0"
    ref.host.weight_meta = torch.empty(0, dtype=torch.uint8)
    before = state_of(fast)
    with pytest.raises(nmfx.NMError) as caught:
        nmfx.fold(fast, inplace=inplace)
    assert str(caught.value) == (
        "2.weight: it was compressed as cuSPARSELt torch.bfloat16 (7, 1) for 9.0, which only such "
        "a GPU can read, and it is on cpu; move the model back there and fold it there"
    )
    assert state_of(fast) == before


def _mixed() -> nn.Module:
    fast: Any = nmfx.lower(nmfx.sparsify(Block().eval(), {"c1": "2:4"}), (IMAGE,), tune=False)
    return nmfx.sparsify(fast, {"c2": "2:4"})


INTERRUPTED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "block": (
        lambda: nmfx.lower(sparse(Block), (IMAGE,), tune=False),
        IMAGE,
    ),
    "mixed": (_mixed, IMAGE),
    "encoder": (lambda: pair("encoder")[1], ROWS),
    "exported": (lambda: pair("exported")[1], ROWS),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_interrupted_at_any_line_it_is_as_it_was_or_folded(case: str) -> None:
    make, x = INTERRUPTED[case]
    model = make()
    start, end = state_of(model), state_of(nmfx.fold(model))
    notes = nmfx.report(model).notes
    outputs = model(x), nmfx.fold(model)(x)
    total = interrupted(lambda: nmfx.fold(copy.deepcopy(model), inplace=True), -1)
    assert total > 100, "too few lines: is the trace armed?"
    outcomes = []
    for at in range(1, total + 1, max(1, total // 60)):
        one = copy.deepcopy(model)
        interrupted(lambda: nmfx.fold(one, inplace=True), at)  # noqa: B023
        found = state_of(one)
        assert found in (start, end), f"line {at} of {total}"
        outcomes.append(found == end)
        assert torch.equal(one(x), outputs[found == end]), f"line {at} of {total}"
        if found == start:
            assert nmfx.report(one).notes == notes
            assert_same(nmfx.fold(one), nmfx.fold(model))
        else:
            assert left(one) <= {FOLDED, REPLACES}, f"line {at} of {total}"
    assert False in outcomes
    assert outcomes == sorted(outcomes), "once folded, always folded"


def test_an_error_in_the_middle_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast, x = pair("exported")
    before, expected = state_of(fast), fast(x)
    code = fast.code
    count = []

    def fails(*args: Any) -> Tensor:
        count.append(args)
        if len(count) == 3:
            raise RuntimeError("out of memory")
        return unpack(*args)

    unpack = nmfx.capture.lowering.unpack_weight
    monkeypatch.setattr("nmfx.capture.lowering.unpack_weight", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        nmfx.fold(fast, inplace=True)
    assert len(count) == 3
    assert state_of(fast) == before
    assert fast.code == code
    assert torch.equal(fast(x), expected)


def test_memory_that_runs_out_for_a_mask_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mixed()
    before = state_of(model)

    def fails(*args: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(importlib.import_module("nmfx.fold"), "nm_project", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        nmfx.fold(model, inplace=True)
    assert state_of(model) == before
