"""Scoped capture: attention modules and the parents that read weights around their children."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from masked_reference import mask_, nm_mask, sites
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nmfx

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

# torch.matmul multiplies in another way when its weight needs no gradient: same sums, other order.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "kdim_vdim": {"kdim": 12, "vdim": 16},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "no_bias": {"bias": False},
    "dropout": {"dropout": 0.5, "batch_first": True},
    "double": {"dtype": torch.float64},
}


def masked(module: nn.Module, n: int = 2, m: int = 4, skip: Any = ()) -> nn.Module:
    """A dense copy with zeros in the pruned places, by the independent reference."""
    module = copy.deepcopy(module)
    mask_(module, {name: s for name, s in sites(module).items() if name not in skip}, n, m)
    return module


def qkv(options: dict[str, Any], *, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = options.get("dtype", torch.float32)
    if same and not {"kdim", "vdim"} & options.keys():
        x = torch.randn(3, 5, 8, dtype=dtype)
        return x, x, x
    sizes = 8, options.get("kdim", 8), options.get("vdim", 8)
    q, k, v = (torch.randn(3, 5, size, dtype=dtype) for size in sizes)
    return q, k, v


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_equals_the_masked_one(variant: str, train: bool, grad: bool) -> None:
    options = VARIANTS[variant]
    dense = nn.MultiheadAttention(8, 2, **options).train(train)
    reference, module = masked(dense), nmfx.sparsify(copy.deepcopy(dense), "2:4")
    for same, weights, average in itertools.product((True, False), repeat=3):
        inputs = qkv(options, same=same)
        extra: dict[str, Any] = {"need_weights": weights, "average_attn_weights": average}
        with torch.set_grad_enabled(grad):
            torch.manual_seed(1)
            expected = reference(*inputs, **extra)
            torch.manual_seed(1)
            actual = module(*inputs, **extra)
        torch.testing.assert_close(actual[0], expected[0], **CLOSE)
        assert (actual[1] is None) == (expected[1] is None) == (not weights)
        if weights:
            torch.testing.assert_close(actual[1], expected[1], **CLOSE)


@pytest.mark.parametrize("variant", ["plain", "batch_first", "kdim_vdim"])
def test_attention_gradients_are_straight_through_plus_decay(variant: str) -> None:
    options = VARIANTS[variant]
    dense = nn.MultiheadAttention(8, 2, **options)
    reference, module = masked(dense), nmfx.sparsify(copy.deepcopy(dense), "2:4", lambda_w=0.25)
    inputs = qkv(options, same=True)
    for attention in (reference, module):
        attention(*inputs)[0].square().sum().backward()
    covered = set()
    for name, parameter in module.named_parameters():
        expected = reference.get_parameter(name).grad
        if name.endswith("weight"):
            raw = dense.get_parameter(name)
            expected = expected + 0.25 * torch.where(nm_mask(raw, 2, 4, 1), 0.0, raw)
            covered.add(name)
        assert torch.equal(parameter.grad, expected), name
    assert covered == set(nmfx.masks(module))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_masks_of_the_input_count(batch_first: bool, grad: bool) -> None:
    dense = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    reference, module = masked(dense), nmfx.sparsify(copy.deepcopy(dense), "2:4")
    x = torch.randn(4, 4, 8)
    padding = torch.tensor([[False] * 3 + [True]] * 2 + [[False] * 4] * 2)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    plain = reference(x, x, x)[0]
    for extra in (
        {"key_padding_mask": padding},
        {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal.isinf()},
    ):
        with torch.set_grad_enabled(grad):
            expected, actual = reference(x, x, x, **extra)[0], module(x, x, x, **extra)[0]
        torch.testing.assert_close(actual, expected, **CLOSE)
        assert not torch.equal(actual, plain), f"{extra.keys()} had no effect"


def test_unbatched_attention_equals_the_masked_one() -> None:
    dense, x = nn.MultiheadAttention(8, 2), torch.randn(5, 8)
    reference, module = masked(dense), nmfx.sparsify(copy.deepcopy(dense), "2:4")
    torch.testing.assert_close(module(x, x, x)[0], reference(x, x, x)[0], **CLOSE)


class Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_the_fused_attention_path_runs_and_is_masked() -> None:
    module = nmfx.sparsify(nn.MultiheadAttention(8, 2, batch_first=True), "2:4").eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad(), Operators() as seen:
        module(x, x, x)
    assert "aten::_native_multi_head_attention" in seen.names, "the fused path is no longer tested"
    assert not nmfx.verify(module, x, x, x)


def test_attention_rows_and_single_projections() -> None:
    module = nn.Sequential(nn.MultiheadAttention(8, 2))
    nmfx.sparsify(module, {"0.out_proj": None, "0": "1:4"})
    (in_proj, out_proj) = nmfx.report(module)
    assert (in_proj.fqn, in_proj.state, in_proj.capture) == ("0.in_proj_weight", "sparse", "scoped")
    assert (out_proj.fqn, out_proj.state) == ("0.out_proj.weight", "dense")
    nmfx.sparsify(module, {"0.out_proj": "2:4"})
    assert [str(row.pattern) for row in nmfx.report(module)] == [
        "1:4 (keep 1 of every 4)",
        "2:4 (keep 2 of every 4)",
    ]
    x = torch.randn(3, 5, 8)
    dense = copy.deepcopy(nmfx.unsparsify(copy.deepcopy(module)))
    where = sites(dense)
    mask_(dense, {"0.in_proj_weight": where["0.in_proj_weight"]}, 1, 4)
    mask_(dense, {"0.out_proj.weight": where["0.out_proj.weight"]}, 2, 4)
    torch.testing.assert_close(module[0](x, x, x)[0], dense[0](x, x, x)[0], **CLOSE)


def test_attention_is_never_left_with_masked_parameters() -> None:
    module = nmfx.sparsify(nn.MultiheadAttention(8, 2), "2:4")
    raw = {name: (id(p), p.clone()) for name, p in module.named_parameters()}
    x = torch.randn(3, 5, 8)
    module(x, x, x)
    with pytest.raises(AssertionError):
        module(x, x, torch.randn(3, 5, 9))
    for name, parameter in module.named_parameters():
        assert id(parameter) == raw[name][0]
        assert torch.equal(parameter, raw[name][1])


# --- encoder layers ----------------------------------------------------------------------------

PADDING = torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 2 + [True] * 2])


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


RULES = {
    "all": {"layers.*": "2:4"},
    "second_layer": {"layers.1.*": "2:4"},
    "feed_forward": {"layers.*.linear?": "2:4"},
    "attention": {"layers.*.self_attn": "2:4"},
    "out_proj": {"layers.0.self_attn.out_proj": "2:4"},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoder_equals_the_masked_one(
    rules: str, norm_first: bool, padded: bool, mode: str
) -> None:
    dense = encoder(norm_first=norm_first, dropout=0.0).train(mode == "train")
    module = nmfx.sparsify(copy.deepcopy(dense), RULES[rules])
    skipped = {row.fqn for row in nmfx.report(module) if row.state == "dense"}
    reference = masked(dense, skip=skipped)
    x, padding = torch.randn(3, 4, 8), PADDING if padded else None
    with torch.set_grad_enabled(mode != "no_grad"):
        expected = reference(x, src_key_padding_mask=padding)
        actual = module(x, src_key_padding_mask=padding)
        plain = dense(x, src_key_padding_mask=padding)
    # In padded places too: torch's nested tensors leave zeros there, its other paths do not.
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert not torch.allclose(actual, plain), "nothing was masked"
    assert not nmfx.verify(module, x, src_key_padding_mask=padding)


def test_encoder_layer_alone_leaves_its_fast_path_and_comes_back() -> None:
    dense = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    module = nmfx.sparsify(copy.deepcopy(dense), {"linear1": "2:4"})
    x = torch.randn(3, 4, 8)
    fused = "aten::_transformer_encoder_layer_fwd"
    for layer, runs in ((dense, True), (module, False)):
        with torch.no_grad(), Operators() as seen:
            layer(x)
        assert (fused in seen.names) is runs
    assert module.__dict__["activation_relu_or_gelu"] == 1, "the module's own value changed"
    nmfx.unsparsify(module)
    assert type(module) is nn.TransformerEncoderLayer
    assert module.activation_relu_or_gelu == 1
    with torch.no_grad(), Operators() as seen:
        assert torch.equal(module(x), dense(x))
    assert fused in seen.names


def test_encoder_without_a_sparsified_layer_is_not_guarded() -> None:
    model = nn.ModuleDict({"encoder": encoder(), "fc": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    before = [type(module) for module in model["encoder"].modules()]
    nmfx.sparsify(model, {"fc": "2:4"})
    assert [type(module) for module in model["encoder"].modules()] == before
    nmfx.sparsify(model, {"encoder.layers.1.linear1": "2:4"})
    first, second = model["encoder"].layers
    assert type(first) is nn.TransformerEncoderLayer, "only parents of sparsified layers change"
    assert type(second) is not nn.TransformerEncoderLayer


def test_encoder_copies_keep_their_guard() -> None:
    module = nmfx.sparsify(encoder().eval(), RULES["feed_forward"])
    twin, x = copy.deepcopy(module), torch.randn(3, 4, 8)
    assert [type(m) for m in twin.modules()] == [type(m) for m in module.modules()]
    with torch.no_grad():
        assert torch.equal(twin(x), module(x))
    assert not nmfx.verify(twin, x)


@pytest.mark.parametrize("rules", ["second_layer", "feed_forward"])
def test_a_lowered_encoder_takes_padding_and_keeps_its_guard(rules: str) -> None:
    module = nmfx.sparsify(encoder().eval(), dict.fromkeys(RULES[rules], "1:4"))
    x = torch.randn(3, 4, 8)
    call = {"src": x, "src_key_padding_mask": PADDING}
    lowered = nmfx.lower(module, call, tune=False)
    nmfx.lower(nmfx.fold(module), call, tune=False)
    assert "packed" in {row.state for row in nmfx.report(lowered)}
    folded = nmfx.fold(module)
    for twin in (lowered, copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in lowered.modules()]
        with torch.no_grad():
            expected = folded(x, src_key_padding_mask=PADDING)
            actual = twin(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(actual, expected, **CLOSE)
        assert not actual[PADDING].any(), "torch fills padded places with zeros"


def test_packed_layers_keep_their_guard_when_the_rest_is_folded() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer = nmfx.lower(nmfx.sparsify(layer, {"linear?": "1:4"}), tune=False)
    nmfx.sparsify(layer, {"self_attn": "2:4"})
    nmfx.lower(layer, inplace=True, tune=False)  # which folds what it cannot pack
    assert type(layer.self_attn) is nn.MultiheadAttention
    with torch.no_grad(), Operators() as seen:
        layer(torch.randn(2, 4, 8))
    assert "nmfx::linear_nm" in seen.names, "the fused path reads unpacked weights"
    assert "aten::_transformer_encoder_layer_fwd" not in seen.names
    nmfx.fold(layer, inplace=True)
    with torch.no_grad(), Operators() as seen:
        layer(torch.randn(2, 4, 8))
    assert "aten::_transformer_encoder_layer_fwd" in seen.names, "the guard is left"


def test_folded_encoder_takes_the_fast_path_again() -> None:
    module = nmfx.sparsify(encoder().eval(), RULES["all"])
    folded, x = nmfx.fold(module), torch.randn(3, 4, 8)
    with torch.no_grad(), Operators() as seen:
        actual = folded(x)
    assert "aten::_transformer_encoder_layer_fwd" in seen.names
    torch.testing.assert_close(actual, module(x), **CLOSE)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_decoder_and_whole_transformer_equal_the_masked_ones(mode: str) -> None:
    dense = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True).train(mode == "train")
    module = nmfx.sparsify(copy.deepcopy(dense), {"?*": "2:4"})
    assert len(nmfx.masks(module)) == 10
    source, target = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    with torch.set_grad_enabled(mode != "no_grad"):
        expected, actual = masked(dense)(source, target), module(source, target)
    torch.testing.assert_close(actual, expected, **CLOSE)


class Remembers(nn.Linear):
    """Its forward branches, and sets attributes: a buffer, a parameter and a child among them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros(()))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            self.last_batch = x.shape[0]
        self.seen = self.seen + x.shape[0]
        self.calls.append(x.shape[0])
        if not hasattr(self, "gain"):
            self.gain = nn.Parameter(torch.ones(()))
            self.act = nn.Identity()
        return super().forward(x)


def test_attributes_set_by_a_forward_are_carried_back() -> None:
    layer = nmfx.sparsify(Remembers(8, 4), "2:4")
    assert nmfx.report(layer).rows[0].capture == "scoped"
    assert not hasattr(layer, "last_batch")
    layer(torch.randn(3, 8))
    assert layer.last_batch == 3
    layer(torch.randn(1, 8))
    assert layer.last_batch == 3
    assert layer.calls == [3, 1]
    assert layer.seen.item() == 4, "a buffer set by the forward is lost"
    assert "seen" in layer._buffers
    gain = layer.gain
    assert dict(layer.named_parameters())["gain"] is gain
    assert isinstance(layer.act, nn.Identity)
    layer(torch.randn(1, 8))
    assert layer.gain is gain
    layer.calls.pop()
    layer.seen -= 1
    nmfx.unsparsify(layer)
    layer(torch.randn(2, 8))
    assert (layer.last_batch, layer.seen.item()) == (2, 6)
