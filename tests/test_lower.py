"""lower: packed buffers instead of weights, checked against the folded model; all or nothing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import PACKED_WINS, install
from masked_reference import nm_mask
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import nmfx
from nmfx import dense_products
from nmfx.kernels import cpu
from nmfx.kernels.cpu import status
from nmfx.ops.linear_nm import linear_nm
from nmfx.packing import unpack
from nmfx.pattern import Pattern

X = torch.linspace(-2, 2, 3 * 16).reshape(3, 16).sin()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.drop(self.norm(self.fc1(x).relu()))  # so the norm stays where it is
        return self.head(self.fc2(h)) * scale


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Mixed(nn.Module):
    """Layers that are packed, folded for a reason each, and dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 16, 3, padding=1)
        self.dense_conv = nn.Conv1d(16, 16, 1)
        self.up = nn.ConvTranspose1d(16, 16, 1)
        self.gpt = Conv1D(16, 16)
        self.branch = Branches(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 16)
        self.identity = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.dense_conv(self.conv(x))).transpose(1, 2).contiguous()
        h = self.branch(self.gpt(h))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.identity(self.fc(h)))


def sparse(pattern: str = "2:4") -> nn.Module:
    return nmfx.sparsify(Mlp(), pattern)


def states(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.state for row in nmfx.report(model)}


PACKED = {"fc1.weight": "packed", "fc2.weight": "packed", "head.weight": "dense"}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "4:8", "1:16", "3:8", "7:16"])
@pytest.mark.parametrize("source", ["sparse", "frozen", "folded"])
def test_lowered_equals_folded(pattern: str, source: str) -> None:
    model = sparse(pattern).eval()
    if source == "frozen":
        nmfx.freeze(model)
    folded = nmfx.fold(model)
    lowered = nmfx.lower(folded if source == "folded" else model, (X,), tune=False)
    assert states(lowered) == PACKED
    torch.testing.assert_close(lowered(X), folded(X))
    for name, weight in nmfx.fold(model).named_parameters():
        if name in ("fc1.weight", "fc2.weight"):
            site = lowered.get_submodule(name.partition(".")[0])
            assert torch.equal(site.weight, weight), f"{name}: not the folded weight"


@pytest.mark.parametrize("inplace", [False, True])
def test_state_dict_holds_plain_packed_tensors(inplace: bool) -> None:
    model = sparse()
    lowered = nmfx.lower(model, inplace=inplace, tune=False)
    assert (lowered is model) is inplace
    state = lowered.state_dict()
    assert sorted(state) == sorted(
        [
            *("fc1.bias", "fc1.weight_values", "fc1.weight_index"),
            *("fc2.weight_values", "fc2.weight_index", "head.weight", "head.bias"),
            *(f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
            "norm.num_batches_tracked",
        ]
    )
    assert all(type(value) is Tensor for value in state.values())
    assert state["fc1.weight_values"].shape == (2, 8, 16)
    assert state["fc1.weight_index"].shape == (2, 1, 16)
    assert state["fc1.weight_index"].dtype == torch.int32
    twin = nmfx.lower(sparse(), inplace=True, tune=False)
    twin.load_state_dict(state)
    assert torch.equal(twin.eval()(X), lowered.eval()(X))


def test_packed_buffers_hold_the_masked_weight() -> None:
    model = sparse("1:4")
    raw = model.fc1.weight.detach().clone()
    lowered = nmfx.lower(model, tune=False)
    packed = unpack(
        lowered.fc1.weight_values,
        lowered.fc1.weight_index,
        *raw.shape,
        Pattern(1, 4),
    )
    assert torch.equal(packed, torch.where(nm_mask(raw, 1, 4, 1), raw, 0.0))


def test_a_copy_leaves_the_model_alone_and_inplace_frees_its_weights() -> None:
    model = sparse()
    state, report = copy.deepcopy(model.state_dict()), str(nmfx.report(model))
    classes = [type(m) for m in model.modules()]
    nmfx.lower(model, (X,), tune=False)
    assert [type(m) for m in model.modules()] == classes
    assert str(nmfx.report(model)) == report
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    nmfx.lower(model, inplace=True, tune=False)
    assert {name for name, _ in model.named_parameters()} == {
        *("fc1.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"),
    }


def test_the_graph_of_a_packed_layer_has_one_linear_nm() -> None:
    lowered = nmfx.lower(sparse(), tune=False)
    nodes = [node for node in type(lowered.fc1).nmfx_graph.nodes if node.target is linear_nm]
    assert len(nodes) == 1
    assert not any(node.target is F.linear for node in type(lowered.fc1).nmfx_graph.nodes)
    assert isinstance(lowered.fc1, nn.Linear)
    assert "2:4 (keep 2 of every 4) packed" in repr(lowered.fc1)


def test_the_weight_of_a_packed_layer_can_be_read() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 8), Conv1D(4, 8), nn.Linear(4, 4)), "1:4")
    folded, lowered = nmfx.fold(model), nmfx.lower(model, tune=False)
    for i in (0, 1):
        assert torch.equal(lowered[i].weight, folded[i].weight)
        assert not isinstance(lowered[i].weight, nn.Parameter)
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        lowered[0].weight = nn.Parameter(torch.zeros(8, 16))


