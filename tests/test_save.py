"""nmfx.save and nmfx.load: what is loaded is what was saved, in every state a model can have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import PREPACKED_WINS, install
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fusing import BatchNormAct2d, Block, FrozenBatchNorm2d, normal
from test_fusing import X as IMAGE
from torch import Tensor, fx, nn
from zoo import ZOO, build, call, outputs

import nmfx
from nmfx.kernels import semi_structured
from nmfx.report_table import Row
from nmfx.tuning.hardware import machine

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)
        self.register_buffer("scale", torch.rand(16))
        self.register_buffer("hidden", torch.full((16,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x * self.scale * self.hidden).relu()))


X = torch.linspace(-2, 2, 48).sin().reshape(3, 16)


def saved(model: nn.Module, folder: Path) -> Path:
    (path,) = nmfx.save(model, folder / "model.safetensors")
    return path


def randomized(model: nn.Module) -> nn.Module:
    """The same model with other numbers in it."""
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor))
    return model


def rows(model: nn.Module) -> list[Row]:
    return list(nmfx.report(model))


def assert_same_model(one: nn.Module, two: nn.Module, *inputs: Any) -> None:
    left, right = one.state_dict(), two.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name
    assert rows(one) == rows(two)
    assert str(nmfx.report(one)) == str(nmfx.report(two))
    if inputs:
        assert torch.equal(one(*inputs), two(*inputs))


# --- states ------------------------------------------------------------------------------------


def _sparse() -> nn.Module:
    return nmfx.sparsify(Mlp(), {"fc1": "2:4", "fc2": "1:8", "*": None}, lambda_w=3e-4)


def _frozen() -> nn.Module:
    model = nmfx.sparsify(Mlp(), "2:4")
    nmfx.freeze(model)
    return randomized(model)  # the masks are no longer those of the weights


def _packed() -> nn.Module:
    return nmfx.lower(nmfx.sparsify(Mlp().eval(), "2:4"), (X,), tune=False)


STATES: dict[str, Callable[[], nn.Module]] = {
    "dense": Mlp,
    "sparse": _sparse,
    "frozen": _frozen,
    "folded": lambda: nmfx.fold(_sparse()),
    "packed": _packed,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("state", STATES)
def test_a_dense_model_becomes_the_saved_one(state: str, device: str, tmp_path: Path) -> None:
    model = STATES[state]().eval()
    path = saved(model, tmp_path)
    with torch.device(device):
        into = Mlp().eval()
    head = into.head.weight
    assert nmfx.load(path, into=into) is into
    assert_same_model(model, into, X)
    assert (into.head.weight is head) == (device == "cpu")
    assert not any(tensor.is_meta for tensor in (*into.parameters(), *into.buffers()))


@pytest.mark.parametrize("state", STATES)
def test_the_saved_model_is_not_touched(state: str, tmp_path: Path) -> None:
    model = STATES[state]()
    before, classes = copy.deepcopy(model), [type(module) for module in model.modules()]
    saved(model, tmp_path)
    assert_same_model(model, before)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("state", ["sparse", "frozen"])
def test_training_goes_on_after_loading_bit_for_bit(state: str, tmp_path: Path) -> None:
    model = STATES[state]()
    into = nmfx.load(saved(model, tmp_path), into=Mlp())
    for one in (model, into):
        optimizer = torch.optim.SGD(one.parameters(), 1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            one(X).square().sum().backward()
            optimizer.step()
    assert_same_model(model, into, X)


def test_loading_into_a_sparsified_model_keeps_parameters_and_attachments(tmp_path: Path) -> None:
    model = _sparse()
    nmfx.set_pattern(model, {"fc1": "1:4"})
    nmfx.freeze(model)
    path = saved(model, tmp_path)
    into = _sparse()
    optimizer = torch.optim.SGD(into.parameters(), 0.1)
    nmfx.attach(into, optimizer)
    parameters = list(into.parameters())
    nmfx.load(path, into=into)
    assert all(a is b for a, b in zip(parameters, into.parameters(), strict=True))
    assert [row.attached for row in rows(into)] == [True, True, False]
    assert torch.equal(model(X), into(X))
    assert [row.state for row in rows(into)] == ["frozen", "frozen", "dense"]
    assert [str(row.pattern) for row in rows(into)] == [str(row.pattern) for row in rows(model)]


def test_a_frozen_model_can_be_loaded_into_one_that_is_not_and_back(tmp_path: Path) -> None:
    frozen, sparse = _frozen(), nmfx.sparsify(Mlp(), "2:4")
    (tmp_path / "a").mkdir()
    first, second = saved(frozen, tmp_path / "a"), saved(sparse, tmp_path)
    into = nmfx.sparsify(Mlp(), "2:4")
    assert_same_model(nmfx.load(first, into=into), frozen, X)
    assert_same_model(nmfx.load(second, into=into), sparse, X)
    assert not [key for m in into.modules() for key in vars(m) if "mask" in key]


def test_a_lowered_model_can_be_loaded_into_its_like(tmp_path: Path) -> None:
    model = _packed()
    other = nmfx.lower(nmfx.sparsify(Mlp().eval(), "2:4"), (X,), tune=False)
    assert_same_model(nmfx.load(saved(model, tmp_path), into=other), model, X)


def test_prepacked_layers_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PREPACKED_WINS)
    model = nmfx.lower(nmfx.sparsify(Mlp().eval(), "2:4"), (X,))
    assert [row.state for row in rows(model)] == ["prepacked", "prepacked", "dense"]
    into = nmfx.load(saved(model, tmp_path), into=Mlp().eval())
    assert_same_model(model, into, X)


def test_semi_structured_layers_come_back_where_the_format_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).bfloat16().eval()

    monkeypatch.setattr(semi_structured, "backend_of", lambda device: semi_structured.CUTLASS)
    model = nmfx.lower(nmfx.sparsify(make(), "2:4"), tune=False)
    if rows(model)[0].state != "semi_structured":  # untimed, a CPU packs
        install(monkeypatch, {"dense": 3.0, "prepacked": 3.0, "packed": 2.0, "semi_structured": 1})
        model = nmfx.lower(nmfx.sparsify(make(), "2:4"), (torch.ones(2, 64).bfloat16(),))
    assert rows(model)[0].state == "semi_structured"
    path = saved(model, tmp_path)
    assert_same_model(model, nmfx.load(path, into=make()), torch.ones(3, 64).bfloat16())
    short = tmp_path / "short"
    short.mkdir()
    cut = copy.deepcopy(model)
    cut[0].weight_compressed = cut[0].weight_compressed[:-1].clone()
    with pytest.raises(nmfx.NMError, match=r"is not uint8 \(64, 64\); the file is damaged"):
        nmfx.load(saved(cut, short), into=make())
    monkeypatch.undo()
    into = make()
    before = copy.deepcopy(into)
    with pytest.raises(nmfx.NMError, match="lower the dense model here"):
        nmfx.load(path, into=into)
    assert_same_model(into, before)


def test_the_machine_that_chose_stays_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nmfx.lower(nmfx.sparsify(Mlp().eval(), "2:4"), (X,), tune=False)
    path = saved(model, tmp_path)
    here = nmfx.load(path, into=Mlp().eval())
    assert not any("chosen on" in note for note in nmfx.report(here).notes)
    there = machine(torch.device("cpu"))
    monkeypatch.setattr("nmfx.tuning.hardware.processor", lambda device: "Abacus")
    for _ in range(3):  # what is saved again says it still, and once
        here = copy.deepcopy(nmfx.load(path, into=Mlp().eval()))
        (note,) = (note for note in nmfx.report(here).notes if "chosen on" in note)
        assert note == (
            f"its kernels were chosen on {there}; this is Abacus, threads: 1: "
            f"nmfx.lower(nmfx.fold(model), x) chooses anew"
        )
        path = saved(here, tmp_path)
    again = nmfx.lower(nmfx.fold(here), (X,), tune=False)
    assert not any("chosen on" in note for note in nmfx.report(again).notes)
    path = saved(again, tmp_path)
    monkeypatch.undo()
    back = nmfx.load(path, into=Mlp().eval())
    assert any("chosen on Abacus" in note for note in nmfx.report(back).notes)
    dense = nmfx.load(saved(nmfx.fold(back), tmp_path), into=Mlp().eval())
    assert not nmfx.report(dense).notes


# --- what lower joins ---------------------------------------------------------------------------


def _chain() -> nn.Module:
    layers = [nn.Conv2d(8, 16, 3, bias=False), normal(16), nn.ReLU(), nn.Conv2d(16, 8, 1)]
    return nn.Sequential(*layers, nn.GELU()).eval()


def _traced() -> nn.Module:
    return fx.symbolic_trace(Block().eval())


class Exported(nn.Module):
    """What torch.export makes of a convolution with a batch norm has no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 3, bias=False), normal(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


def _exported() -> nn.Module:
    return torch.export.export(Exported().eval(), (IMAGE,)).module()


def _linear() -> nn.Module:
    flat = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8), normal(8, nn.BatchNorm1d)
    frozen = nn.Conv2d(8, 16, 3, bias=False), FrozenBatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*frozen, *flat, nn.ReLU()).eval()


