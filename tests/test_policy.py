"""Which layers a call reaches: rules, the default policy, and the reasons of what stays dense."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm

import nmfx
from nmfx.policy import Rule

HEAD = "the output layer stays dense by default; name it in a rule to include it"


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def patterns(model: nn.Module, rules: Any) -> dict[str, str | None]:
    """Sparsifies; module name -> pattern."""
    nmfx.sparsify(model, rules)
    return {
        row.fqn.rpartition(".")[0]: None if row.pattern is None else row.pattern.text
        for row in nmfx.report(model)
    }


def reasons(model: nn.Module) -> dict[str, str]:
    """Parameter name -> reason, for dense rows."""
    return {row.fqn: row.reason for row in nmfx.report(model) if row.state == "dense"}


BLOCKS = ("blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2")


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("2:4", ["2:4"] * 4 + [None]),
        ((1, 4), ["1:4"] * 4 + [None]),
        (nmfx.Pattern(4, 8), ["4:8"] * 4 + [None]),
        ({"*": "2:4"}, ["2:4"] * 4 + [None]),
        ({"**": "2:4"}, ["2:4"] * 5),
        ({"?*": "2:4"}, ["2:4"] * 5),
        ({"*": "2:4", "head": "1:4"}, ["2:4"] * 4 + [None]),
        ({"head": "1:4", "*": "2:4"}, ["2:4"] * 4 + ["1:4"]),
        ({"head": "1:4"}, [None] * 4 + ["1:4"]),
        ({"h*": "1:4"}, [None] * 4 + ["1:4"]),
        ({"*.fc1": "1:4", "*": "2:4"}, ["1:4", "2:4", "1:4", "2:4", None]),
        ({"blocks.0.*": None, "*": "2:4"}, [None, None, "2:4", "2:4", None]),
        ({"*": "2:4", "blocks.0.*": None}, ["2:4"] * 4 + [None]),
        ({"blocks.[0]*": "2:4"}, ["2:4", "2:4", None, None, None]),
        ({"blocks.?.fc2": "2:8"}, [None, "2:8", None, "2:8", None]),
        ({"blocks.0.fc1": "2:4"}, ["2:4", None, None, None, None]),
        ({"blocks.*": "4:8", "head": (2, 4)}, ["4:8"] * 4 + ["2:4"]),
    ],
    ids=str,
)
def test_the_first_matching_rule_decides(rules: Any, expected: list[str | None]) -> None:
    assert list(patterns(Net(), rules).items()) == list(
        zip([*BLOCKS, "head"], expected, strict=True)
    )


def test_reasons_name_the_rule_or_its_absence() -> None:
    model = nmfx.sparsify(Net(), {"blocks.0.fc1": None, "blocks.0.*": "2:4", "head": None})
    assert reasons(model) == {
        "blocks.0.fc1.weight": "kept dense by rule 'blocks.0.fc1'",
        "blocks.1.fc1.weight": "no rule matches",
        "blocks.1.fc2.weight": "no rule matches",
        "head.weight": "kept dense by rule 'head'",
    }


def test_globs_are_case_sensitive_and_match_whole_names() -> None:
    rule = Rule("blocks.*.fc1", None)
    assert rule.matches("blocks.0.fc1")
    assert not rule.matches("blocks.0.FC1")
    assert not rule.matches("xblocks.0.fc1")
    assert not rule.matches("blocks.0.fc1.weight")
    assert rule.matches("blocks.0.deep.fc1"), "a star crosses dots"
    assert not rule.exact
    assert Rule("head", None).exact
    assert Rule("*", None).default
    assert not Rule("**", None).default


# --- the head ----------------------------------------------------------------------------------


class HuggingFace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 8)
        self.body = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head


class NoOutputEmbeddings(HuggingFace):
    def get_output_embeddings(self) -> None:
        return None


class Refuses(HuggingFace):
    def get_output_embeddings(self) -> None:
        raise NotImplementedError


class Timm(HuggingFace):
    def get_output_embeddings(self) -> None:
        return None

    def get_classifier(self) -> nn.Module:
        return self.body


class TimmTwo(Timm):
    def get_classifier(self) -> Any:
        return self.body, self.last


class TimmConv(Timm):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(8, 8, 1)


class TimmIdentity(Timm):
    def get_classifier(self) -> nn.Module:
        return nn.Identity()


@pytest.mark.parametrize(
    ("cls", "heads"),
    [
        (HuggingFace, ["lm_head.weight"]),
        (NoOutputEmbeddings, ["last.weight"]),
        (Refuses, ["last.weight"]),
        (Timm, ["body.weight"]),
        (TimmTwo, ["body.weight", "last.weight"]),
        (TimmConv, ["body.weight"]),
        (TimmIdentity, []),
    ],
)
def test_declared_heads_stay_dense(cls: type[nn.Module], heads: list[str]) -> None:
    model = nmfx.sparsify(cls(), "2:4")
    assert reasons(model) == dict.fromkeys(heads, HEAD)
    model = nmfx.sparsify(cls(), {"?*": "2:4"})
    assert reasons(model) == {}, "a rule that matches the head includes it"


def test_a_lone_layer_is_no_head() -> None:
    assert patterns(nn.Linear(8, 8), "2:4") == {"": "2:4"}
    assert patterns(nn.Sequential(nn.Linear(8, 8)), "2:4") == {"0": "2:4"}
    assert patterns(nn.Sequential(nn.Conv2d(8, 8, 1)), "2:4") == {"0": "2:4"}


def test_a_conv_network_without_linear_has_no_head() -> None:
    assert patterns(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), "2:4") == {
        "0": "2:4",
        "1": "2:4",
    }


def test_the_only_linear_after_convs_is_the_head() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 8))
    assert patterns(model, "2:4") == {"0": "2:4", "2": None}


def test_the_projection_of_a_last_attention_is_no_head() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    nmfx.sparsify(model, "2:4")
    assert reasons(model) == {"1.weight": HEAD}


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_a_scoped_last_linear_is_the_head() -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Branches(8, 8)), "2:4")
    assert reasons(model) == {"2.weight": HEAD}


def test_the_root_module_is_named_by_the_empty_string() -> None:
    assert patterns(nn.Linear(8, 8), {"": "1:4"}) == {"": "1:4"}
    assert patterns(nn.MultiheadAttention(8, 2), {"": "1:4"}) == {"": "1:4", "out_proj": None}


def test_attention_projections_have_their_own_names() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=12, vdim=16)})
    nmfx.sparsify(model, {"attn.out_proj": None, "attn": "2:4"})
    rows = {row.fqn: row.state for row in nmfx.report(model)}
    assert rows == {
        "attn.q_proj_weight": "sparse",
        "attn.k_proj_weight": "sparse",
        "attn.v_proj_weight": "sparse",
        "attn.out_proj.weight": "dense",
    }


def test_attention_takes_what_its_sizes_allow() -> None:
    model = nmfx.sparsify(nn.MultiheadAttention(8, 2, kdim=6, vdim=16), "2:4")
    assert reasons(model) == {
        "k_proj_weight": "in_features=6 is not a multiple of 4, so 2:4 groups would straddle rows"
    }


# --- what stays dense, and why -----------------------------------------------------------------


class Identity(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


class Wrapped(torch.Tensor):
    """A tensor subclass around another tensor, as quantization libraries make them."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=torch.float32, requires_grad=False
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: Any, size: Any, stride: Any
    ) -> Wrapped:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [a.inner if isinstance(a, Wrapped) else a for a in args]
        return Wrapped(func(*args, **(kwargs or {})))


