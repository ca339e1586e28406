"""verify: raw reads are found wherever they hide, and masked ones are not called raw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nmfx

X = torch.linspace(-2, 2, 3 * 8).reshape(3, 8).sin()


class Net(nn.Module):
    """Reads `fc.weight` beside its layer, in the way of `read`."""

    def __init__(self, read: Callable[[nn.Module, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.read = read
        self.alias: list[Tensor] = []

    def forward(self, x: Tensor, *, flag: bool = False) -> Tensor:
        h = self.drop(self.norm(self.fc(x)))
        if self.read is not None:
            h = h + self.read(self, x).sum()
        return self.head(h)


READS: dict[str, tuple[Callable[[Any, Tensor], Any], set[str]]] = {
    "product": (lambda m, x: x @ m.fc.weight.t(), {"aten::t", "aten::mm"}),
    "linear": (lambda m, x: F.linear(x, m.fc.weight), {"aten::t", "aten::mm"}),
    "data": (lambda m, x: F.linear(x, m.fc.weight.data), {"aten::t", "aten::mm", "aten::detach"}),
    "detach": (lambda m, x: m.fc.weight.detach().abs(), {"aten::detach", "aten::abs"}),
    "view": (lambda m, x: m.fc.weight.view(64) * 2, {"aten::view", "aten::mul"}),
    "rows": (lambda m, x: m.fc.weight[2:4] * 2, {"aten::slice", "aten::mul"}),
    "column": (lambda m, x: m.fc.weight[:, 3] * 2, {"aten::select", "aten::mul"}),
    "cast": (lambda m, x: m.fc.weight.double(), {"aten::_to_copy"}),
    "norm": (lambda m, x: m.fc.weight.norm(), {"aten::linalg_vector_norm"}),
    "alias": (lambda m, x: m.alias[0] * 2, {"aten::mul"}),
    "alias_rows": (lambda m, x: m.alias[1] * 2, {"aten::mul"}),
    "where": (
        lambda m, x: torch.where(torch.ones(8, 8, dtype=torch.bool), m.fc.weight, 0.0),
        {"aten::where"},
    ),
    "functional": (
        lambda m, x: torch.func.functional_call(
            nn.Linear(8, 8), {"weight": m.fc.weight, "bias": m.fc.bias}, (x,)
        ),
        {"aten::t", "aten::addmm"},
    ),
}


def sparse(read: Callable[[Any, Tensor], Any] | None = None) -> nn.Module:
    model = nmfx.sparsify(Net(read), "2:4")
    weight = model.fc.weight.detach()
    model.alias += [weight.view(-1), weight[5:]]
    return model


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_normal_model_is_clean(train: bool, frozen: bool) -> None:
    model = sparse().train(train)
    if frozen:
        nmfx.freeze(model)
    findings = nmfx.verify(model, X, flag=True)
    assert findings == {}
    assert not findings


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_raw_read_is_found(name: str, frozen: bool) -> None:
    read, operators = READS[name]
    model = sparse(read)
    if frozen:
        nmfx.freeze(model)
    findings = nmfx.verify(model, X)
    assert set(findings) == {"fc.weight"}
    assert operators <= findings["fc.weight"], findings


def test_what_only_looks_at_a_weight_is_no_read() -> None:
    model = sparse(lambda m, x: x * m.fc.weight.shape[0] + float(m.fc.weight.dtype.itemsize))
    assert not nmfx.verify(model, X)


def test_reads_of_other_weights_are_not_reported() -> None:
    assert not nmfx.verify(sparse(lambda m, x: m.head.weight.sum() + m.fc.bias.sum()), X)


def test_a_read_in_the_gradient_free_path_only_is_found() -> None:
    def read(m: Any, x: Tensor) -> Tensor:
        return x if torch.is_grad_enabled() else x @ m.fc.weight.t()

    model = sparse(read)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert set(nmfx.verify(model, X)) == {"fc.weight"}
        assert torch.is_grad_enabled()


def test_a_read_in_the_training_path_only_is_found() -> None:
    model = sparse(lambda m, x: m.fc.weight.abs() if torch.is_grad_enabled() else x)
    assert set(nmfx.verify(model, X)) == {"fc.weight"}


def test_the_fused_encoder_path_is_watched() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    nmfx.sparsify(layer, {"linear1": "2:4"})
    x = torch.randn(2, 4, 8)
    assert not nmfx.verify(layer, x)
    layer.__class__ = nn.TransformerEncoderLayer  # without its guard it would read linear1 raw
    assert nmfx.verify(layer, x) == {"linear1.weight": {"aten::_transformer_encoder_layer_fwd"}}


def test_a_read_inside_a_graph_module_is_found() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w)

    gm = nmfx.sparsify(fx.symbolic_trace(Graph()), {"": "2:4"})
    assert not nmfx.verify(gm, X)
    graph = gm.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        raw = graph.call_function(torch.mul, (graph.get_attr("w"), 2.0))
    output.args = ((output.args[0], raw),)
    gm.recompile()
    assert nmfx.verify(gm, X) == {"w": {"aten::mul"}}


def test_a_tie_made_after_sparsify_is_found() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 8)
            self.fc = nn.Linear(8, 8)

        def forward(self, i: Tensor) -> Tensor:
            return self.fc(self.embed(i))

    model = nmfx.sparsify(Tied(), {"fc": "2:4"})
    i = torch.arange(3)
    assert not nmfx.verify(model, i)
    model.fc.weight = model.embed.weight
    assert nmfx.verify(model, i) == {"fc.weight": {"aten::embedding"}}


def test_state_and_randomness_are_as_before() -> None:
    model = sparse().train()
    state = copy.deepcopy(model.state_dict())
    ids = [id(b) for b in model.buffers()]
    random = torch.get_rng_state()
    nmfx.verify(model, X)
    assert torch.equal(torch.get_rng_state(), random)
    assert [id(b) for b in model.buffers()] == ids
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_state_is_restored_when_the_model_raises() -> None:
    class Breaks(Exception):
        pass

    def read(m: Any, x: Tensor) -> Tensor:
        raise Breaks

    model = sparse(read).train()
    before = model.norm.running_mean.clone()
    with pytest.raises(Breaks):
        nmfx.verify(model, X)
    assert torch.equal(model.norm.running_mean, before)
    assert torch.is_grad_enabled()


def test_a_buffer_that_a_forward_replaces_is_restored() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return self.fc(x)

    model = nmfx.sparsify(Counts(), {"fc": "2:4"})
    seen = model.seen
    nmfx.verify(model, X)
    assert model.seen.item() == 0
    assert model.seen is seen, "the buffer is another object"


def test_the_result_is_a_plain_dictionary() -> None:
    findings = nmfx.verify(sparse(READS["product"][0]), X)
    assert type(findings) is dict
    assert findings
    with pytest.raises(KeyError):
        findings["head.weight"]


def test_layers_tied_later_are_read_through_either_mask() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), {"[01]": "2:4"})
    model[1].weight = model[0].weight
    nmfx.freeze(model)
    assert nmfx.verify(model, torch.randn(3, 16)) == {}
