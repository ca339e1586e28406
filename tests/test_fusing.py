"""Batch norms folded into convolutions, activations into packed layers; and what must not be."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import DENSE_WINS, PACKED_WINS, install
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lower_measured import interrupted
from torch import Tensor, fx, nn

import nmfx
from nmfx.capture.fold_norm import folded
from nmfx.capture.site import FOLDED, REPLACES
from nmfx.mask import nm_project

# torch's own, when it copies an exported program.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")

X = torch.linspace(-3, 3, 2 * 8 * 6 * 5).sin().reshape(2, 8, 6, 5)


def normal(channels: int, kind: type[Any] = nn.BatchNorm2d, **options: Any) -> Any:
    """A batch norm in which no number is special."""
    norm = kind(channels, **options)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


class Block(nn.Module):
    """conv, bn, activation; conv, bn; add."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), normal(16)
        self.act = nn.GELU(approximate="tanh")
        self.c2, self.b2 = nn.Conv2d(16, 8, 1), normal(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(self.act(self.b1(self.c1(x))))) + x)


def sparse(*layers: nn.Module, pattern: str = "2:4") -> nn.Module:
    model = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    return nmfx.sparsify(model.eval(), {"?*": pattern})


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.fqn.removesuffix(".weight"): row.reason for row in nmfx.report(model)}


def lowered_equals_folded(
    model: nn.Module, x: Tensor = X, *, tune: bool = False
) -> tuple[nn.Module, dict[str, str]]:
    sparsified = any(row.state == "sparse" for row in nmfx.report(model))
    expected = nmfx.fold(model)(x) if sparsified else model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lowered = nmfx.lower(model, (x,), tune=tune)
    torch.testing.assert_close(lowered(x), expected, rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    return lowered, reasons(lowered)


# --- the arithmetic ----------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 3]),
    outputs=st.sampled_from([2, 66, 130]),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 1e-30]),
)
def test_a_folded_convolution_computes_both(
    seed: int, groups: int, kernel: int, outputs: int, bias: bool, affine: bool, eps: float
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(8 * groups, outputs, kernel, groups=groups, bias=bias).double()
    norm = normal(outputs, affine=affine, eps=eps).double().eval()
    with torch.no_grad():
        conv.weight.copy_(nm_project(conv.weight, "1:4", 1))
        x = torch.randn(2, 8 * groups, 4, 4, dtype=torch.double)
        new = folded(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, eps, norm.weight, norm.bias
        )
        assert new is not None
        actual = F.conv2d(x, *new, groups=groups)
        torch.testing.assert_close(actual, norm(conv(x)), rtol=1e-9, atol=1e-9)
        zeros = new[0][conv.weight == 0]
    assert nmfx.is_nm(new[0], "1:4", 1)
    assert not zeros.signbit().any(), "a pruned weight became -0.0"


def test_what_would_overflow_is_not_folded() -> None:
    ones = torch.ones(4)
    weight = torch.full((4, 4, 1, 1), 1e30)
    assert folded(weight, None, ones, ones * 1e-30, 0.0, ones, ones) is None
    assert folded(weight, None, ones, ones * 0, 0.0, ones, ones) is None
    infinite = weight.index_fill(0, torch.tensor([1]), torch.inf)
    assert folded(infinite, None, ones, ones, 0.0, ones, ones) is not None, "it was so before"
    norm = normal(4)
    norm.running_var.fill_(0.0)
    norm.eps = 1e-30
    with torch.no_grad():
        model = nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 4, 1)).eval()
        model[0].weight.copy_(weight)
    model = nmfx.sparsify(model, "2:4")
    lowered = nmfx.lower(model, (torch.zeros(1, 4, 2, 2),), tune=False)
    assert reasons(lowered)["0"] == "batch norm 1 stays: folded in, its weights would overflow"


