"""fx.GraphModules: functional weights, exported programs, and linear modules that graphs call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked_reference import nm_mask
from torch import Tensor, fx, nn

import nmfx
from nmfx.capture.graph_module import rewrite_graph
from nmfx.ops.sr_ste import sr_ste


class Functional(nn.Module):
    """Weights that only the graph shows to be weights, and a layer that the graph calls."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.kernel = nn.Parameter(torch.randn(4, 8, 3))
        self.back = nn.Parameter(torch.randn(4, 8, 3))
        self.mixed = nn.Parameter(torch.randn(8, 8))
        self.bias = nn.Parameter(torch.randn(8))
        self.fc = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):  # torch cannot pickle a graph with a postponed annotation
        h = F.relu(F.linear(x, self.w, self.bias))
        h = F.conv1d(h.transpose(1, 2), self.kernel, padding=1)
        h = F.conv_transpose1d(h, self.back, padding=1).transpose(1, 2)
        h = torch.addmm(self.bias, h.reshape(-1, 8), self.mixed).view(x.shape)
        return self.norm(self.fc(F.linear(h, self.w)))


DIMS = {"w": 1, "kernel": 1, "back": 0, "mixed": 0, "fc.weight": 1}
ALL = {"?*": "2:4", "": "2:4"}
X = torch.linspace(-3, 3, 2 * 5 * 8).reshape(2, 5, 8).sin()


def masked(model: nn.Module, dims: dict[str, int], n: int = 2, m: int = 4) -> nn.Module:
    model = copy.deepcopy(model)
    for name, dim in dims.items():
        weight = model.get_parameter(name)
        weight.data.masked_fill_(~nm_mask(weight, n, m, dim), 0.0)
    return model


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module) -> fx.GraphModule:
    return torch.export.export(model, (X,)).module()


def count(gm: fx.GraphModule, target: Any = sr_ste) -> int:
    return sum(node.target is target for node in gm.graph.nodes)


MAKERS = {"traced": (traced, 4), "exported": (exported, 5)}
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")
makers = pytest.mark.parametrize(("make", "in_graph"), MAKERS.values(), ids=MAKERS)
Make = Callable[[nn.Module], fx.GraphModule]


@makers
def test_graph_equals_the_masked_model(make: Make, in_graph: int) -> None:
    model = Functional()
    gm = nmfx.sparsify(make(copy.deepcopy(model)), ALL)
    reference = masked(model, DIMS)
    assert count(gm) == in_graph, gm.code
    gm.graph.lint()
    torch.testing.assert_close(gm(X), reference(X), rtol=0, atol=0)
    assert {name: mask.shape for name, mask in nmfx.masks(gm).items()} == {
        name: model.get_parameter(name).shape for name in DIMS
    }
    for name, mask in nmfx.masks(gm).items():
        assert torch.equal(mask, nm_mask(model.get_parameter(name), 2, 4, DIMS[name])), name