def _with_act() -> nn.Module:
    norms = (normal(16, BatchNormAct2d, act=act) for act in (nn.ReLU(), nn.Tanh()))
    return nn.Sequential(nn.Conv2d(8, 16, 3), next(norms), nn.Conv2d(16, 16, 1), next(norms)).eval()


@pytest.mark.parametrize(
    "make", [_chain, _linear, _with_act, lambda: Block().eval(), _traced, _exported]
)
def test_folded_norms_and_fused_activations_come_back(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = nmfx.lower(nmfx.sparsify(make(), {"?*": "2:4"}), (IMAGE,), tune=False)
    assert any("fused" in row.reason or "folded" in row.reason for row in rows(model))
    into = nmfx.load(saved(model, tmp_path), into=make())
    assert_same_model(model, into, IMAGE)
    # A copy of what was loaded can be saved again.
    again = saved(copy.deepcopy(into), tmp_path)
    assert_same_model(model, nmfx.load(again, into=make()), IMAGE)


def test_a_batch_norm_folded_into_a_layer_that_stayed_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, {"dense": 1.0, "prepacked": 2.0, "packed": 3.0})
    model = nmfx.lower(nmfx.sparsify(_chain(), {"?*": "2:4"}), (IMAGE,))
    assert [row.state for row in rows(model)] == ["dense", "dense"]
    assert type(model[1]) is nn.Identity
    assert_same_model(model, nmfx.load(saved(model, tmp_path), into=_chain()), IMAGE)