# --- modes and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_lower_keeps_modes_buffers_and_random_state(train: bool) -> None:
    model = sparse().train(train)
    model.drop.train(not train)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = torch.get_rng_state()
    lowered = nmfx.lower(model, (X,), tune=False)
    assert torch.equal(torch.get_rng_state(), before)
    for one in (model, lowered):
        assert one.training is train
        assert one.fc1.training is train
        assert one.drop.training is (not train)
        assert one.norm.training is train
    for name, buffer in buffers.items():
        assert torch.equal(lowered.get_buffer(name), buffer), name
        assert torch.equal(model.get_buffer(name), buffer), name


def test_a_lowered_model_runs_in_train_mode() -> None:
    model = sparse().train()
    folded, lowered = nmfx.fold(model), nmfx.lower(model, (X,), tune=False)
    outputs = []
    for one in (folded, lowered):
        torch.manual_seed(0)
        outputs.append(one(X))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert lowered.norm.num_batches_tracked == 1


def test_gradients_reach_inputs_biases_and_dense_layers() -> None:
    model = sparse().eval()
    folded, lowered = nmfx.fold(model), nmfx.lower(model, tune=False)
    grads = []
    for one in (folded, lowered):
        x = X.clone().requires_grad_()
        one(x).square().sum().backward()
        grads.append([x.grad, one.fc1.bias.grad, one.head.weight.grad, one.norm.weight.grad])
    for got, want in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert not lowered(X).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(lowered(X), folded(X))


def test_gradients_of_packed_weights_are_refused() -> None:
    lowered = nmfx.lower(sparse(), tune=False).eval()
    lowered.fc1.weight_values.requires_grad_()
    with pytest.raises(nmfx.NMError, match="a packed weight has no gradient"):
        lowered(X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_before_and_after_lowering(dtype: torch.dtype) -> None:
    model = sparse("1:4").eval()
    folded = nmfx.fold(model).to(dtype)
    after = nmfx.lower(model, tune=False).to(dtype)
    before = nmfx.lower(copy.deepcopy(model).to(dtype), (X.to(dtype),), tune=False)
    for lowered in (before, after):
        assert lowered.fc1.weight_values.dtype == dtype
        assert lowered.fc1.weight_index.dtype == torch.int32
        tolerance = {torch.float64: 1e-9}.get(dtype, 2e-2)
        torch.testing.assert_close(
            lowered(X.to(dtype)), folded(X.to(dtype)), rtol=tolerance, atol=tolerance
        )


# --- example inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        (X,),
        (X, 2.0),
        {"x": X},
        {"x": X, "scale": 3.0},
        [(X,), {"x": X[:1]}, (X[:2], 0.5)],
    ],
    ids=["none", "tuple", "tuple_of_two", "dict", "dict_of_two", "list"],
)
def test_example_inputs_are_run_before_and_after(
    inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    forward = Mlp.forward

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args, fx.Proxy):  # its forward is traced, to see what follows fc1
            calls.append((args, kwargs, self.training, torch.is_grad_enabled()))
        return forward(self, *args, **kwargs)

    model = sparse().train()
    monkeypatch.setattr(Mlp, "forward", recorded)
    nmfx.lower(model, inputs, tune=False)
    number = 0 if inputs is None else len(inputs) if isinstance(inputs, list) else 1
    assert len(calls) == 2 * number, "each call once before and once after"
    assert all(not training and not grad for *_, training, grad in calls)


class Output(dict):
    """A mapping like Hugging Face's outputs."""


class Structured(Mlp):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return {"logits": out, "rest": (out.argmax(-1), [out.exp()]), "none": None}