@makers
def test_graph_gradients_are_straight_through_plus_decay(make: Make, in_graph: int) -> None:
    model = Functional()
    gm = nmfx.sparsify(make(copy.deepcopy(model)), ALL, lambda_w=0.25)
    reference = masked(model, DIMS)
    for module in (gm, reference):
        module(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = reference.get_parameter(name).grad
        if name in DIMS:  # once per use, but one node per weight: once
            pruned = ~nm_mask(parameter, 2, 4, DIMS[name])
            expected = expected + 0.25 * torch.where(pruned, parameter, 0.0)
        torch.testing.assert_close(gm.get_parameter(name).grad, expected, msg=name)


@makers
def test_graph_keeps_keys_parameters_and_code(make: Make, in_graph: int) -> None:
    gm = make(Functional())
    state, code = list(gm.state_dict()), gm.code
    ids = {name: id(p) for name, p in gm.named_parameters()}
    buffers = [name for name, _ in gm.named_buffers()]
    values = {name: value.clone() for name, value in gm.state_dict().items()}
    assert nmfx.sparsify(gm, ALL) is gm
    assert list(gm.state_dict()) == state
    assert {name: id(p) for name, p in gm.named_parameters()} == ids
    assert [name for name, _ in gm.named_buffers()] == buffers
    assert gm.code != code
    assert nmfx.unsparsify(gm) is gm
    assert gm.code == code, "unsparsify does not restore the code"
    assert {name: id(p) for name, p in gm.named_parameters()} == ids
    assert all(torch.equal(value, values[name]) for name, value in gm.state_dict().items())
    assert not any("_nmfx" in name for module in gm.modules() for name in module.__dict__)
    assert "_nmfx" not in dict(gm.named_modules())


def test_the_code_shows_one_sr_ste_per_weight() -> None:
    gm = nmfx.sparsify(traced(Functional()), ALL)
    assert gm.code.count("nmfx_sr_ste(") == 4
    assert "nmfx_sr_ste(w, _nmfx__nmfx_control0, 4, 1)" in gm.code
    assert "nmfx_sr_ste(back, _nmfx__nmfx_control2, 4, 0)" in gm.code


def test_sparsify_and_rewrite_are_idempotent_on_a_graph() -> None:
    gm = nmfx.sparsify(traced(Functional()), ALL)
    code, report = gm.code, str(nmfx.report(gm))
    nmfx.sparsify(gm, ALL)
    assert gm.code == code
    assert str(nmfx.report(gm)) == report
    rewrite_graph(gm)
    assert gm.code == code


def test_a_second_call_adds_weights_of_a_graph() -> None:
    gm = traced(Functional())

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Functional()
            self.b = Functional()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    gm, x = traced(Split()), X
    dense = copy.deepcopy(gm)
    nmfx.sparsify(gm, {"a": "1:4", "a.fc": "1:4"})
    assert count(gm) == 4
    nmfx.sparsify(gm, {"b*": "2:4"}, lambda_w=0.5)
    assert count(gm) == 8
    rows = {row.fqn: row for row in nmfx.report(gm)}
    assert (rows["a.w"].pattern.text, rows["a.w"].lambda_w) == ("1:4", 2e-4)
    assert (rows["b.w"].pattern.text, rows["b.w"].lambda_w) == ("2:4", 0.5)
    reference = masked(dense, {f"a.{name}": dim for name, dim in DIMS.items()}, 1)
    reference = masked(reference, {f"b.{name}": dim for name, dim in DIMS.items()}, 2)
    torch.testing.assert_close(gm(x), reference(x), rtol=0, atol=0)


def test_the_default_policy_keeps_the_last_linear_of_a_graph_dense() -> None:
    gm = nmfx.sparsify(traced(Functional()), "2:4")
    rows = {row.fqn: row for row in nmfx.report(gm)}
    assert rows["fc.weight"].reason.startswith("the output layer")
    assert [name for name, row in rows.items() if row.state == "dense"] == ["fc.weight"]


# --- copies ------------------------------------------------------------------------------------


# torch itself cannot pickle what torch.export(...).module() returns.
@pytest.mark.parametrize(
    ("make", "how"), [(traced, "deepcopy"), (traced, "pickle"), (exported, "deepcopy")]
)
@pytest.mark.parametrize("state", ["sparse", "frozen", "packed"])
def test_graph_copies_are_independent(make: Make, how: str, state: str) -> None:
    gm = nmfx.sparsify(make(Functional()), ALL)
    if state == "frozen":
        nmfx.freeze(gm)
        with torch.no_grad():
            gm.w.neg_().add_(0.3)
    gm = nmfx.lower(gm, tune=False) if state == "packed" else gm
    twin = copy.deepcopy(gm) if how == "deepcopy" else pickle.loads(pickle.dumps(gm))
    assert torch.equal(twin(X), gm(X))
    assert list(twin.state_dict()) == list(gm.state_dict())
    # A pickled graph forgets why a layer stayed dense, so its report looks at the zeros.
    kinds = [[row.state.replace("folded", "dense") for row in nmfx.report(m)] for m in (twin, gm)]
    assert kinds[0] == kinds[1]
    assert list(dict(twin.named_buffers())) == list(dict(gm.named_buffers()))
    if state == "packed":
        return
    before = gm(X)
    nmfx.unfreeze(twin)
    nmfx.set_pattern(twin, "1:4")
    nmfx.set_lambda(twin, 0.5)
    assert torch.equal(gm(X), before)
    assert {row.lambda_w for row in nmfx.report(gm)} == {2e-4}
    dense = nmfx.unsparsify(twin)
    assert "_nmfx" not in dense.code


# --- schedule, fold, lower ---------------------------------------------------------------------


@makers
def test_graph_follows_the_schedule(make: Make, in_graph: int) -> None:
    model = Functional()
    gm = nmfx.sparsify(make(copy.deepcopy(model)), ALL)
    code = gm.code
    nmfx.set_pattern(gm, "1:4")
    nmfx.set_lambda(gm, 0.5)
    assert gm.code == code, "N or lambda is part of the code"
    assert torch.equal(gm(X), masked(model, DIMS, 1)(X))
    nmfx.set_pattern(gm, "1:2")
    assert gm.code != code
    assert gm.code.count(", 2, ") >= in_graph
    assert torch.equal(gm(X), masked(model, DIMS, 1, 2)(X))
    nmfx.set_pattern(gm, "2:4")
    assert gm.code == code
    gm(X).sum().backward()


@makers
def test_graph_freezes_and_unfreezes(make: Make, in_graph: int) -> None:
    model = Functional()
    gm = nmfx.sparsify(make(copy.deepcopy(model)), ALL)
    reference = masked(model, DIMS)
    nmfx.freeze(gm)
    assert count(gm) == 0
    assert gm.code.count("nmfx_keep(") == in_graph
    assert torch.equal(gm(X), reference(X))
    gm(X).square().sum().backward()
    mask = nmfx.masks(gm)["w"]
    assert not gm.w.grad[~mask].any(), "a pruned weight has a gradient"
    assert gm.w.grad[mask].all()
    with torch.no_grad():
        gm.w.copy_(torch.where(mask, gm.w, 100.0))
    assert torch.equal(gm(X), reference(X))
    nmfx.unfreeze(gm)
    assert count(gm) == in_graph
    assert "nmfx_keep" not in gm.code
    assert not torch.equal(gm(X), reference(X))


@makers
@pytest.mark.parametrize("inplace", [False, True])
def test_graph_folds_to_its_own_code(make: Make, in_graph: int, inplace: bool) -> None:
    gm = make(Functional())
    code = gm.code
    nmfx.sparsify(gm, ALL)
    expected = gm(X)
    folded = nmfx.fold(gm, inplace=inplace)
    assert (folded is gm) is inplace
    assert folded.code == code
    assert torch.equal(folded(X), expected)
    for name, dim in DIMS.items():
        assert nmfx.is_nm(folded.get_parameter(name), "2:4", dim), name
    assert "_nmfx" not in dict(folded.named_modules())


@makers
@pytest.mark.parametrize("first", ["sparse", "folded"])
def test_graph_lowers(make: Make, in_graph: int, first: str) -> None:
    gm = nmfx.sparsify(make(Functional()), {**ALL, "": "1:4", "?*": "1:4"})
    expected = gm(X)
    source = nmfx.fold(gm) if first == "folded" else gm
    lowered = nmfx.lower(source, (X,), tune=False)
    torch.testing.assert_close(lowered(X), expected)
    rows = {row.fqn: row for row in nmfx.report(lowered)}
    assert {name for name, row in rows.items() if row.state == "packed"} == {
        "w",
        "kernel",
        "mixed",
        "fc.weight",
    }
    assert rows["back"].reason.startswith("conv_transpose has no packed kernel yet")
    state = lowered.state_dict()
    packed = {"w_values", "w_index", "kernel_values", "kernel_index", "mixed_values"}
    assert packed | {"fc.weight_index"} <= set(state)
    assert not {"w", "kernel", "mixed", "fc.weight"} & set(state)
    assert "nmfx_linear_nm(" in lowered.code
    assert "nmfx_conv_nm(" in lowered.code
    assert "nmfx_sr_ste" not in lowered.code
    with pytest.raises(nmfx.NMError, match=r"its dense weight is gone$"):
        nmfx.unsparsify(lowered)


class Adds(nn.Module):
    def __init__(self, **options: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 4))
        self.b = nn.Parameter(torch.randn(4))
        self.grid = nn.Parameter(torch.randn(3, 4))
        self.options = options


