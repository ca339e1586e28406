"""nn.MultiheadAttention lowered: what it computes, holds and reports, and what stays dense."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import DENSE_WINS, PACKED_WINS, install
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import nmfx
from nmfx.capture import attention as lowered_attention
from nmfx.capture import leaf, packed
from nmfx.packing import unpack

SIZE, HEADS = 32, 2
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def attention(**options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(SIZE, HEADS, **options).eval()
    for bias in (module.in_proj_bias, module.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)  # zero by default, which would hide a wrong part
    return module


def lowered(module: nn.Module, rules: Any = "2:4") -> tuple[nn.Module, nn.Module]:
    """(lowered, folded)."""
    sparse = nmfx.sparsify(module, rules)
    return nmfx.lower(sparse, tune=False), nmfx.fold(sparse)


def states(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.state for row in nmfx.report(model)}


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.reason for row in nmfx.report(model)}


def inputs(batch_first: bool = False, keys: int = 5, **sizes: int) -> tuple[Tensor, ...]:
    lengths = {"q": 4, "k": keys, "v": keys}
    made = (torch.randn(length, 3, sizes.get(name, SIZE)) for name, length in lengths.items())
    return tuple(x.transpose(0, 1).contiguous() if batch_first else x for x in made)


def alike(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    if expected[1] is None:
        assert found[1] is None
    else:
        torch.testing.assert_close(found[1], expected[1], **CLOSE)


# --- what it computes ---------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "added": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 16, "vdim": 48},
    "widths_no_bias": {"kdim": 16, "vdim": 48, "bias": False, "batch_first": True},
}


SAME = ["self", "key_is_value", "key_is_query", "all_differ"]
PAIRS = [(o, s) for o in OPTIONS for s in SAME if s == "all_differ" or "kdim" not in OPTIONS[o]]


@pytest.mark.parametrize(("option", "same"), PAIRS)
@pytest.mark.parametrize("rules", ["2:4", "1:4", "1:16"])
def test_the_outputs_are_those_of_the_folded_one(option: str, same: str, rules: str) -> None:
    options = OPTIONS[option]
    fast, folded = lowered(attention(**options), rules)
    assert set(states(fast).values()) == {"packed"}
    sizes = {"k": options.get("kdim", SIZE), "v": options.get("vdim", SIZE)}
    q, k, v = inputs(options.get("batch_first", False), **sizes)
    q, k, v = {
        "self": (q, q, q),
        "key_is_value": (q, k, k),
        "key_is_query": (k, k, v),
        "all_differ": (q, k, v),
    }[same]
    for weights, average in itertools.product([False, True], repeat=2):
        call = {"need_weights": weights, "average_attn_weights": average}
        alike(fast(q, k, v, **call), folded(q, k, v, **call))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("floating", [False, True])
def test_masks_are_those_of_torch(batch_first: bool, causal: bool, floating: bool) -> None:
    fast, folded = lowered(attention(batch_first=batch_first))
    q, k, _ = inputs(batch_first)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    blocked = torch.ones(4, 5, dtype=torch.bool).triu(1)
    if floating:
        padding, blocked = (
            torch.zeros(m.shape).masked_fill(m, -torch.inf) for m in (padding, blocked)
        )
    for call in (
        {"key_padding_mask": padding},
        {"attn_mask": blocked, "is_causal": causal},
        {"key_padding_mask": padding, "attn_mask": blocked, "is_causal": causal},
        {"attn_mask": blocked, "need_weights": False, "is_causal": causal},
    ):
        alike(fast(q, k, k, **call), folded(q, k, k, **call))


def test_one_sequence_without_a_batch() -> None:
    fast, folded = lowered(attention(batch_first=True))
    x = torch.randn(5, SIZE)
    alike(fast(x, x, x), folded(x, x, x))


@given(
    length=st.integers(1, 9),
    keys=st.integers(1, 9),
    batch=st.integers(1, 4),
    heads=st.integers(1, 4),
)
def test_any_length(length: int, keys: int, batch: int, heads: int) -> None:
    fast, folded = lowered(nn.MultiheadAttention(16 * heads, heads).eval(), "1:4")
    q, k = torch.randn(length, batch, 16 * heads), torch.randn(keys, batch, 16 * heads)
    alike(fast(q, k, k), folded(q, k, k))


def test_bfloat16() -> None:
    fast, folded = lowered(attention().bfloat16())
    x = torch.randn(4, 3, SIZE).bfloat16()
    torch.testing.assert_close(fast(x, x, x)[0], folded(x, x, x)[0], rtol=0.05, atol=0.05)


def test_autocast() -> None:
    fast, folded = lowered(attention())
    x = torch.randn(4, 3, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fast(x, x, x)[0], folded(x, x, x)[0]
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_dropout_in_training_mode_is_that_of_torch() -> None:
    fast, folded = lowered(attention(dropout=0.5))
    x = torch.randn(4, 3, SIZE)
    results = []
    for module in (fast.train(), folded.train()):
        torch.manual_seed(1)
        results.append(module(x, x, x))
    alike(*results)
    assert not torch.equal(fast(x, x, x)[0], fast(x, x, x)[0]), "nothing was dropped"


def test_gradients_reach_inputs_and_biases_but_no_weight() -> None:
    fast, folded = lowered(attention())
    x = torch.randn(4, 3, SIZE)
    grads = []
    for module in (fast, folded):
        leaf = x.clone().requires_grad_()
        module(leaf, leaf, leaf)[0].square().sum().backward()
        grads.append((leaf.grad, module.in_proj_bias.grad, module.out_proj.bias.grad))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not [name for name, _ in fast.named_parameters() if "weight" in name]


# --- one of the two weights ---------------------------------------------------------------------


@pytest.mark.parametrize("only", ["in_proj", "out_proj"])
def test_one_weight_alone(only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"out_proj": "2:4" if only == "out_proj" else None, "": None}
    if only == "in_proj":
        rules[""] = "2:4"
    fast, folded = lowered(attention(), rules)
    state = {"in_proj": ["packed", "dense"], "out_proj": ["dense", "packed"]}[only]
    assert list(states(fast).values()) == state
    expected = [folded(*call) for call in calls()]
    refuse_dense_weights(monkeypatch)
    for call, outputs in zip(calls(), expected, strict=True):
        alike(fast(*call), outputs)


def refuse_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack_weight(*args: Any) -> Tensor:
        raise AssertionError("a dense weight was made for a call")

    for module in (packed, leaf):
        monkeypatch.setattr(module, "unpack_weight", unpack_weight)


def calls() -> list[tuple[Tensor, ...]]:
    q, k, v = (torch.linspace(-3, 3, n * SIZE).sin().view(n, 1, SIZE) for n in (4, 5, 5))
    return [(q, q, q), (q, k, k), (q, k, v)]


# --- encoders and their fused paths -------------------------------------------------------------


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 64, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("rules", ["layers.*", "layers.*.self_attn", "layers.0.self_attn.out_proj"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_leave_their_fused_path(
    rules: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, folded = lowered(encoder(), {rules: "2:4"})
    x = torch.randn(3, 4, SIZE)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 2 + [True] * 2])
    call = {"src_key_padding_mask": padding} if padded else {}
    expected = folded(x, **call)
    with torch.no_grad():
        of_fused_path = folded(x, **call)  # padding: zeros there, and not in `expected`
    refuse_dense_weights(monkeypatch)
    torch.testing.assert_close(fast(x, **call), expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, **call), of_fused_path, **CLOSE)
        assert type(fast) is not nn.TransformerEncoder
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, **call)[~padding], expected[~padding], **CLOSE)


def test_a_decoder_attends_to_two_sequences() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(SIZE, HEADS, 64), 2).eval()
    fast, folded = lowered(decoder, {"*": "2:4"})
    output = "layers.1.linear2.weight"  # dense by default
    assert [name for name, state in states(fast).items() if state != "packed"] == [output]
    x, memory = torch.randn(4, 3, SIZE), torch.randn(7, 3, SIZE)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    for call in ({}, {"tgt_mask": mask, "tgt_is_causal": True}):
        torch.testing.assert_close(fast(x, memory, **call), folded(x, memory, **call), **CLOSE)


def test_a_padding_of_another_shape_is_refused() -> None:
    fast, folded = lowered(attention())
    q, k, _ = inputs()
    for module in (fast, folded):
        with pytest.raises(AssertionError, match="key_padd"):
            module(q, k, k, key_padding_mask=torch.zeros(3, 4, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_sequences_alone() -> None:
    fast, folded = lowered(attention(batch_first=True))
    rows = [torch.randn(n, SIZE) for n in (3, 1, 4)]
    x = torch.nested.as_nested_tensor(rows)
    with torch.no_grad():
        found, none = fast(x, x, x, need_weights=False)
        assert none is None
        assert found.is_nested
        for part, row in zip(found.unbind(), rows, strict=True):
            torch.testing.assert_close(part, folded(row, row, row)[0], **CLOSE)


# --- compilers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_torch_compile_takes_it_in_one_graph(same: bool) -> None:
    fast, folded = lowered(attention())
    q, k, _ = inputs()
    call = (q, q, q) if same else (q, k, k)
    alike(torch.compile(fast, fullgraph=True, backend="aot_eager")(*call), folded(*call))


def test_torch_export() -> None:
    fast, folded = lowered(encoder(), {"*": "2:4"})
    x = torch.randn(3, 4, SIZE)
    program = torch.export.export(fast, (x,))
    torch.testing.assert_close(program.module()(x), folded(x), **CLOSE)
    assert "nmfx.linear_nm" in program.graph_module.code


# --- what it holds ------------------------------------------------------------------------------


def test_the_state_is_plain_tensors_and_the_dense_weight_can_be_read() -> None:
    fast, folded = lowered(attention())
    assert set(fast.state_dict()) == {
        "in_proj_bias",
        "in_proj_weight_values",
        "in_proj_weight_index",
        "out_proj.bias",
        "out_proj.weight_values",
        "out_proj.weight_index",
    }
    assert torch.equal(fast.in_proj_weight, folded.in_proj_weight)
    assert torch.equal(fast.out_proj.weight, folded.out_proj.weight)
    packed = fast.in_proj_weight_values, fast.in_proj_weight_index
    assert torch.equal(unpack(*packed, 3 * SIZE, SIZE, "2:4"), folded.in_proj_weight)
    assert isinstance(fast, nn.MultiheadAttention)
    with pytest.raises(nmfx.NMError):
        fast.in_proj_weight.add_(1)


@pytest.mark.parametrize("option", OPTIONS)
def test_fold_takes_it_back_bit_for_bit(option: str) -> None:
    dense = attention(**OPTIONS[option])
    fast, folded = lowered(copy.deepcopy(dense))
    again = nmfx.fold(fast)
    assert [type(m) for m in again.modules()] == [type(m) for m in dense.modules()]
    assert list(again.state_dict()) == list(dense.state_dict())
    assert list(map(str, again.named_parameters())) == list(map(str, folded.named_parameters()))
    for name, expected in folded.state_dict().items():
        assert torch.equal(again.state_dict()[name], expected), name
    assert set(states(nmfx.lower(again, tune=False)).values()) == {"packed"}


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch"])
@pytest.mark.parametrize("rules", ["2:4", {"out_proj": "2:4", "": None}])
def test_copies_run_on_packed_weights(copied: str, rules: Any) -> None:
    fast, _ = lowered(attention(), rules)
    if copied == "deepcopy":
        twin = copy.deepcopy(fast)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert states(twin) == states(fast)
    assert type(twin) is type(fast)
    for call in calls():
        alike(twin(*call), fast(*call))


@pytest.mark.parametrize(
    "rules", ["2:4", {"out_proj": "2:4", "": None}, {"out_proj": None, "": "1:4"}]
)
@pytest.mark.parametrize("meta", [False, True])
def test_files(rules: Any, meta: bool, tmp_path: Path) -> None:
    dense = nn.Sequential()
    dense.add_module("net", attention())
    prefixed = (
        rules if isinstance(rules, str) else {f"net.{k}".strip("."): v for k, v in rules.items()}
    )
    sparse = nmfx.sparsify(copy.deepcopy(dense), prefixed)
    fast = nmfx.lower(sparse, tune=False)
    nmfx.save(fast, tmp_path / "fast.safetensors")
    into = dense.to("meta") if meta else dense
    loaded = nmfx.load(tmp_path / "fast.safetensors", into=into)
    assert states(loaded) == states(fast)
    assert reasons(loaded) == reasons(fast)
    for call in calls():
        for found, expected in zip(loaded.net(*call), fast.net(*call), strict=True):
            assert torch.equal(found, expected)


# --- the measured decision ----------------------------------------------------------------------


def test_every_product_is_timed_on_what_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, PACKED_WINS)
    decoder = nn.TransformerDecoderLayer(SIZE, HEADS, 64, batch_first=True).eval()
    sparse = nmfx.sparsify(decoder, {"self_attn*": "2:4", "multihead*": "2:4", "*": None})
    x, memory = torch.randn(2, 3, SIZE), torch.randn(2, 7, SIZE)
    fast = nmfx.lower(sparse, (x, memory))
    rows = {row.fqn: (row.rows, row.state) for row in nmfx.report(fast) if row.pattern}
    assert rows == {
        "self_attn.in_proj_weight": ((6,), "packed"),
        "self_attn.out_proj.weight": ((6,), "packed"),
        "multihead_attn.in_proj_weight": ((6, 14), "packed"),  # q, and k with v
        "multihead_attn.out_proj.weight": ((6,), "packed"),
    }
    # Only a layer of its own keeps a second copy; those that were timed are not timed again.
    assert fake.asked == [
        ({"dense", "packed"}, 6),
        ({"dense", "packed", "prepacked"}, 6),
        ({"dense", "packed"}, 6),
        ({"dense", "packed"}, 14),
    ]
    torch.testing.assert_close(fast(x, memory), nmfx.fold(sparse)(x, memory), **CLOSE)


def test_what_stays_dense_is_reported_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DENSE_WINS)
    sparse = nmfx.sparsify(nn.Sequential(encoder()), {"*": "2:4"})
    fast = nmfx.lower(sparse, (torch.randn(2, 3, SIZE),))
    rows = {row.fqn: row for row in nmfx.report(fast)}
    for name in ("in_proj_weight", "out_proj.weight"):
        row = rows[f"0.layers.0.self_attn.{name}"]
        assert (row.state, row.ms_dense) == ("dense", 1.0)
        assert "dense is the fastest" in row.reason or "folded" in row.reason
    assert not [m for m in fast.modules() if type(m).__name__.startswith("NM")]


def test_a_slower_whole_leaves_torchs_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS, whole=(1.0, 2.0, 1.0))
    dense = encoder()
    fast = nmfx.lower(nmfx.sparsify(copy.deepcopy(dense), {"*": "2:4"}), (torch.randn(2, 3, SIZE),))
    assert [type(m) for m in fast.modules()] == [type(m) for m in dense.modules()]
    assert (
        "lowered the whole model is slower" in reasons(fast)["layers.0.self_attn.out_proj.weight"]
    )


def test_two_forms_are_for_the_output_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = {"dense": 3.0, "prepacked": 5.0}
    install(monkeypatch, lambda rows: {**ms, "packed": 1.0 if rows < 12 else 5.0})
    sparse = nmfx.sparsify(attention(), "2:4")
    x, many = torch.randn(4, 1, SIZE), torch.randn(40, 1, SIZE)
    fast = nmfx.lower(sparse, [(x, x, x), (many, many, many)], keep=("packed", "dense"))
    assert states(fast)["out_proj.weight"] == "packed+dense"
    assert states(fast)["in_proj_weight"] in ("packed", "dense")
    assert "one copy: only linear layers" in reasons(fast)["in_proj_weight"]
    folded = nmfx.fold(sparse)
    for call in ((x, x, x), (many, many, many)):
        alike(fast(*call), folded(*call))


def test_preview_times_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PACKED_WINS)
    module = attention()
    q, k, _ = inputs()
    rows = {row.fqn: row for row in nmfx.preview(module, "2:4", (q, k, k))}
    assert {name: row.state for name, row in rows.items()} == {
        "in_proj_weight": "would pack",
        "out_proj.weight": "would pack",
    }
    assert rows["in_proj_weight"].rows == (12, 15)


# --- what is left alone -------------------------------------------------------------------------


class Own(nn.MultiheadAttention):
    def forward(self, query: Tensor, *rest: Any, **named: Any) -> Any:
        return super().forward(query, *rest, **named)[0]


class Loud(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("torch calls no forward of an output projection")


def with_loud_projection() -> nn.Module:
    module = attention()
    module.out_proj = Loud(SIZE, SIZE)
    return module


LEFT: dict[str, tuple[Any, str]] = {
    "subclass": (lambda: Own(SIZE, HEADS).eval(), "Own has a forward of its own"),
    "projection": (with_loud_projection, "its out_proj is a Loud"),
}


@pytest.mark.parametrize("case", LEFT)
def test_other_attentions_stay_dense(case: str) -> None:
    make, reason = LEFT[case]
    fast, folded = lowered(nn.Sequential(make()), {"*": "2:4"})
    assert list(reasons(fast).values()) == [f"{reason}; folded"] * 2
    x = torch.randn(4, 3, SIZE)
    for found, expected in zip(fast[0](x, x, x), folded[0](x, x, x), strict=True):
        assert torch.equal(found, expected)


def test_parts_that_fill_no_blocks_stay_dense() -> None:
    fast, folded = lowered(nn.MultiheadAttention(24, 2).eval())
    assert states(fast) == {"in_proj_weight": "dense", "out_proj.weight": "packed"}
    assert "its parts of embed_dim=24 rows do not fill" in reasons(fast)["in_proj_weight"]
    q, k = torch.randn(4, 3, 24), torch.randn(5, 3, 24)
    alike(fast(q, k, k), folded(q, k, k))


def test_a_torch_with_another_attention_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered_attention, "_TORCH", unknown)
    fast, folded = lowered(attention())
    assert set(states(fast).values()) == {"dense"}
    assert "in a way that nmfx does not know" in reasons(fast)["in_proj_weight"]
    for call in calls():
        alike(fast(*call), folded(*call))


def unknown() -> None:
    """Calls none of the helpers."""


def test_what_is_lowered_in_part_is_not_sparsified() -> None:
    fast, _ = lowered(attention(), {"out_proj": "2:4", "": None})
    with pytest.raises(nmfx.NMError, match=r"are lowered; nmfx\.fold first"):
        nmfx.sparsify(fast, {"": "2:4", "out_proj": None})
    assert states(fast) == {"in_proj_weight": "dense", "out_proj.weight": "packed"}


class ReadsChild(nn.TransformerEncoder):
    """Reads a layer of its own around it, keeps what it saw, and counts its layers."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 64, batch_first=True)
        super().__init__(layer, 2, enable_nested_tensor=False)
        self.proj = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = []
        for number in range(len(self.layers)):
            x = self.layers[number](x.to(next(self.parameters()).device))
            self.seen.append(x)
        return x + F.linear(x, self.proj.weight)


