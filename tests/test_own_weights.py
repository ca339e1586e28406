"""Modules that multiply with their own weights: recurrent, bilinear, mixtures of experts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked_reference import mask_, nm_mask, sites
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from zoo import outputs, probe_loss

import nmfx

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

X = (5, 3, 8)  # steps, batch, features
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "use_cache": False,
}

# name -> (module, shapes of its inputs)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "lstm": (lambda: nn.LSTM(8, 12), (X,)),
    "lstm_deep": (lambda: nn.LSTM(8, 12, num_layers=2, bidirectional=True), (X,)),
    "lstm_projected": (lambda: nn.LSTM(8, 12, proj_size=4, batch_first=True), (X,)),
    "lstm_no_bias": (lambda: nn.LSTM(8, 12, bias=False), (X,)),
    "lstm_state": (lambda: nn.LSTM(8, 12), (X, (1, 3, 12))),
    "lstm_double": (lambda: nn.LSTM(8, 12).double(), (X,)),
    "gru": (lambda: nn.GRU(8, 12, num_layers=2), (X,)),
    "rnn": (lambda: nn.RNN(8, 12, nonlinearity="relu"), (X,)),
    "lstm_cell": (lambda: nn.LSTMCell(8, 12), (X[1:],)),
    "gru_cell": (lambda: nn.GRUCell(8, 12), (X[1:], (3, 12))),
    "rnn_cell": (lambda: nn.RNNCell(8, 12), (X[1:],)),
    "bilinear": (lambda: nn.Bilinear(6, 8, 5), ((3, 6), (3, 8))),
}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    make, shapes = MODULES[name]
    module = make()
    dtype = next(module.parameters()).dtype
    inputs: tuple[Any, ...] = tuple(torch.randn(shape, dtype=dtype) for shape in shapes)
    if name == "lstm_state":
        inputs = inputs[0], (inputs[1], inputs[1].flip(0))
    return module, inputs


def masked(module: nn.Module, n: int, m: int) -> nn.Module:
    module = copy.deepcopy(module)
    mask_(module, sites(module), n, m)
    return module


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4)])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_outputs_equal_those_of_the_masked_module(
    name: str, grad: bool, pattern: tuple[int, int]
) -> None:
    dense, inputs = build(name)
    reference = masked(dense, *pattern)
    module = nmfx.sparsify(copy.deepcopy(dense), pattern)
    assert {row.state for row in nmfx.report(module)} == {"sparse"}
    with torch.set_grad_enabled(grad):
        for actual, wanted in zip(
            outputs(module(*inputs)), outputs(reference(*inputs)), strict=True
        ):
            assert torch.equal(actual, wanted)
    assert not nmfx.verify(module, *inputs)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_straight_through_plus_decay(name: str) -> None:
    dense, inputs = build(name)
    reference = masked(dense, 2, 4)
    module = nmfx.sparsify(copy.deepcopy(dense), "2:4", lambda_w=0.25)
    for one in (module, reference):
        probe_loss(one(*inputs)).backward()
    where = sites(dense)
    assert set(nmfx.masks(module)) == set(where)
    for path, parameter in module.named_parameters():
        wanted = reference.get_parameter(path).grad
        if path in where:
            raw = dense.get_parameter(path)
            wanted = wanted + 0.25 * torch.where(nm_mask(raw, 2, 4, where[path].dim), 0.0, raw)
        assert torch.equal(parameter.grad, wanted), path


@pytest.mark.parametrize("name", MODULES)
def test_verbs_and_copies(name: str) -> None:
    dense, inputs = build(name)
    reference, keys = masked(dense, 2, 4), list(dense.state_dict())
    wanted = outputs(reference(*inputs))

    def same(module: nn.Module) -> bool:
        return all(map(torch.equal, outputs(module(*inputs)), wanted))

    module = nmfx.sparsify(copy.deepcopy(dense), "2:4")
    assert list(module.state_dict()) == keys
    assert same(copy.deepcopy(module))
    assert same(pickle.loads(pickle.dumps(module)))
    nmfx.freeze(module)
    assert same(module)
    nmfx.unfreeze(module)
    folded = nmfx.fold(module)
    assert type(folded) is type(dense)
    assert same(folded)
    nmfx.unsparsify(module)
    assert type(module) is type(dense)
    assert all(map(torch.equal, outputs(module(*inputs)), outputs(dense(*inputs))))


def test_a_recurrent_layer_sees_its_weights_as_they_are_now() -> None:
    """Its list of flat weights must not keep those of an earlier call."""
    module, inputs = build("lstm")
    nmfx.sparsify(module, "2:4")
    before = module(*inputs)[0]
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    assert not torch.equal(module(*inputs)[0], before)
    given = {"weight_hh_l0": torch.zeros_like(module.weight_hh_l0)}
    called = torch.func.functional_call(module, given, inputs)[0]
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    assert torch.equal(module(*inputs)[0], called)


@pytest.mark.parametrize("name", ["lstm", "gru_cell", "bilinear"])
def test_compiled_equals_eager(name: str) -> None:
    module, inputs = build(name)
    nmfx.sparsify(module, "2:4")
    compiled = torch.compile(module, backend="aot_eager")
    for actual, wanted in zip(outputs(compiled(*inputs)), outputs(module(*inputs)), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("name", ["lstm", "bilinear"])
def test_exported_equals_eager(name: str) -> None:
    module, inputs = build(name)
    nmfx.sparsify(module, "2:4")
    exported = torch.export.export(module, inputs).module()
    for actual, wanted in zip(outputs(exported(*inputs)), outputs(module(*inputs)), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_size_that_m_does_not_divide_stays_dense() -> None:
    module = nmfx.sparsify(nn.LSTM(6, 12), "2:4")
    (ih, hh) = nmfx.report(module)
    assert (ih.state, hh.state) == ("dense", "sparse")
    assert ih.reason == (
        "the axis it sums over=6 is not a multiple of 4, so 2:4 groups would straddle gates"
    )


# --- experts -----------------------------------------------------------------------------------


def mixture(kind: str, experts: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "mixtral":
        model: nn.Module = MixtralForCausalLM(MixtralConfig(**SMALL))
    else:  # (experts, in, out), with biases
        model = GptOssForCausalLM(GptOssConfig(head_dim=8, num_experts_per_tok=2, **SMALL))
    model.set_experts_implementation(experts)
    return model, torch.randint(3, 32, (2, 6))


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_equal_the_masked_ones(kind: str, experts: str) -> None:
    dense, ids = mixture(kind, experts)
    names = [name for name, p in dense.named_parameters() if p.ndim == 3]
    assert len(names) == 2
    where = {name: site for name, site in sites(dense).items() if name in names}
    reference = copy.deepcopy(dense)
    reference_where = {n: s for n, s in sites(reference).items() if n in names}
    pruned = mask_(reference, reference_where, 2, 4)
    model = nmfx.sparsify(copy.deepcopy(dense), {"*.experts": "2:4"}, lambda_w=0.25)
    assert set(nmfx.masks(model)) == set(names)
    for one in (model, reference):
        probe_loss(one(ids).logits).backward()
    assert torch.equal(model(ids).logits, reference(ids).logits)
    for name in where:
        wanted = reference.get_parameter(name).grad + 0.25 * pruned[name]
        torch.testing.assert_close(model.get_parameter(name).grad, wanted)
    assert not nmfx.verify(model, ids)
    folded = nmfx.fold(model)
    assert torch.equal(folded(ids).logits, reference(ids).logits)


class UnknownExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.up)


def test_experts_of_unknown_layout_stay_dense_and_are_listed() -> None:
    model = nmfx.sparsify(nn.Sequential(UnknownExperts(), nn.Linear(8, 8), nn.Linear(8, 8)), "2:4")
    row = next(iter(nmfx.report(model)))
    assert (row.fqn, row.kind, row.state) == ("0.up", "experts", "dense")
    assert row.reason == "nmfx does not know which dimension UnknownExperts sums over"


class StackedExperts(nn.Module):
    """Matrices as (experts, in, out), with a bias for each expert."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 8))
        self.up_bias = nn.Parameter(torch.randn(4, 8, 8))
        self.shift = nn.Parameter(torch.randn(4, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(4, -1, -1), self.up) + self.shift


def test_biases_of_experts_are_no_matrices() -> None:
    model = nmfx.sparsify(nn.Sequential(StackedExperts()), {"0": "2:4"})
    assert [row.fqn for row in nmfx.report(model)] == ["0.up"]
    folded = nmfx.fold(model)[0]
    assert nmfx.is_nm(folded.up, "2:4", 1)
    assert folded.shift.count_nonzero() == folded.shift.numel()


class Flagged(nn.Conv1d):
    is_transposed = False


class FlaggedLinear(nn.Linear):
    is_transposed = False

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.ones(1, 8, 8))


def test_a_conv_with_the_flag_of_experts_is_a_conv() -> None:
    """Else it would be masked along its kernel."""
    layers = Flagged(8, 8, 4), nn.Flatten(), FlaggedLinear(), nn.Linear(8, 8)
    model = nmfx.sparsify(nn.Sequential(*layers), "2:4")
    rows = [(row.fqn, row.kind, row.state) for row in nmfx.report(model)]
    assert rows[:2] == [("0.weight", "conv", "sparse"), ("2.weight", "linear", "sparse")]
    assert nmfx.is_nm(nmfx.fold(model)[0].weight, "2:4", 1)