class AddsScaled(Adds):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, self.w, **self.options)


class AddsInput(Adds):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x[:, :4], x, self.w)


class AddsGrid(Adds):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.grid, x, self.w)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (AddsScaled(alpha=2), "addmm with alpha or beta"),
        (AddsScaled(beta=3), "addmm with alpha or beta"),
        (AddsInput(), "addmm that adds something else than a bias"),
        (AddsGrid(), "addmm that adds something else than a bias"),
    ],
    ids=["alpha", "beta", "input", "grid"],
)
@pytest.mark.parametrize("folded", [False, True])
def test_addmm_that_is_no_linear_layer_is_sparsified_but_not_packed(
    model: nn.Module, reason: str, folded: bool
) -> None:
    x = torch.randn(3, 8)
    gm = nmfx.sparsify(traced(copy.deepcopy(model)), {"": "1:4"})
    assert torch.equal(gm(x), masked(model, {"w": 0}, 1)(x))
    gm = nmfx.fold(gm) if folded else gm
    lowered = nmfx.lower(gm, (x,), tune=False)
    (row,) = nmfx.report(lowered)
    assert row.state == "dense"
    assert row.reason == (reason if folded else f"{reason}; folded")
    assert torch.equal(lowered(x), gm(x))


# --- what stays dense --------------------------------------------------------------------------