class AttentionReads(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(SIZE, HEADS, batch_first=True)
        self.rel = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0] + self.rel(x) + F.linear(x, self.rel.weight)


@pytest.mark.parametrize("make", [ReadsChild, AttentionReads])
def test_subclasses_with_forwards_of_their_own(make: Any) -> None:
    sparse = nmfx.sparsify(nn.Sequential(make()).eval(), {"*": "2:4"})
    x = torch.randn(2, 3, SIZE)
    folded, fast = nmfx.fold(sparse), nmfx.lower(sparse, (x,), tune=False)
    for module in (sparse, fast):
        torch.testing.assert_close(module(x), folded(x), **CLOSE)
    if make is ReadsChild:
        assert len(fast[0].seen) == 2


def test_a_shared_output_projection_stays_dense() -> None:
    pair = nn.ModuleDict({"a": attention(), "b": attention()})
    pair["b"].out_proj = pair["a"].out_proj
    fast, folded = lowered(pair, {"?": "2:4", "*out_proj": "2:4"})
    assert states(fast)["a.out_proj.weight"] == "dense"
    assert "several modules share" in reasons(fast)["a.out_proj.weight"]
    for name in "ab":
        for call in calls():
            alike(fast[name](*call), folded[name](*call))


# --- subclasses and shared modules ---------------------------------------------------------------


