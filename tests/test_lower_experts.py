"""Mixtures of experts of `transformers` lowered: what they compute, hold and report."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_timer import PACKED_WINS, install
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Llama4TextConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralModel
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import nmfx
from nmfx.capture import experts as lowered_experts
from nmfx.capture.packed import pack_weight, unpack_weight
from nmfx.mask import nm_project
from nmfx.ops.experts_nm import experts_nm
from nmfx.packing import pack

COUNT, HIDDEN, INNER = 4, 32, 48
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def config(**options: Any) -> MixtralConfig:
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": COUNT,
        "num_experts_per_tok": 2,
        "vocab_size": 50,
    }
    return MixtralConfig(**(sizes | options))


def experts(**options: Any) -> nn.Module:
    made = MixtralExperts(config(**options)).eval()
    made.config._experts_implementation = "grouped_mm"
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.2)
    return made


def routed(tokens: int = 6, per_token: int = 2, count: int = COUNT) -> tuple[Tensor, ...]:
    chosen = torch.rand(tokens, count).topk(per_token).indices
    return torch.randn(tokens, HIDDEN), chosen, torch.rand(tokens, per_token)


def lowered(module: nn.Module, rules: Any = "2:4") -> tuple[nn.Module, nn.Module]:
    """(lowered, folded)."""
    sparse = nmfx.sparsify(module, rules)
    return nmfx.lower(sparse, tune=False), nmfx.fold(sparse)


def states(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.state for row in nmfx.report(model)}


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.reason for row in nmfx.report(model)}


# --- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("rules", ["2:4", "1:4", "1:16"])
def test_the_outputs_are_those_of_the_folded_one(implementation: str, rules: str) -> None:
    fast, folded = lowered(experts(), rules)
    assert states(fast) == {"gate_up_proj": "packed", "down_proj": "packed"}
    for module in (fast, folded):
        module.config._experts_implementation = implementation
    for tokens in (1, 2, 6, 40):
        call = routed(tokens)
        torch.testing.assert_close(fast(*call), folded(*call), **CLOSE)


@given(tokens=st.integers(1, 12), count=st.integers(1, 6), per_token=st.integers(1, 3))
def test_any_routing(tokens: int, count: int, per_token: int) -> None:
    fast, folded = lowered(experts(num_local_experts=count), "1:4")
    call = routed(tokens, min(per_token, count), count)
    torch.testing.assert_close(fast(*call), folded(*call), **CLOSE)


def test_experts_without_a_gate() -> None:
    made = NemotronHExperts(
        NemotronHConfig(
            hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=COUNT, vocab_size=8
        )
    ).eval()
    made.config._experts_implementation = "grouped_mm"
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.2)
    fast, folded = lowered(made)
    assert states(fast) == {"up_proj": "packed", "down_proj": "packed"}
    call = routed()
    torch.testing.assert_close(fast(*call), folded(*call), **CLOSE)


@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
def test_one_weight_alone(only: str) -> None:
    made = experts()
    assert {name: tuple(w.shape[1:]) for name, w in made.named_parameters()} == {
        "gate_up_proj": (2 * INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    other = "down_proj" if only == "gate_up_proj" else "gate_up_proj"
    with torch.no_grad():  # a weight that no pattern holds for stays dense
        getattr(made, only).copy_(nm_project(getattr(made, only), "2:4", 2))
    fast = nmfx.lower(made, tune=False)
    assert states(fast) == {only: "packed", other: "dense"}
    call = routed()
    torch.testing.assert_close(fast(*call), made(*call), **CLOSE)


def test_bfloat16_and_autocast() -> None:
    fast, folded = lowered(experts())
    call = routed()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(*call), folded(*call), rtol=0.05, atol=0.05)
    fast, folded = lowered(experts().bfloat16())
    call = (call[0].bfloat16(), call[1], call[2].bfloat16())
    torch.testing.assert_close(fast(*call), folded(*call), rtol=0.05, atol=0.05)


def test_gradients_reach_the_input_and_the_routing() -> None:
    fast, folded = lowered(experts())
    x, chosen, weights = routed()
    grads = []
    for module in (fast, folded):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        module(leaves[0], chosen, leaves[1]).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# --- the operator -------------------------------------------------------------------------------


def test_the_operator_passes_torchs_checks() -> None:
    weight = nm_project(torch.randn(3 * 16, 8, dtype=torch.float64), "2:4")
    values, index = pack(weight, "2:4")
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    op = torch.ops.nmfx.experts_nm.default
    torch.library.opcheck(op, (x, values, index, offsets, 16, 8, 2, 4))
    expected = torch.cat([x[:2] @ weight[:16].t(), x[2:5] @ weight[32:].t(), x.new_zeros(1, 16)])
    torch.testing.assert_close(op(x, values, index, offsets, 16, 8, 2, 4), expected)

    def run(x: Tensor) -> Tensor:
        return experts_nm(x, values, index, offsets, 16, 8, 2, 4)

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_the_operator_refuses_what_does_not_fit() -> None:
    values, index = pack(nm_project(torch.randn(32, 8), "2:4"), "2:4")
    offsets = torch.tensor([1, 2])
    with pytest.raises(nmfx.NMError, match="experts take"):
        experts_nm(torch.randn(2, 4), values, index, offsets, 16, 8, 2, 4)
    with pytest.raises(nmfx.NMError, match="gradient"):
        experts_nm(torch.randn(2, 8), values.requires_grad_(), index, offsets, 16, 8, 2, 4)


# --- whole models -------------------------------------------------------------------------------


def mixtral() -> tuple[nn.Module, dict[str, Tensor]]:
    return MixtralModel(config()).eval(), {"input_ids": torch.arange(14).view(2, 7)}


def test_a_model_is_lowered_with_its_experts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = install(monkeypatch, PACKED_WINS)
    dense, call = mixtral()
    sparse = nmfx.sparsify(copy.deepcopy(dense), {"*": "2:4"})
    fast, folded = nmfx.lower(sparse, call), nmfx.fold(sparse)
    mixtures = {row.fqn: row for row in nmfx.report(fast) if row.kind == "experts"}
    assert {row.state for row in mixtures.values()} == {"packed"}
    assert len(mixtures) == 4
    assert all(row.rows for row in mixtures.values()), "what was timed is not reported"
    assert all(rows & (rows - 1) == 0 for row in mixtures.values() for rows in row.rows)
    assert fake.asked
    with torch.no_grad():
        expected, found = folded(**call)[0], fast(**call)[0]
        torch.testing.assert_close(found, expected, **CLOSE)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**call)[0], expected, **CLOSE)
        nmfx.save(fast, tmp_path / "fast.safetensors")
        loaded = nmfx.load(tmp_path / "fast.safetensors", into=dense)
        assert torch.equal(loaded(**call)[0], found)
        assert states(loaded) == states(fast)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(twin(**call)[0], found)
            assert states(twin) == states(fast)
    again = nmfx.fold(fast)
    assert list(again.state_dict()) == list(folded.state_dict())
    for name, tensor in folded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert [type(m) for m in again.modules()] == [type(m) for m in folded.modules()]


def test_preview_times_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS)
    dense, call = mixtral()
    before = [len(m._forward_pre_hooks) for m in dense.modules()]
    rows = {row.fqn: row for row in nmfx.preview(dense, "2:4", call)}
    assert rows["layers.1.mlp.experts.down_proj"].state == "would pack"
    assert rows["layers.1.mlp.experts.down_proj"].rows
    assert [len(m._forward_pre_hooks) for m in dense.modules()] == before


def test_the_dense_weight_can_be_read() -> None:
    fast, folded = lowered(experts())
    assert not list(fast.named_parameters())
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(fast, name), getattr(folded, name))
        with pytest.raises(nmfx.NMError):
            getattr(fast, name).mul_(2)


# --- what is left alone -------------------------------------------------------------------------


def transposed() -> nn.Module:
    from transformers import GptOssConfig

    made = GptOssExperts(
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT)
    )
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.2)
    return made.eval()


class Own(MixtralExperts):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


def own() -> nn.Module:
    made = Own(config()).eval()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.2)
    return made


LEFT = {
    "transposed": (transposed, "GptOssExperts does not hold it as (experts, out, in)"),
    "subclass": (own, "Own has a forward of its own"),
    "narrow": (
        lambda: experts(hidden_size=36, intermediate_size=36),
        "its 72 outputs per expert do not fill packed blocks of 16",
    ),
}


class Routed(nn.Module):
    """Experts that get their rows sorted, and no routing."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Llama4TextExperts(
            Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT)
        )
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