class Reads(nn.Module):
    """A weight that a linear layer and something else read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w)
        if self.how == "penalty":
            return h + self.w.pow(2).sum()
        if self.how == "transposed":
            return h @ self.w
        return torch.addmm(torch.zeros(8), h, self.w)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("penalty", "the graph also reads its weight in pow"),
        ("transposed", "the graph also reads its weight in matmul"),
        ("both dimensions", "the graph sums over two dimensions of its weight"),
    ],
)
def test_a_weight_with_other_readers_stays_dense(how: str, reason: str) -> None:
    model = nn.Sequential(Reads(how), nn.Linear(8, 8), nn.Linear(8, 2))
    gm = traced(model)
    x = torch.randn(3, 8)
    nmfx.sparsify(gm, "2:4")
    (row,) = (row for row in nmfx.report(gm) if row.fqn == "0.w")
    assert (row.state, row.reason) == ("dense", reason)
    assert torch.equal(gm.get_submodule("1")(x), masked(model[1], {"weight": 1})(x))


def test_tied_weights_of_a_graph_stay_dense() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    gm = torch.export.export(nn.Sequential(*model.values()), (X,)).module()
    nmfx.sparsify(gm, {"?*": "2:4"})
    rows = {row.fqn: row for row in nmfx.report(gm)}
    tied = [row.reason for row in rows.values() if row.state == "dense"]
    assert tied, rows
    assert all(reason.startswith("its weight is tied to ") for reason in tied)


class Shares(nn.Module):
    """A graph that reads the weight of a linear module."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x) if self.calls else x
        return F.linear(h, self.fc.weight)


def test_a_weight_read_by_the_graph_and_its_called_module_stays_dense() -> None:
    gm = traced(nn.Sequential(Shares(True), nn.Linear(8, 8), nn.Linear(8, 2)))
    nmfx.sparsify(gm, "2:4")
    rows = [row for row in nmfx.report(gm) if row.fqn == "0.fc.weight"]
    assert {(row.state, row.reason) for row in rows} == {
        ("dense", "a graph reads its weight and calls its module")
    }


def test_a_weight_of_an_uncalled_module_belongs_to_the_graph() -> None:
    root = Shares(False)
    graph = fx.Tracer().trace(root)
    gm = fx.GraphModule(root, graph)
    gm.fc = root.fc  # as after a pass that replaces call_module by a function
    nmfx.sparsify(gm, {"fc": "1:4"})
    (row,) = nmfx.report(gm)
    assert (row.fqn, row.capture) == ("fc.weight", "graph")
    assert torch.equal(gm(X), masked(root, {"fc.weight": 1}, 1)(X))
    lowered = nmfx.lower(gm, (X,), tune=False)
    (row,) = nmfx.report(lowered)
    assert (row.fqn, row.state) == ("fc.weight", "packed")


def test_a_graph_without_weights_keeps_its_code() -> None:
    class NoWeights(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) @ x.transpose(1, 2)

    gm = traced(NoWeights())
    code = gm.code
    with pytest.raises(nmfx.NMError) as error:
        nmfx.sparsify(gm, "2:4")
    assert str(error.value) == ("NoWeights has no linear or conv layer that nmfx could sparsify")
    assert gm.code == code


def test_a_graph_inside_a_model_is_found_under_its_name() -> None:
    inner = traced(Functional())
    model = nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 4))
    x, dense = X, copy.deepcopy(model)
    nmfx.sparsify(model, {"1": "2:4", "1.*": "2:4"})
    expected = masked(dense, {f"1.{name}": dim for name, dim in DIMS.items()})(x)
    assert torch.equal(model(x), expected)
    assert set(nmfx.masks(model)) == {f"1.{name}" for name in DIMS}


def test_depthwise_and_indivisible_weights_of_a_graph_stay_dense() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Parameter(torch.randn(8, 1, 3))
            self.odd = nn.Parameter(torch.randn(8, 6))
            self.grouped = nn.Parameter(torch.randn(8, 4, 3))
            self.transposed = nn.Parameter(torch.randn(8, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = F.conv1d(x, self.depthwise, groups=8)
            h = F.conv1d(h, self.grouped, groups=2)
            h = F.conv_transpose1d(h, self.transposed, groups=4)
            return F.linear(h[..., :6], self.odd)

    gm = nmfx.sparsify(traced(Odd()), "2:4")
    rows = {row.fqn: row for row in nmfx.report(gm)}
    assert rows["grouped"].state == "sparse"
    assert rows["depthwise"].reason == "depthwise: each filter reads a single channel"
    assert rows["odd"].reason.startswith("in_features=6 is not a multiple of 4")
    assert rows["transposed"].reason.startswith("in_channels/groups=2 is not a multiple of 4")