class Renamed(nn.MultiheadAttention):
    """Without a forward of its own."""


def test_a_subclass_without_a_forward_is_lowered_whole() -> None:
    fast, folded = lowered(Renamed(SIZE, HEADS).eval())
    assert states(fast) == {"in_proj_weight": "packed", "out_proj.weight": "packed"}
    call = inputs()
    alike(fast(*call), folded(*call))


class Head(nn.Module):
    """Calls the output projection of its attention as a layer too."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        attend = attention()
        if first:
            self.head = attend.out_proj
        self.attend = attend
        self.head = attend.out_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("first", [False, True])
def test_an_output_projection_that_is_called_too_stays_dense(first: bool) -> None:
    model = Head(first).eval()
    sparse = nmfx.sparsify(model, {"*": "2:4"})
    stay = {fqn: reason for fqn, reason in reasons(sparse).items() if "in_proj" not in fqn}
    assert stay
    for reason in stay.values():
        assert reason.startswith("attention reads its weight, and it is ")
        assert "attend.out_proj" in reason
        assert "head" in reason
    x = torch.randn(4, 2, SIZE)
    before = sparse(x)
    torch.testing.assert_close(nmfx.fold(sparse)(x), before)
    torch.testing.assert_close(nmfx.lower(sparse, tune=False)(x), before, **CLOSE)


class Reading(nn.TransformerEncoderLayer):
    """Reads a weight around its layer, besides what torch's forward does."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src, *args, **kwargs) + F.linear(src, self.linear1.weight).mean()


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_layer_that_reads_a_weight_itself(training: bool) -> None:
    layer = Reading(SIZE, HEADS, dim_feedforward=48, dropout=0.0).train(training)
    x = torch.randn(4, 2, SIZE)
    sparse = nmfx.sparsify(layer, {"*": "2:4"})
    found = sparse(x)
    torch.testing.assert_close(nmfx.fold(sparse)(x), found, **CLOSE)
    torch.testing.assert_close(nmfx.lower(sparse, tune=False)(x), found, **CLOSE)