# --- modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ms", [None, PACKED_WINS, DENSE_WINS], ids=["untimed", "packed", "dense"])
def test_a_block_becomes_two_convolutions(
    inplace: bool, ms: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ms is not None:
        install(monkeypatch, ms)
    model = sparse(Block())
    expected = nmfx.fold(model)(X)
    lowered = nmfx.lower(model, (X,), inplace=inplace, tune=ms is not None)
    torch.testing.assert_close(lowered(X), expected)
    assert type(lowered.b1) is type(lowered.b2) is nn.Identity
    found = reasons(lowered)
    assert "b1 folded in" in found["c1"]
    assert "b2 folded in" in found["c2"]
    assert not any(name.startswith("b1") for name in lowered.state_dict())
    assert lowered.c1.bias is not None
    assert not lowered.c1.bias.requires_grad or lowered.c2.bias.requires_grad
    if ms is DENSE_WINS:
        assert type(lowered.act) is nn.GELU
        assert type(lowered.c1) is nn.Conv2d
        assert nmfx.is_nm(lowered.c1.weight, "2:4", 1)
    else:
        assert type(lowered.act) is nn.Identity
        assert "gelu_tanh fused" in found["c1"]
        assert "fused" not in found["c2"], "F.relu of a sum is not the layer's"
        assert "gelu_tanh" in repr(lowered.c1)


def test_copies_pickles_and_compiled_models_keep_what_was_fused() -> None:
    lowered, _ = lowered_equals_folded(sparse(Block()))
    expected = lowered(X)
    assert torch.equal(copy.deepcopy(lowered)(X), expected)
    buffer = io.BytesIO()
    torch.save(lowered, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), expected)
    compiled = torch.compile(lowered, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), expected)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (nn.ReLU, "relu"),
        (lambda: nn.ReLU(inplace=True), "relu"),
        (nn.GELU, "gelu"),
        (lambda: nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU, "silu"),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_activations_that_are_modules(make: Callable[[], nn.Module], name: str, kind: str) -> None:
    layer, x = {
        "linear": (nn.Linear(8, 12), X.permute(0, 2, 3, 1)),
        "conv1d": (nn.Conv1d(8, 12, 3), X[..., 0]),
        "conv2d": (nn.Conv2d(8, 12, 3), X),
    }[kind]
    model = sparse(layer, make())
    lowered, found = lowered_equals_folded(model, x)
    assert found["0"] == f"{name} fused"
    assert type(lowered[1]) is nn.Identity
    assert not torch.equal(lowered[0](x), nmfx.fold(model)[0](x)), "it is in the layer itself"


def test_a_layer_in_a_list_is_seen_through_the_list() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
            self.norms = nn.ModuleDict({"a": normal(8), "b": normal(8)})
            self.acts = nn.ModuleList([nn.ReLU(), nn.SiLU()])

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm, act in zip(self.convs, self.norms.values(), self.acts, strict=True):
                x = act(norm(conv(x)))
            return x

    _, found = lowered_equals_folded(sparse(Lists()))
    assert found == {
        "convs.0": "norms.a folded in; relu fused",
        "convs.1": "norms.b folded in; silu fused",
    }


def test_a_bias_that_two_layers_share_is_not_changed_for_the_other() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), normal(8), nn.Conv2d(8, 8, 1), normal(8))
    model[2].bias = model[0].bias
    lowered, found = lowered_equals_folded(sparse(model))
    assert found == {"0": "batch norm 1 folded in", "2": "batch norm 3 folded in"}
    assert not torch.equal(lowered[0].bias, lowered[2].bias)


def test_one_dimension_and_no_affine() -> None:
    norm = normal(8, nn.BatchNorm1d, affine=False)
    _, found = lowered_equals_folded(sparse(nn.Conv1d(8, 8, 3), norm, nn.ReLU()), X[..., 0])
    assert found["0"] == "batch norm 1 folded in; relu fused"


# --- what must stay ----------------------------------------------------------------------------