def test_another_graph_is_refused(tmp_path: Path) -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nmfx.lower(nmfx.sparsify(_traced(), {"?*": "2:4"}), (IMAGE,), tune=False)
    path = saved(model, tmp_path)
    into = fx.symbolic_trace(Twice().eval())
    before, code = copy.deepcopy(into), into.code
    with pytest.raises(nmfx.NMError, match="its graph is not the one that was saved"):
        nmfx.load(path, into=into)
    assert into.code == code
    assert_same_model(into, before, IMAGE)


# --- the zoo ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        call(model, inputs)  # what legacy weight_norm computed cannot be copied otherwise
    sparse = nmfx.sparsify(model, "2:4")
    path = tmp_path / "model.safetensors"
    models = {"sparse": sparse, "folded": nmfx.fold(sparse)}
    if not ZOO[name].findings:
        models["lowered"] = nmfx.lower(sparse, inputs, tune=False)
    for state, one in models.items():
        into, _ = build(name)
        nmfx.save(one, path)
        nmfx.load(path, into=into)
        want, got = (outputs(call(m, inputs)) for m in (one, into))
        for left, right in zip(want, got, strict=True):
            assert torch.equal(left, right), state
        assert rows(one) == rows(into), state


# --- tied, shared and odd tensors ---------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.embed(x)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_are_stored_once_and_stay_tied(device: str, tmp_path: Path) -> None:
    model = nmfx.sparsify(Tied(), {"fc": "2:4"})
    path = saved(model, tmp_path)
    with safe_open(path, "pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118
    with torch.device(device):
        into = Tied()
    nmfx.load(path, into=into)
    assert into.head.weight is into.embed.weight
    assert_same_model(model, into, torch.arange(8))
    untied = nmfx.load(path, into=Tied(tie=False))
    assert torch.equal(untied.head.weight, untied.embed.weight)


def test_tied_in_the_model_but_not_in_the_file_is_refused(tmp_path: Path) -> None:
    path, into = saved(Tied(tie=False), tmp_path), Tied()
    before = copy.deepcopy(into)
    with pytest.raises(nmfx.NMError, match="shares its memory in the model"):
        nmfx.load(path, into=into)
    assert_same_model(into, before)


def test_views_of_one_buffer_and_other_strides(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3))
    model[1].to(memory_format=torch.channels_last)
    flat = torch.randn(72)
    model[0].weight.data, model[0].bias.data = flat[:64].view(8, 8).t(), flat[64:]
    into = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3))
    path = saved(model, tmp_path)
    assert path.stat().st_size < 4 * (72 + 8 * 8 * 9 + 8) + 4096
    assert_same_model(model, nmfx.load(path, into=into))


