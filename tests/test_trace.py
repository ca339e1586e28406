"""trace: the whole model as one graph, with one visible sr_ste per weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from masked_reference import mask_, sites
from torch import Tensor, fx, nn

import nmfx
from nmfx.ops.keep import keep
from nmfx.ops.linear_nm import linear_nm
from nmfx.ops.sr_ste import sr_ste


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).transpose(1, 2)
        return self.head(self.fc(torch.relu(self.fc(h))))


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class KeywordOnly(Net):
    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


X = torch.linspace(-2, 2, 2 * 4 * 5).reshape(2, 4, 5).sin()


def count(gm: fx.GraphModule, op: Any = sr_ste) -> int:
    names = {sr_ste: "nmfx.sr_ste.default", linear_nm: "nmfx.linear_nm.default"}
    return sum(n.target is op or str(n.target) == names.get(op) for n in gm.graph.nodes)


def masked(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    where = {name: site for name, site in sites(model).items() if not name.startswith("head")}
    mask_(model, where, 2, 4)
    return model


@pytest.mark.parametrize("args", [(), (X,)], ids=["symbolic", "export"])
def test_graph_equals_the_model_and_shows_every_sr_ste(args: tuple[Any, ...]) -> None:
    dense = Net().eval()
    model = nmfx.sparsify(copy.deepcopy(dense), "2:4")
    gm = nmfx.trace(model, *args)
    assert isinstance(gm, fx.GraphModule)
    gm.graph.lint()
    # fc is called twice: each call of a leaf has its node when traced symbolically.
    assert count(gm) == 3, gm.code
    torch.testing.assert_close(gm(X), masked(dense)(X), rtol=0, atol=1e-6)


def test_code_reads_nmfx_sr_ste_with_the_weight_and_m() -> None:
    code = nmfx.trace(nmfx.sparsify(Net(), {"conv": "2:4", "fc": "4:8"})).code
    assert "conv__nmfx_control0 = self.conv._nmfx_control0" in code
    assert "nmfx_sr_ste(conv_weight, conv__nmfx_control0, 4, 1)" in code
    assert "nmfx_sr_ste(fc_weight, fc__nmfx_control0, 8, 1)" in code
    assert "self.head(" in code, "a dense layer stays a call"
    assert "self.norm(" in code


def test_graph_shares_parameters_and_keys() -> None:
    model = nmfx.sparsify(Net(), "2:4")
    gm = nmfx.trace(model)
    assert sorted(gm.state_dict()) == sorted(model.state_dict())
    own = dict(model.named_parameters())
    for name, parameter in gm.named_parameters():
        assert parameter is own[name], name
    gm(X).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in own.items()}
    model.zero_grad()
    model(X).square().sum().backward()
    for name, parameter in own.items():
        torch.testing.assert_close(grads[name], parameter.grad, msg=name)


@pytest.mark.parametrize("train", [False, True])
def test_graph_keeps_the_mode(train: bool) -> None:
    model = nmfx.sparsify(Net(), "2:4").train(train)
    assert nmfx.trace(model).training is train
    assert nmfx.trace(model).norm.training is train


def test_trace_leaves_the_model_alone() -> None:
    model = nmfx.sparsify(Net(), "2:4")
    before = [(type(m), list(m.__dict__)) for m in model.modules()]
    call, getattr_ = nn.Module.__call__, nn.Module.__getattr__
    nmfx.trace(model)
    nmfx.trace(model, X)
    assert [(type(m), list(m.__dict__)) for m in model.modules()] == before
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is getattr_


def test_schedule_of_the_graph_is_that_of_now() -> None:
    model = nmfx.sparsify(Net().eval(), "2:4")
    old = nmfx.trace(model)
    expected = model(X)
    nmfx.set_pattern(model, "1:4")
    assert torch.equal(old(X), expected), "an old graph follows the model"
    assert torch.equal(nmfx.trace(model)(X), model(X))


def test_frozen_and_partly_lowered_layers_are_visible() -> None:
    model = nmfx.sparsify(Net().eval(), "2:4")
    nmfx.freeze(model)
    gm = nmfx.trace(model)
    assert (count(gm), count(gm, keep)) == (0, 3)
    assert torch.equal(gm(X), model(X))
    lowered = nmfx.sparsify(nmfx.lower(model, tune=False), {"head": "2:4"})
    gm = nmfx.trace(lowered)
    assert (count(gm), count(gm, linear_nm)) == (1, 2), gm.code
    assert torch.equal(gm(X), lowered(X))


def test_attention_stays_one_call_when_traced_symbolically() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return self.attention(h, h, h, need_weights=False)[0]

    model = nmfx.sparsify(Attends(), {"?*": "2:4"})
    x = torch.randn(5, 2, 8)
    gm = nmfx.trace(model)
    assert count(gm) == 1
    assert "self.attention(" in gm.code
    assert torch.equal(gm(x), model(x))
    exported = nmfx.trace(model, x)
    assert count(exported) == 3, exported.code
    torch.testing.assert_close(exported(x), model(x))


def test_control_flow_is_an_error_that_names_the_way_out() -> None:
    model = nmfx.sparsify(nn.Sequential(Net()), {"0.fc": "2:4"})
    model[0].__class__ = Branches
    with pytest.raises(nmfx.NMError) as error:
        nmfx.trace(model)
    assert str(error.value) == (
        "Sequential does not trace symbolically (symbolically traced variables cannot be used as "
        "inputs to control flow); give example arguments, nmfx.trace(model, *args), to go through "
        "torch.export"
    )
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module", "a patch was left behind"


def test_keyword_arguments_go_through_export() -> None:
    model = nmfx.sparsify(KeywordOnly().eval(), "2:4")
    gm = nmfx.trace(model, x=X, scale=2.0)
    torch.testing.assert_close(gm(x=X, scale=2.0), model(x=X, scale=2.0))
    assert count(gm) == 3


def test_a_scoped_linear_is_traced_like_any_module() -> None:
    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if self.training else x * 2)

    model = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), Asks(8, 8)), {"?": "2:4"})
    assert [row.capture for row in nmfx.report(model)] == ["leaf", "scoped"]
    gm = nmfx.trace(model)
    assert count(gm) == 2
    x = torch.randn(2, 8)
    assert torch.equal(gm(x), model(x))


def test_a_graph_module_traces() -> None:
    gm = nmfx.sparsify(fx.symbolic_trace(Net()), "2:4").eval()
    again = nmfx.trace(gm)
    assert count(again) == 3
    assert torch.equal(again(X), gm(X))