class TwoReaders(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c1(x)
        return self.c2(self.act(self.b1(y))) + y[:, :8]


class ReadsStatistics(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.b1.running_var[:5] + self.b2.running_mean[:5]


class Optional(Block):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.c1(x)
        return self.c2(y if skip is None else self.b1(y))


class Values(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c1(x)
        return self.c2(self.b1(y) if y.sum() > 0 else y)


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def scaled() -> nn.Module:
    return nn.Sequential(Scaled(8, 8, 1), normal(8), nn.Conv2d(8, 8, 1))


def hooked(where: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), normal(8), nn.Conv2d(8, 8, 1))
    model.get_submodule(where).register_forward_hook(lambda *args: None)
    return model


def shared_norm() -> nn.Module:
    norm = normal(8)
    return nn.Sequential(nn.Conv2d(8, 8, 1), norm, nn.Conv2d(8, 8, 1), norm)


def shared_conv() -> nn.Module:
    conv = nn.Conv2d(8, 8, 1)
    return nn.Sequential(conv, normal(8), conv, nn.Conv2d(8, 8, 1))


def replaced_forward() -> nn.Module:
    model = Block()
    model.forward = model.forward  # type: ignore[method-assign]
    return model


STAYS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "read twice": (TwoReaders, "c1", ""),
    "its statistics are read": (ReadsStatistics, "c1", ""),
    "an optional argument": (Optional, "c1", ""),
    "values decide": (Values, "c1", "what follows it is not known: Values.forward does not trace"),
    "more than a convolution": (
        scaled,
        "0",
        "batch norm 1 stays: the layer computes more than a convolution",
    ),
    "a subclass": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), normal(8, Doubled)), "0", ""),
    "a hook on the layer": (lambda: hooked("0"), "0", ""),
    "a hook on the norm": (lambda: hooked("1"), "0", ""),
    "one norm for two": (shared_norm, "0", ""),
    "one layer, two places": (shared_conv, "0", ""),
    "forward replaced": (replaced_forward, "c1", "what follows it is not known: its forward was"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1), normal(8, track_running_stats=False)),
        "0",
        "batch norm 1 stays: it has no running statistics",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_is_not_certain_stays(case: str) -> None:
    make, name, reason = STAYS[case]
    model = sparse(make())
    kept = [type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    lowered, found = lowered_equals_folded(model)
    assert "folded" not in found[name]
    assert found[name].startswith(reason)
    assert bool(found[name]) == bool(reason)
    if case not in ("values decide", "more than a convolution"):
        assert type(lowered.get_submodule(name)).__name__.startswith("NM"), "it is packed"
    left = [type(module) for module in lowered.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(left) >= len(kept) - 1


def test_train_mode_and_no_examples_fold_nothing() -> None:
    training = nmfx.sparsify(Block(), {"?*": "2:4"}).train()
    lowered = nmfx.lower(training, (X,), tune=False)
    assert (
        "b1 stays: it is in train mode; call model.eval() before nmfx.lower"
        in (reasons(lowered)["c1"])
    )
    assert type(lowered.b1) is nn.BatchNorm2d
    assert lowered.b1.training
    assert not any(reasons(nmfx.lower(sparse(Block()), tune=False)).values())


def test_a_tap_from_outside_is_seen() -> None:
    """The block alone proves nothing: another module calls its convolution too."""

    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.block.c1(x)[:, :8]

    lowered, found = lowered_equals_folded(sparse(Taps()))
    assert found["block.c1"] == ""
    assert type(lowered.block.b1) is nn.BatchNorm2d
    assert found["block.c2"] == "block.b2 folded in"


def test_tracing_leaves_no_mark_on_the_module() -> None:
    class Counts(Block):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            return super().forward(x) + 1e-9 * torch.rand(())

    model = sparse(Counts())
    random = torch.get_rng_state()
    nmfx.lower(model, (X,), tune=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.calls == 0
    assert not hasattr(model, "last")
    lowered, found = lowered_equals_folded(model)
    assert "b1 folded in" in found["c1"]
    assert isinstance(lowered.last, Tensor)


# --- graphs ------------------------------------------------------------------------------------


def graph(model: nn.Module, form: str) -> fx.GraphModule:
    if form == "symbolic":
        return fx.symbolic_trace(model)
    exported = torch.export.export(model, (X,))
    if form == "decomposed":
        exported = exported.run_decompositions()
    return exported.module()


@pytest.mark.parametrize("form", ["symbolic", "exported", "decomposed"])
@pytest.mark.parametrize("state", ["sparse", "folded"])
def test_norms_and_activations_of_a_graph(form: str, state: str) -> None:
    model = nmfx.fold(sparse(Block()))
    gm = graph(model, form)
    if state == "sparse":
        gm = nmfx.sparsify(gm, {"?*": "2:4"})
    lowered, found = lowered_equals_folded(gm)
    texts = "batch norm folded", "batch norm folded"
    if form == "symbolic":
        texts = "b1 folded in", "b2 folded in"
    assert found == {"c1": f"{texts[0]}; gelu_tanh fused", "c2": texts[1]}
    code = lowered.code
    assert "gelu" not in code.replace("gelu_tanh", "") or form == "symbolic"
    assert "batch_norm" not in code
    left = [name for name in lowered.state_dict() if name.startswith(("b1.", "b2."))]
    assert all(name.endswith("num_batches_tracked") for name in left)
    again = copy.deepcopy(lowered)
    assert torch.equal(again(X), lowered(X))


class Functional(nn.Module):
    def __init__(self, readers: int = 1) -> None:
        super().__init__()
        self.readers = readers
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.bias = nn.Parameter(torch.randn(8))
        self.norm = normal(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        n = self.norm
        z = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, self.training)
        z = z.relu()
        if self.readers == 2:
            z = z + self.bias.sum() + self.norm.bias.sum()
        if self.readers == 3:
            z = z + y
        return z


@pytest.mark.parametrize(
    ("readers", "reason"),
    [
        (1, "batch norm folded; relu fused"),
        (2, "batch norm stays: its bias is computed, or read elsewhere"),
        (3, ""),
    ],
)
def test_functions_in_a_graph(readers: int, reason: str) -> None:
    model = Functional(readers).eval()
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    gm = fx.GraphModule(model, tracer.trace(model)).eval()
    gm = nmfx.sparsify(gm, {"": "2:4"})
    _, found = lowered_equals_folded(gm)
    assert found["weight"] == reason


def test_batch_statistics_in_a_graph_stay() -> None:
    model = Functional().train()
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    gm = nmfx.sparsify(fx.GraphModule(model, tracer.trace(model)), {"": "2:4"})
    lowered = nmfx.lower(gm, tune=False)
    assert "batch_norm" in lowered.code
    assert reasons(lowered)["weight"] == ""


def test_an_activation_that_the_graph_calls_twice_goes_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(8, 8, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.relu(self.conv(x)) - x)

    lowered, found = lowered_equals_folded(
        nmfx.sparsify(fx.symbolic_trace(Shared()), {"?*": "2:4"})
    )
    assert found["conv"] == "relu fused"
    assert [node.target for node in lowered.graph.nodes if node.op == "call_module"] == [
        "conv",
        "relu",
    ]


def test_other_activations_stay() -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in "abc")

        def forward(self, x: Tensor) -> Tensor:
            x = F.leaky_relu(self.a(x))
            x = torch.relu(self.b(x).permute(0, 1, 3, 2))
            y = self.c(x)
            return F.silu(y) + y

    _, found = lowered_equals_folded(nmfx.sparsify(fx.symbolic_trace(Others()), {"?*": "2:4"}))
    assert not any(found.values())


# --- nothing half done -------------------------------------------------------------------------


def test_a_model_that_is_slower_as_a_whole_gets_its_activations_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, PACKED_WINS, whole=(1.0, 2.0, 1.0))
    model = sparse(Block())
    lowered = nmfx.lower(model, (X,))
    torch.testing.assert_close(lowered(X), nmfx.fold(model)(X))
    assert type(lowered.act) is nn.GELU
    assert type(lowered.c1) is nn.Conv2d
    assert type(lowered.b1) is nn.Identity
    assert reasons(lowered)["c1"].endswith("folded; b1 folded in")


@pytest.mark.parametrize("form", ["modules", "symbolic", "exported"])
def test_interrupted_at_any_line_the_model_computes_what_it_did(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PACKED_WINS)
    monkeypatch.setattr("test_lower_measured.X", X)
    model = nmfx.fold(sparse(Block()))
    model = model if form == "modules" else graph(model, form)
    expected = model(X)
    interrupted(copy.deepcopy(model), -1)
    total = interrupted(copy.deepcopy(model), -1)
    assert total > 500, "too few lines: is the trace armed?"
    for at in range(1, total + 1, 11):
        one = copy.deepcopy(model)
        assert interrupted(one, at) == at, "the interruption did not happen"
        assert torch.allclose(one(X), expected, rtol=1e-4, atol=1e-5), f"line {at}"
        packed = [row.state for row in nmfx.report(one)].count("packed")
        assert packed in (0, 2), f"line {at}: half packed"
        if not packed:
            left = {name for m in one.modules() for name in m.__dict__ if "nmfx" in name}
            assert left <= {FOLDED, REPLACES}, f"line {at}: {left}"  # those norms stay folded
            code = getattr(one, "code", "")
            assert "_nm(" not in code, at


# --- batch norms behind linear layers, frozen ones, and what must not be taken for one --------


class FrozenBatchNorm2d(nn.Module):
    """torchvision's, line by line: buffers, no train mode."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, values in {
            "weight": torch.randn(size),
            "bias": torch.randn(size),
            "running_mean": torch.randn(size),
            "running_var": torch.rand(size) + 0.5,
        }.items():
            self.register_buffer(name, values)

    def forward(self, x: Tensor) -> Tensor:
        w, b, rv, rm = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


FrozenBatchNorm2d.__module__ = "torchvision.ops.misc"


def test_a_batch_norm_behind_a_linear_layer_is_folded() -> None:
    model = nn.Sequential(nn.Linear(8, 12), normal(12, nn.BatchNorm1d), nn.ReLU(), nn.Linear(12, 8))
    lowered, found = lowered_equals_folded(sparse(model), torch.randn(5, 8))
    assert found["0"] == "batch norm 1 folded in; relu fused"
    assert type(lowered[1]) is type(lowered[2]) is nn.Identity
    assert nmfx.is_nm(nmfx.fold(lowered)[0].weight, "2:4", 1)


@pytest.mark.parametrize("length", [8, 5])
def test_a_batch_norm_over_positions_stays(length: int) -> None:
    """Of (N, L, C) it normalises L, also where L happens to be C."""
    model = sparse(nn.Sequential(nn.Linear(8, 8), normal(length, nn.BatchNorm1d)))
    _, found = lowered_equals_folded(model, torch.randn(3, length, 8))
    assert found["0"] == (
        "batch norm 1 stays: it does not normalise the channels of a convolution or linear layer"
    )


def test_a_frozen_batch_norm_is_folded_in_train_mode_too() -> None:
    layers = nn.Conv2d(8, 8, 3, bias=False), FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
    model = sparse(nn.Sequential(*layers))
    expected = nmfx.fold(model)(X)
    lowered = nmfx.lower(model.train(), (X,), tune=False)
    torch.testing.assert_close(lowered(X), expected, rtol=1e-4, atol=1e-5)
    assert reasons(lowered)["0"] == "batch norm 1 folded in; relu fused"
    assert not any(name.startswith("1.") for name in lowered.state_dict())
    other = nn.Sequential(nn.Conv2d(8, 8, 3), type("FrozenBatchNorm2d", (nn.Identity,), {})())
    assert reasons(nmfx.lower(sparse(other), (X,), tune=False))["0"] == ""


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a batch norm, then its own dropout and activation."""

    def __init__(self, size: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(size)
        self.drop, self.act = nn.Identity() if drop is None else drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


def test_a_batch_norm_with_an_activation_leaves_that() -> None:
    shared = nn.ReLU()
    options: list[dict[str, nn.Module]] = [
        {"act": nn.ReLU()},
        {"act": nn.Hardswish()},
        {"act": nn.SiLU(), "drop": nn.Dropout(0.5)},
        {"act": shared},
        {"act": nn.Identity()},  # the ReLU behind it is not its own
    ]
    norms = [normal(8, BatchNormAct2d, **one) for one in options]
    layers = [layer for norm in norms for layer in (nn.Conv2d(8, 8, 1), norm)]
    model = sparse(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 8, 1), shared))
    lowered, found = lowered_equals_folded(model, X)
    fused = {"0": "; relu fused", "6": ""}
    for conv, norm in (("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"), ("8", "9")):
        assert found[conv] == f"batch norm {norm} folded in{fused.get(conv, '')}"
    assert [type(lowered[1].act), type(lowered[3].act)] == [nn.Identity, nn.Hardswish]
    assert type(lowered[5].drop) is nn.Dropout
    assert not any(name.startswith(("1.", "3.", "9.")) for name in lowered.state_dict())
    back = nmfx.fold(lowered)
    assert type(back[1].act) is nn.ReLU
    torch.testing.assert_close(back(X), nmfx.fold(model)(X), rtol=1e-4, atol=1e-5)