def test_structured_outputs_are_compared() -> None:
    model = nmfx.sparsify(Structured(), "2:4")
    lowered = nmfx.lower(model, (X,), tune=False)
    assert set(lowered.eval()(X)) == {"logits", "rest", "none"}


class NotANumber(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x).clone()
        out[0, 0], out[0, 1], out[0, 2] = float("nan"), float("inf"), -float("inf")
        return out


def test_equal_nan_and_inf_are_no_difference() -> None:
    nmfx.lower(nmfx.sparsify(NotANumber(), "2:4"), (X,), tune=False)


class Drifts(Mlp):
    """Gives another output every time, however the random state is kept."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x) + self.runs


class Shrinks(Mlp):
    rows = 4

    def forward(self, x: Tensor) -> Tensor:
        self.rows -= 1
        return super().forward(x)[: self.rows]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("tune", [False, True])
def test_outputs_that_differ_are_an_error(
    inplace: bool, tune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PACKED_WINS)
    model = nmfx.sparsify(Drifts(), "2:4")
    before, folded = snapshot(model), nmfx.fold(model)
    with pytest.raises(nmfx.NMError) as error:
        nmfx.lower(model, [(X,)], inplace=inplace, tune=tune)
    message = str(error.value)
    assert message.startswith("call 0: the lowered model's output differs from the folded model's")
    assert "(relative norm), more than 1e-04. If something reads a weight" in message
    if inplace:
        assert_folded(model, folded)
    else:
        assert snapshot(model) == before
    with pytest.raises(nmfx.NMError) as error:
        nmfx.lower(nmfx.sparsify(Shrinks(), "2:4"), (X,), tune=False)
    assert str(error.value) == "call 0: the lowered model's outputs have other shapes"


class Routes(nn.Module):
    """Which of two sums of the same numbers is larger tells where a token goes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Linear(256, 4, bias=False) for _ in range(2))
        self.places = nn.Parameter(torch.randn(2, 256))
        self.head = nn.Linear(256, 8)
        with torch.no_grad():
            self.other.weight.copy_(self.one.weight.flip(1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)[:, 0] > self.other(x.flip(1))[:, 0]
        return self.head(x + self.places[first.long()])


@pytest.fixture
def _rounds_apart() -> Iterator[None]:
    """Packed layers that round otherwise than dense ones: without fused multiply-adds.

    Fused, they may add in the order of a dense kernel, and be equal to the bit (MKL on a Xeon).
    """
    name = cpu.isa()
    if name is None:
        pytest.skip("without the native kernels packed layers round as dense ones do")
    cpu.use_isa("portable")
    yield
    cpu.use_isa(name)


@pytest.mark.usefixtures("_rounds_apart")
@pytest.mark.parametrize("tune", [False, True])
def test_a_model_that_turns_rounding_into_other_outputs_is_lowered_and_noted(
    tune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PACKED_WINS)
    model = nmfx.sparsify(Routes(), "2:4")
    x = torch.randn(64, 256)
    folded = nmfx.fold(model)
    fast = nmfx.lower(model, (x,), tune=tune)
    with torch.no_grad():
        error = float((fast(x) - folded(x)).norm() / folded(x).norm())
    assert error > 1e-2, error
    notes = [note for note in nmfx.report(fast).notes if "between equals" in note]
    assert notes == [
        f"the outputs differ from the folded model's by {error:.1e} (relative norm), for "
        "rounding alone: it decides between equals here (routing, top-k, sorting). Every product "
        "by itself is right"
    ]
    for name in ("one", "other", "head"):  # what was nudged is restored
        weight = nmfx.fold(fast).get_submodule(name).weight
        assert torch.equal(weight, folded.get_submodule(name).weight), name


@pytest.mark.usefixtures("_rounds_apart")
def test_a_wrong_kernel_is_found_where_rounding_would_explain_the_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = torch.ops.nmfx.linear_nm.default
    right = dense_products._DENSE[op]
    monkeypatch.setitem(dense_products._DENSE, op, lambda *args: right(*args) * 1.01)
    model = nmfx.sparsify(Routes(), "2:4")
    with pytest.raises(nmfx.NMError, match=r"one\.weight_values: .* by 9.9e-03 .* more than 1e-04"):
        nmfx.lower(model, (torch.randn(64, 256),), tune=False)


class Noisy(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


def test_random_outputs_are_compared_from_one_random_state() -> None:
    model = nmfx.sparsify(Noisy(), "2:4")
    before = torch.get_rng_state()
    nmfx.lower(model, (X,), tune=False)
    assert torch.equal(torch.get_rng_state(), before)


# --- all or nothing ----------------------------------------------------------------------------


TABLES = {"_parameters", "_buffers", "_modules"}  # compared by what is in them


def snapshot(model: nn.Module) -> Any:
    return [
        (
            name,
            type(module),
            module.training,
            {key: id(module.__dict__[key]) for key in module.__dict__.keys() - added - TABLES},
            {key: str(module.__dict__[key]) for key in added},
            {key: id(p) for key, p in module._parameters.items()},
            {key: id(b) for key, b in module._buffers.items()},
            list(module._modules),
        )
        for name, module in model.named_modules()
        for added in [{key for key in module.__dict__ if key.startswith("_nmfx_")}]
    ], [value.tolist() for value in model.state_dict().values()]


def assert_folded(model: nn.Module, folded: nn.Module) -> None:
    """Whether a model is what `nmfx.fold` makes of it, but for notes."""
    assert [type(m) for m in model.modules()] == [type(m) for m in folded.modules()]
    assert not list(nmfx_attributes(model)), "something of nmfx is left"
    state, expected = model.state_dict(), folded.state_dict()
    assert list(state) == list(expected), "other keys, or another order"
    for name, value in state.items():
        assert torch.equal(value, expected[name]), f"{name}: not the folded weight"
    parameters = dict(model.named_parameters())
    for name, parameter in folded.named_parameters():
        assert parameters[name].requires_grad == parameter.requires_grad, name


def nmfx_attributes(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        yield from (f"{name}.{key}" for key in module.__dict__ if key.startswith("_nmfx_"))


FUNCTIONS = {
    "pack": ("nmfx.capture.packed", "pack"),
    "unpack": ("nmfx.capture.packed", "unpack"),
    "refresh": ("nmfx.capture.lowering", "refresh"),
    "bake": ("nmfx.lower", "bake"),
    "compare_outputs": ("nmfx.lower_layers", "compare_outputs"),
}


def fail_in(monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: BaseException) -> None:
    """Lets the `at`-th call of a function that lower uses raise."""
    module_name, name = FUNCTIONS[name]
    module = sys.modules[module_name]
    original, calls = getattr(module, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize(
    ("name", "at"),
    [("bake", 1), ("pack", 1), ("pack", 2), ("refresh", 2), ("unpack", 2), ("compare_outputs", 1)],
)
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "^C"])
@pytest.mark.parametrize("source", ["sparse", "frozen", "folded"])
def test_a_failure_in_the_middle_leaves_a_whole_folded_model(
    name: str, at: int, error: BaseException, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse().train()
    model.fc1.weight.requires_grad_(False)
    if source == "frozen":
        nmfx.freeze(model)
    if source == "folded":
        nmfx.fold(model, inplace=True)
    untouched = copy.deepcopy(model)
    folded = copy.deepcopy(model) if source == "folded" else nmfx.fold(model)
    before = snapshot(model)
    for inplace in (False, True):
        with monkeypatch.context() as patch:
            fail_in(patch, name, at, error)
            with pytest.raises(type(error)):
                nmfx.lower(model, (X,), inplace=inplace, tune=False)
        assert all(module.training for module in model.modules())
        if not inplace:
            assert snapshot(model) == before
    assert_folded(model, folded)
    lowered = nmfx.lower(model, (X,), inplace=True, tune=False).eval()
    torch.testing.assert_close(lowered(X), untouched.eval()(X))


def test_a_failure_in_the_middle_folds_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(16, 16))
            self.b = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.a), self.b)

    for already in (False, True):
        gm = nmfx.sparsify(torch.fx.symbolic_trace(Two()), {"": "1:4"})
        gm = nmfx.fold(gm) if already else gm
        folded = copy.deepcopy(gm) if already else nmfx.fold(gm)
        with monkeypatch.context() as patch:
            fail_in(patch, "compare_outputs", 1, RuntimeError("boom"))
            with pytest.raises(RuntimeError, match="boom"):
                nmfx.lower(gm, (X,), inplace=True, tune=False)
        assert gm.code == folded.code
        assert list(gm.state_dict()) == list(folded.state_dict())
        assert torch.equal(gm(X), folded(X))
        torch.testing.assert_close(nmfx.lower(gm, (X,), tune=False)(X), folded(X))