def parametrized() -> nn.Module:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Identity())
    return layer


def with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def replaced_forward() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)


def weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return old_weight_norm(nn.Linear(8, 8))


def spectral_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.nn.utils.spectral_norm(nn.Linear(8, 8))


def computed() -> nn.Module:
    layer = nn.Linear(8, 8)
    weight = layer.weight
    del layer.weight
    layer.weight = weight.detach() * 2  # a plain attribute
    return layer


PARAMETRIZED = (
    "its weight is parametrized (torch.nn.utils.parametrize); remove_parametrizations makes it a "
    "parameter again"
)
DEPTHWISE = "depthwise: each filter reads a single channel"

OBSTACLES: dict[str, tuple[Any, str]] = {
    "axis": (
        lambda: nn.Linear(6, 8),
        "in_features=6 is not a multiple of 4, so 2:4 groups would straddle rows",
    ),
    "stem": (
        lambda: nn.Conv2d(3, 8, 3),
        "in_channels/groups=3 is not a multiple of 4, so 2:4 groups would straddle kernel "
        "positions",
    ),
    "groups": (
        lambda: nn.Conv2d(12, 12, 3, groups=2),
        "in_channels/groups=6 is not a multiple of 4, so 2:4 groups would straddle kernel "
        "positions",
    ),
    "transposed_groups": (
        lambda: nn.ConvTranspose2d(12, 12, 3, groups=2),
        "in_channels/groups=6 is not a multiple of 4, so 2:4 groups would straddle channel groups",
    ),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), DEPTHWISE),
    "depthwise_multiplier": (lambda: nn.Conv1d(8, 16, 3, groups=8), DEPTHWISE),
    "depthwise_transposed": (lambda: nn.ConvTranspose2d(8, 8, 3, groups=8), DEPTHWISE),
    "parametrized": (parametrized, PARAMETRIZED),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), PARAMETRIZED),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), PARAMETRIZED),
    "old_weight_norm": (
        weight_normed,
        "its weight is computed by torch.nn.utils.weight_norm; remove_weight_norm makes it a "
        "parameter again",
    ),
    "old_spectral_norm": (
        spectral_normed,
        "its weight is computed by torch.nn.utils.spectral_norm; remove_spectral_norm makes it a "
        "parameter again",
    ),
    "prune": (
        pruned,
        "its weight is computed by torch.nn.utils.prune; prune.remove makes it a parameter again",
    ),
    "computed": (computed, "its weight is not a parameter but computed"),
    "lazy": (
        lambda: nn.LazyLinear(8),
        "its weight is lazy: run one forward to give it a shape",
    ),
    "lazy_conv": (
        lambda: nn.LazyConv2d(8, 3),
        "its weight is lazy: run one forward to give it a shape",
    ),
    "integer": (
        lambda: with_weight(torch.zeros(8, 8, dtype=torch.int8)),
        "its weight is torch.int8, which has no N:M order here (integer or quantized)",
    ),
    "float8": (
        lambda: nn.Linear(8, 8).to(torch.float8_e4m3fn),
        "its weight is torch.float8_e4m3fn, which has no N:M order here (integer or quantized)",
    ),
    "wrapper": (
        lambda: with_weight(Wrapped(torch.randn(8, 8))),
        "its weight is a Wrapped (quantized or otherwise wrapped)",
    ),
    "forward": (
        replaced_forward,
        "its forward was replaced on the instance, which a rewritten class would not run",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_is_skipped_and_reported(name: str) -> None:
    build, reason = OBSTACLES[name]
    model = nn.ModuleDict({"odd": build(), "fc": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    before = type(model["odd"]), list(model["odd"].__dict__)
    nmfx.sparsify(model, "2:4")
    assert reasons(model) == {"odd.weight": reason, "head.weight": HEAD}
    assert type(model["odd"]) is before[0]
    nmfx.unsparsify(model)
    assert list(model["odd"].__dict__) == before[1]


@pytest.mark.parametrize("name", OBSTACLES)
def test_naming_an_obstacle_is_an_error(name: str) -> None:
    build, reason = OBSTACLES[name]
    model = nn.ModuleDict({"odd": build(), "fc": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    with pytest.raises(nmfx.NMError) as error:
        nmfx.sparsify(model, {"odd": "2:4", "*": "2:4"})
    assert str(error.value) == f"odd: {reason}; skip it with {{'odd': None}}"
    assert type(model["fc"]) is nn.Linear
    assert patterns(model, {"odd": None, "*": "2:4"})["fc"] == "2:4"


def test_the_leftovers_of_prune_can_be_sparsified() -> None:
    layer = pruned()
    prune.remove(layer, "weight")
    assert patterns(layer, "2:4") == {"": "2:4"}


def test_a_lazy_layer_can_be_sparsified_after_its_first_forward() -> None:
    layer = nn.LazyLinear(8)
    layer(torch.randn(2, 8))
    assert patterns(layer, "2:4") == {"": "2:4"}


def test_tied_weights_stay_dense_with_their_partners_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.fc = nn.Linear(8, 8)
            self.a = nn.Linear(8, 8)
            self.b = nn.Linear(8, 8)
            self.out = nn.Linear(8, 16, bias=False)
            self.a.weight = self.b.weight
            self.out.weight = self.embed.weight

    model = nmfx.sparsify(Tied(), {"?*": "2:4"})
    assert reasons(model) == {
        "a.weight": "its weight is tied to b.weight",
        "b.weight": "its weight is tied to a.weight",
        "out.weight": "its weight is tied to embed.weight",
    }
    with pytest.raises(nmfx.NMError, match=r"its weight is tied to a\.weight; skip"):
        nmfx.sparsify(Tied(), {"b": "2:4"})


def test_one_module_in_two_places_is_not_tied() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 4))
    assert patterns(model, "2:4") == {"0": "2:4", "3": None}
    assert len(nmfx.masks(model)) == 1


def test_recurrent_and_bilinear_rows_are_listed() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(8, 8),
            "gru": nn.GRUCell(8, 8),
            "bilinear": nn.Bilinear(8, 8, 4),
            "fc": nn.Linear(8, 8),
            "head": nn.Linear(8, 8),
        }
    )
    nmfx.sparsify(model, "2:4")
    rows = [(row.fqn, row.kind, row.shape, row.state) for row in nmfx.report(model)][:-2]
    assert rows == [
        ("lstm.weight_ih_l0", "recurrent", (32, 8), "sparse"),
        ("lstm.weight_hh_l0", "recurrent", (32, 8), "sparse"),
        ("gru.weight_ih", "recurrent", (24, 8), "sparse"),
        ("gru.weight_hh", "recurrent", (24, 8), "sparse"),
        ("bilinear.weight", "bilinear", (4, 8, 8), "sparse"),
    ]


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated, and says so
def test_dynamically_quantized_layers_have_one_row_each() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    quantized = quantize_dynamic(model, {"0", "2"})
    nmfx.sparsify(quantized, {"1": "2:4", "*": "2:4"})
    reason = "torch.ao.nn.quantized.dynamic.modules.linear.Linear holds a quantized weight"
    assert reasons(quantized) == {"0.weight": reason, "2.weight": reason}
    with pytest.raises(nmfx.NMError, match=r"holds a quantized weight; skip"):
        nmfx.sparsify(quantized, {"0": "2:4"})


def test_n_equal_to_m_is_the_identity() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    expected = layer(x)
    nmfx.sparsify(layer, "4:4")
    assert torch.equal(layer(x), expected)
    layer(x).square().sum().backward()
    assert nmfx.masks(layer)["weight"].all()


def test_none_for_a_container_is_refused_because_it_would_leave_out_nothing() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8)), "table": nn.Embedding(8, 8)})
    with pytest.raises(nmfx.NMError) as error:
        nmfx.sparsify(model, {"body": None, "*": "2:4"})
    assert str(error.value) == (
        "rule 'body' names a Sequential, which is no linear or conv layer; for all layers below it "
        "write 'body.*'"
    )
    nmfx.sparsify(model, {"table": None, "*": "2:4"})  # nothing below it: what it says is true
    assert [row.state for row in nmfx.report(model)] == ["sparse"]


def test_rules_for_a_compiled_model_are_told_of_its_prefix() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(nmfx.NMError, match=r"torch.compile puts '_orig_mod.' before all names"):
        nmfx.sparsify(model, {"0": "2:4"})