class NormOfLinear(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.norm, self.kind = normal(8, nn.BatchNorm1d), kind

    def forward(self, x: Tensor) -> Tensor:
        n, b = self.norm, self.bias
        y = F.linear(x, self.weight, b) if self.kind == "linear" else torch.addmm(b, x, self.weight)
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False)


@pytest.mark.parametrize("form", ["symbolic", "exported"])
@pytest.mark.parametrize("kind", ["linear", "linear 3-D", "addmm"])
def test_batch_norms_of_linear_layers_in_graphs(kind: str, form: str) -> None:
    model, x = NormOfLinear(kind.split()[0]).eval(), torch.randn(3, 8)
    if kind == "linear 3-D":
        x = torch.randn(3, 8, 8)
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    gm: nn.Module = fx.GraphModule(model, tracer.trace(model))
    if form == "exported":
        gm = torch.export.export(model, (x,)).module()
    _, found = lowered_equals_folded(nmfx.sparsify(gm, {"": "2:4"}), x)
    stays = "it does not normalise the channels of a convolution or linear layer"
    folds = kind == "linear" and form == "exported"  # others do not know how many dimensions
    assert found["weight"] == ("batch norm folded" if folds else f"batch norm stays: {stays}")


@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), pattern=st.sampled_from(["2:4", "1:4", "4:8", "1:8"]))
def test_whatever_is_folded_keeps_its_pattern(seed: int, pattern: str) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(8, 16, 3), normal(16)
    linear = nn.Flatten(), nn.Linear(16, 8), normal(8, nn.BatchNorm1d)
    model = nn.Sequential(*conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), *linear)
    model = nmfx.sparsify(model.eval(), {"?": pattern})
    lowered = nmfx.lower(model, (X,), tune=False)
    folded = nmfx.fold(lowered)
    for number in (0, 5):
        assert "folded in" in reasons(lowered)[str(number)]
        assert nmfx.is_nm(folded[number].weight, pattern, 1)
    torch.testing.assert_close(lowered(X), nmfx.fold(model)(X), rtol=1e-3, atol=1e-4)