# --- which layers, and why not -----------------------------------------------------------------


def mixed() -> nn.Module:
    rules = {"dense_conv": None, "identity": "4:4", "head": None, "?*": "1:4"}
    return nmfx.sparsify(Mixed(), rules).eval()


REASONS = {
    "up.weight": "conv_transpose has no packed kernel yet; folded",
    "branch.weight": "its weight is not read by a traced linear; folded",
    "identity.weight": "packed as 4:4 (keep 4 of every 4) it would not be smaller; folded",
    "head.weight": "kept dense by rule 'head'",
}


def test_every_dense_layer_of_a_lowered_model_has_its_reason() -> None:
    model = mixed()
    x = torch.randn(2, 4, 5)
    lowered = nmfx.lower(model, (x,), tune=False)
    rows = {row.fqn: row for row in nmfx.report(lowered)}
    assert {name for name, row in rows.items() if row.state == "packed"} == {
        "conv.weight",
        "gpt.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "fc.weight",
    }
    assert {name: rows[name].reason for name in REASONS} == REASONS
    torch.testing.assert_close(lowered(x), nmfx.fold(model)(x))
    assert torch.equal(lowered.conv.weight, nmfx.fold(model).conv.weight)
    for name in ("branch", "up"):
        assert nmfx.is_nm(
            lowered.get_parameter(f"{name}.weight"), "1:4", 0 if name == "up" else 1
        ), f"{name}: not folded"
        assert type(lowered.get_submodule(name)).__name__[:2] != "NM", "not the original class"
    assert isinstance(lowered.attention, nn.MultiheadAttention)