def test_empty_tensors_scalars_and_all_dtypes(tmp_path: Path) -> None:
    def make(value: float) -> nn.Module:
        model = nn.Linear(4, 4)
        for dtype in (
            torch.bool,
            torch.int64,
            torch.uint8,
            torch.bfloat16,
            torch.float16,
            torch.float64,
            torch.float8_e4m3fn,
        ):
            name = "b_" + str(dtype).removeprefix("torch.")
            model.register_buffer(name, torch.full((), value).to(dtype))
        model.register_buffer("b_none", None)
        model.register_buffer("b_empty", torch.empty(0, 3))
        return model

    model, into = make(1.0), make(0.0)
    nmfx.load(saved(model, tmp_path), into=into)
    for name, value in model.state_dict().items():
        assert torch.equal(into.state_dict()[name], value), name


def test_a_compiled_model_is_saved_as_what_it_was_made_of(tmp_path: Path) -> None:
    model = _sparse()
    path = saved(torch.compile(model, backend="eager"), tmp_path)
    compiled = torch.compile(Mlp(), backend="eager")
    assert nmfx.load(path, into=compiled) is compiled
    assert_same_model(model, compiled._orig_mod)


def test_hidden_buffers_only_fill_places_on_the_meta_device(tmp_path: Path) -> None:
    model = Mlp()
    model.hidden.fill_(5.0)
    path = saved(model, tmp_path)
    into = nmfx.load(path, into=Mlp())
    assert into.hidden[0] == 2.0
    with torch.device("meta"):
        into = Mlp()
    assert nmfx.load(path, into=into).hidden[0] == 5.0


# --- files of others, and for others ------------------------------------------------------------


def test_any_reader_of_safetensors_gets_the_state_dict(tmp_path: Path) -> None:
    model = nmfx.fold(_sparse())
    content = load_file(saved(model, tmp_path))
    into = Mlp()
    assert not into.load_state_dict(content, strict=False).missing_keys
    assert torch.equal(model(X), into(X))


def test_a_file_of_others_is_read_and_can_be_lowered(tmp_path: Path) -> None:
    folded = nmfx.fold(_sparse()).eval()
    path = tmp_path / "model.safetensors"
    save_file(folded.state_dict(), path)
    into = nmfx.load(path, into=Mlp().eval())
    assert torch.equal(into(X), folded(X))
    assert "packed" in {row.state for row in rows(nmfx.lower(into, (X,), tune=False))}
    sparse = _sparse()
    assert nmfx.load(path, into=sparse) is sparse  # a dense checkpoint, to go on from
    assert [row.state for row in rows(sparse)] == ["sparse", "sparse", "dense"]