def test_mixtures_without_a_routing_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS)
    model, x = Routed().eval(), torch.randn(COUNT * 3, HIDDEN)
    rows = {row.fqn: row for row in nmfx.preview(model, {"*": "2:4"}, (x,))}
    assert {row.state for row in rows.values()} == {"dense"}
    sparse = nmfx.sparsify(model, {"*": "2:4"})
    fast = nmfx.lower(sparse, (x,))
    assert reasons(fast)["experts.down_proj"].startswith("Llama4TextExperts has a forward")
    torch.testing.assert_close(fast(x), nmfx.fold(sparse)(x))


def test_a_stack_is_packed_one_matrix_after_another() -> None:
    weight = nm_project(torch.randn(3, 32, 8), "2:4", 2)
    for found, expected in zip(
        pack_weight(weight, 2, 1, nmfx.Pattern(2, 4)),
        pack(weight.flatten(0, 1), "2:4"),
        strict=True,
    ):
        assert torch.equal(found, expected)
    odd = nm_project(torch.randn(3, 5, 8), "2:4", 2)  # blocks hold rows of several
    assert torch.equal(
        unpack_weight(
            *pack_weight(odd, 2, 1, nmfx.Pattern(2, 4)), (3, 5, 8), 2, 1, nmfx.Pattern(2, 4)
        ),
        odd,
    )


@pytest.mark.parametrize("case", LEFT)
def test_others_stay_dense_with_the_reason(case: str) -> None:
    make, reason = LEFT[case]
    fast, _ = lowered(make())
    assert set(states(fast).values()) == {"dense"}
    assert next(iter(reasons(fast).values())) == f"{reason}; folded"
    assert not type(fast).__name__.startswith("NM")


def test_another_transformers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered_experts, "_HELPER", "_another_helper")
    fast, _ = lowered(experts())
    assert "in a way that nmfx does not know" in reasons(fast)["down_proj"]


def test_an_implementation_of_the_users_own_is_left_alone() -> None:
    made = experts()
    made.config._experts_implementation = "mine"
    fast, _ = lowered(made)
    assert "experts_implementation='mine' is none of" in reasons(fast)["down_proj"]


def test_preview_of_lowered_experts_and_float32_inputs() -> None:
    fast, folded = lowered(experts().bfloat16())
    call = routed()
    rows = nmfx.preview(fast, "2:4", (call[0].bfloat16(), *call[1:]))
    assert {row.reason for row in rows} == {"it is lowered already"}
    torch.testing.assert_close(fast(*call), folded(*call), rtol=0.05, atol=0.05)