def test_convolutions_over_volumes_stay_dense_with_the_reason() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Conv3d(8, 32, 1), nn.Conv2d(8, 32, 1)), {"?": "1:4"})
    volume, picture = nmfx.report(nmfx.lower(model, tune=False))
    assert (volume.state, volume.reason) == ("dense", "3-D conv has no packed kernel yet; folded")
    assert (picture.state, picture.reason) == ("packed", "")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d], ids=["1d", "2d"])
@pytest.mark.parametrize("source", ["sparse", "frozen", "folded"])
def test_lowered_convolutions_equal_folded(make: Any, groups: int, source: str) -> None:
    first = make(8, 32, 3, padding=1, stride=2, groups=groups)
    model = nn.Sequential(first, nn.ReLU(), make(32, 32, 3, padding="same", bias=False))
    nmfx.sparsify(model, {"?": "1:4"})
    if source == "frozen":
        nmfx.freeze(model)
    folded = nmfx.fold(model)
    x = torch.randn(2, 8, *[9] * (folded[0].weight.ndim - 2))
    lowered = nmfx.lower(folded if source == "folded" else model, (x,), tune=False)
    assert states(lowered) == {"0.weight": "packed", "2.weight": "packed"}
    torch.testing.assert_close(lowered(x), folded(x))
    for row, i in zip(nmfx.report(lowered), (0, 2), strict=True):
        assert row.bytes < row.bytes_dense
        assert torch.equal(lowered[i].weight, folded[i].weight)
        assert type(lowered.state_dict()[f"{i}.weight_values"]) is Tensor
    assert list(lowered.state_dict()) == [
        *("0.bias", "0.weight_values", "0.weight_index", "2.weight_values", "2.weight_index"),
    ]


def test_a_layer_that_was_never_sparse_is_not_called_folded() -> None:
    rows = {row.fqn: row for row in nmfx.report(nmfx.lower(mixed(), tune=False))}
    assert rows["dense_conv.weight"].reason == "kept dense by rule 'dense_conv'"


def test_partly_dense_models_without_a_sparsified_layer_say_why() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(8, 8))
    with pytest.raises(nmfx.NMError) as error:
        nmfx.lower(model, tune=False)
    assert str(error.value) == (
        "nmfx.lower: no weight of Sequential is N:M sparse; the first of 2, 0.weight: "
        "its weight satisfies no N:M pattern that would make it smaller"
    )


def prune_(weight: Tensor, pattern: str, zero: float, dim: int = 1) -> None:
    n, m = map(int, pattern.split(":"))
    weight.data.masked_fill_(~nm_mask(weight, n, m, dim), zero)