def test_a_file_of_others_with_a_missing_twin_of_a_tied_weight(tmp_path: Path) -> None:
    model, path = Tied(), tmp_path / "model.safetensors"
    state = model.state_dict()
    del state["head.weight"]
    save_file(state, path)
    into = nmfx.load(path, into=Tied())
    assert torch.equal(into(torch.arange(8)), model(torch.arange(8)))


def test_hugging_face_round_trip_of_folded_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, inputs = build("hf_llama")
    folded = nmfx.fold(nmfx.sparsify(model, "2:4"))
    folded.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = nmfx.load(tmp_path, into=build("hf_llama")[0])
    for one in (theirs, ours):
        assert torch.equal(call(one, inputs).logits, call(folded, inputs).logits)
    lowered = nmfx.lower(theirs, inputs, tune=False)
    assert "packed" in {row.state for row in rows(lowered)}
    # And the other way: our file, read by from_pretrained.
    nmfx.save(folded, tmp_path / "model.safetensors", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(call(again, inputs).logits, call(folded, inputs).logits)


# --- refusals -----------------------------------------------------------------------------------


def _wider() -> nn.Module:
    model = Mlp()
    model.fc2 = nn.Linear(32, 24)
    return model


def _renamed() -> nn.Module:
    model = Mlp()
    model.other = model._modules.pop("fc2")
    return model


def _tied() -> nn.Module:
    model = Mlp()
    model.twin = nn.Linear(16, 32)
    model.twin.weight = model.fc1.weight
    return model


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(16, 32),
        _wider,
        _renamed,
        _tied,
        lambda: Mlp().double(),
        lambda: nmfx.sparsify(Mlp(), {"fc2": "2:4"}),
        lambda: nmfx.lower(nmfx.sparsify(Mlp(), {"fc2": "2:4"}), tune=False),
    ],
)
def test_another_model_is_refused_and_unchanged(
    state: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    path, into = saved(STATES[state](), tmp_path), make()
    before, classes = copy.deepcopy(into), [type(module) for module in into.modules()]
    with pytest.raises(nmfx.NMError):
        nmfx.load(path, into=into)
    assert_same_model(into, before)
    assert [type(module) for module in into.modules()] == classes


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(nmfx.NMError, match="_extra_state"):
        nmfx.save(Extra(4, 4), path)
    with torch.device("meta"), pytest.raises(nmfx.NMError, match="meta device"):
        nmfx.save(nn.Linear(4, 4), path)
    sparse = nn.Module()
    sparse.register_buffer("s", torch.eye(3).to_sparse())
    with pytest.raises(nmfx.NMError, match="s: "):
        nmfx.save(sparse, path)
    with pytest.raises(nmfx.NMError, match=r"takes an nn\.Module"):
        nmfx.save({"a": torch.ones(1)}, path)  # type: ignore[arg-type]
    with pytest.raises(nmfx.NMError, match="named"):
        nmfx.save(nn.Linear(4, 4), tmp_path / "model.bin")
    for size in ("5 parsecs", 0, -1, 2.5, True):
        with pytest.raises(nmfx.NMError, match="max_shard_size"):
            nmfx.save(nn.Linear(4, 4), path, max_shard_size=size)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        nmfx.save(nn.Linear(4, 4), tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        nmfx.load(path, into=nn.Linear(4, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_meta_buffer_that_the_file_has_not_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = Mlp()
    save_file(model.state_dict(), path)
    with torch.device("meta"):
        into = Mlp()
    with pytest.raises(nmfx.NMError, match="hidden: this buffer is in no state_dict"):
        nmfx.load(path, into=into)
    assert into.fc1.weight.is_meta
    with pytest.raises(nmfx.NMError, match="device="):
        nmfx.load(path, into=model, device="abacus")


@pytest.mark.parametrize("state", list(STATES))
def test_a_wrapped_model_and_a_plain_one_are_told_apart(state: str, tmp_path: Path) -> None:
    wrapped = tmp_path / "wrapped.safetensors"
    plain = tmp_path / "plain.safetensors"
    model = STATES[state]()
    nmfx.save(model, plain)
    nmfx.save(nn.DataParallel(model), wrapped)  # its names are those of DistributedDataParallel
    with pytest.raises(nmfx.NMError, match=r"the model is wrapped .*; pass ddp\.module$"):
        nmfx.load(plain, into=nn.DataParallel(Mlp()))
    with pytest.raises(nmfx.NMError, match=r"what was saved was wrapped .*pass ddp\.module when"):
        nmfx.load(wrapped, into=Mlp())
    into = Mlp()
    nmfx.load(wrapped, into=nn.ModuleDict({"module": into}))
    assert torch.equal(into.eval()(X), model.eval()(X))


# --- nmfx.state_dict ----------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["sparse", "frozen"])
def test_state_dict_carries_what_torchs_does_not(state: str, tmp_path: Path) -> None:
    model = STATES[state]()
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "nmfx": nmfx.state_dict(model)}, path)
    content = torch.load(path, weights_only=True)
    into = nmfx.sparsify(Mlp(), {"fc1": "4:8", "fc2": "4:8"}, lambda_w=0.0)
    into.load_state_dict(content["model"])
    nmfx.load_state_dict(into, content["nmfx"])
    into.hidden.copy_(model.hidden)
    assert [(r.state, r.pattern, r.lambda_w) for r in rows(model)] == [
        (r.state, r.pattern, r.lambda_w) for r in rows(into)
    ]
    assert torch.equal(model(X), into(X))
    # The loaded masks are the model's own.
    nmfx.unfreeze(into)
    nmfx.load_state_dict(into, content["nmfx"])
    assert torch.equal(model(X), into(X))


def test_the_state_of_a_wrapped_model_and_of_a_plain_one_are_told_apart() -> None:
    model = _frozen()
    ddp, state = nn.DataParallel(model), nmfx.state_dict(model)
    with pytest.raises(nmfx.NMError, match=r"the model is wrapped .*; pass ddp\.module$"):
        nmfx.load_state_dict(ddp, state)
    with pytest.raises(nmfx.NMError, match=r"what was saved was wrapped .*pass ddp\.module when"):
        nmfx.load_state_dict(model, nmfx.state_dict(ddp))
    nmfx.load_state_dict(ddp, nmfx.state_dict(ddp))
    nmfx.load_state_dict(model, state)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda s: s.update(version=2), "version 2"),
        (lambda s: s.pop("masks"), "masks"),
        (lambda s: s["layers"].pop("fc1.weight"), "fc1.weight"),
        (lambda s: s["layers"].update(other=s["layers"]["fc1.weight"]), "other"),
        (lambda s: s["layers"]["fc1.weight"].update(pattern="2:5"), "fc1.weight"),
        (lambda s: s["layers"]["fc1.weight"].update(pattern=7), "fc1.weight"),
        (lambda s: s["layers"]["fc1.weight"].update(lambda_w=-1.0), "lambda_w"),
        (lambda s: s["layers"]["fc1.weight"].update(state="packed"), "packed"),
        (lambda s: s["layers"]["fc1.weight"].pop("state"), "state"),
        (lambda s: s["masks"].pop("fc1.weight"), "fc1.weight"),
        (lambda s: s["masks"].update({"fc1.weight": torch.ones(2, 2)}), "bool"),
        (lambda s: s["masks"].update({"fc1.weight": torch.ones(32, 16).bool()}), "more than"),
    ],
)
def test_a_damaged_state_is_refused(damage: Callable[[Any], Any], match: str) -> None:
    model = _frozen()
    state = copy.deepcopy(nmfx.state_dict(model))
    damage(state)
    before = copy.deepcopy(model)
    with pytest.raises(nmfx.NMError, match=match):
        nmfx.load_state_dict(model, state)
    assert_same_model(model, before, X)
    with pytest.raises(nmfx.NMError, match="no sparsified layer"):
        nmfx.state_dict(Mlp())