@pytest.mark.parametrize("pattern", ["1:3", "2:4", "1:4", "2:12", "1:12", "3:6"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_that_somebody_else_made_are_found(pattern: str, zero: float) -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    prune_(model[0].weight, pattern, zero)
    expected, x = model(torch.ones(2, 24)), torch.ones(2, 24)
    lowered = nmfx.lower(model, (x,), tune=False)
    row, rest = nmfx.report(lowered)
    assert row.state == "packed"
    assert row.bytes < row.bytes_dense
    assert rest.reason == "its weight satisfies no N:M pattern that would make it smaller"
    assert torch.equal(lowered[0].weight, model[0].weight), "another weight (as numbers)"
    assert not torch.signbit(lowered[0].weight[lowered[0].weight == 0]).any()
    torch.testing.assert_close(lowered(x), expected)


def test_an_all_zero_weight_packs() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    nn.init.zeros_(model[0].weight)
    lowered = nmfx.lower(model, (X,), tune=False)
    assert torch.equal(lowered(X), model(X))


@pytest.mark.parametrize("bias", [True, False])
def test_hf_conv1d_packs_along_its_rows(bias: bool) -> None:
    model = nn.Sequential(Conv1D(8, 16), nn.Linear(8, 4))
    x = torch.randn(2, 3, 16)
    nmfx.sparsify(model, {"0": "1:4"})
    expected = model(x)
    for source in (model, nmfx.fold(model)):
        lowered = nmfx.lower(source, (x,), tune=False)
        (row, _) = nmfx.report(lowered)
        assert (row.state, row.kind, row.shape) == ("packed", "addmm", (16, 8))
        assert lowered[0].weight_values.shape == (1, 4, 16)
        torch.testing.assert_close(lowered(x), expected)


def test_a_module_in_two_places_is_packed_once() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(16, 4))
    for source in (nmfx.sparsify(model, {"0": "1:4"}), nmfx.fold(model)):
        lowered = nmfx.lower(source, (X,), tune=False)
        assert lowered[0] is lowered[2]
        assert len(nmfx.report(lowered)) == 2
        torch.testing.assert_close(lowered(X), nmfx.fold(model)(X))


def test_tied_zeros_stay_dense_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    for layer in model:
        prune_(layer.weight, "1:4", 0.0)
    model[1].weight = model[0].weight
    lowered = nmfx.lower(model, (X,), tune=False)
    assert [row.reason for row in nmfx.report(lowered)] == [
        "its weight is tied to 1.weight",
        "its weight is tied to 0.weight",
        "",
    ]
    torch.testing.assert_close(lowered(X), model(X))


def test_lowering_again_adds_what_was_pruned_since() -> None:
    lowered = nmfx.lower(sparse("1:4"), tune=False).eval()
    prune_(lowered.head.weight, "2:4", 0.0)
    expected = lowered(X)
    again = nmfx.lower(lowered, (X,), tune=False)
    assert set(states(again).values()) == {"packed"}
    torch.testing.assert_close(again(X), expected)


def test_an_empty_axis_stays_dense() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 16)
    model = nn.ModuleList([empty, nn.Linear(16, 16)])
    lowered = nmfx.lower(nmfx.sparsify(model, {"?": "1:4"}), tune=False)
    assert states(lowered) == {"0.weight": "dense", "1.weight": "packed"}


def test_schedule_verbs_on_a_partly_lowered_model_touch_the_rest() -> None:
    model = nmfx.lower(sparse("1:4"), tune=False)
    nmfx.sparsify(model, {"head": "2:4"})
    nmfx.set_lambda(model, 0.5)
    nmfx.set_pattern(model, "1:4")
    rows = {row.fqn: row for row in nmfx.report(model)}
    assert (rows["head.weight"].pattern.text, rows["head.weight"].lambda_w) == ("1:4", 0.5)
    assert rows["fc1.weight"].state == "packed"
    assert list(nmfx.masks(model)) == ["head.weight"]
    nmfx.fold(model, inplace=True)
    assert set(states(model).values()) == {"folded"}
    assert nmfx.is_nm(model.fc1.weight, "1:4", 1)
    assert nmfx.is_nm(model.head.weight, "1:4", 1)
    model(X).sum().backward()


def test_the_report_of_a_lowered_model_counts_bytes_and_names_the_kernels() -> None:
    report = nmfx.report(nmfx.lower(sparse(), tune=False))
    row = report.rows[0]
    assert (row.fqn, row.shape, row.lambda_w) == ("fc1.weight", (32, 16), None)
    assert (row.bytes_dense, row.bytes) == (32 * 16 * 4, 32 * 8 * 4 + 32 * 4)
    assert "nothing was timed" in str(report)
    assert report.notes[-1] == status()
    assert report.totals["bytes"] < report.totals["bytes_dense"]
