"""PEFT: a frozen, sparse base under trained, dense adapters, wrapped in either order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_reference import nm_mask
from torch import Tensor, nn

import nmfx

pytest.importorskip("peft", reason="what is tested here")

import peft
from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

X = torch.linspace(-1, 1, 128).view(4, 32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"]}
    return LoraConfig(**settings | changes)


def sparse_first(config: Any) -> PeftModel:
    return get_peft_model(nmfx.sparsify(model(), "2:4"), config)


def sparse_last(config: Any) -> PeftModel:
    return nmfx.sparsify(get_peft_model(model(), config), "2:4")


ORDERS = pytest.mark.parametrize("build", [sparse_first, sparse_last])


def teach(adapted: nn.Module) -> nn.Module:
    """Adapters of a training that has gone on for a while: PEFT starts them at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return adapted


def masked_by_hand(adapted: nn.Module) -> nn.Module:
    """The same model with its base overwritten, by the definition of 2:4; without nmfx."""
    plain = get_peft_model(model(), lora())
    plain.load_state_dict(adapted.state_dict())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith(("base_layer.weight",)):
                parameter.masked_fill_(~nm_mask(parameter, 2, 4, 1), 0.0)
    return plain


def adapters(adapted: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in adapted.named_parameters() if "lora_" in name}


def gradients(adapted: nn.Module, x: Tensor = X) -> dict[str, Tensor | None]:
    adapted.zero_grad()
    adapted(x).square().sum().backward()
    return {name: p.grad for name, p in adapted.named_parameters()}


@ORDERS
def test_the_base_is_sparse_and_adapters_are_dense_with_a_reason(
    build: Callable[..., PeftModel],
) -> None:
    found = build(lora())
    rows = {row.fqn.removeprefix("base_model.model."): row for row in nmfx.report(found).rows}
    assert [name for name, row in rows.items() if row.state == "sparse"] == [
        "block.up.base_layer.weight",
        "block.down.base_layer.weight",
    ]
    for name, row in rows.items():
        if "lora_" in name:
            what = "lora_A" if "lora_A" in name else "lora_B"
            assert row.reason == f"it is {what} of a PEFT adapter, and adapters stay dense"
    # The last linear of the list is an adapter, and still the head is the head.
    assert rows["head.weight"].reason.startswith("the output layer stays dense by default")
    assert nmfx.verify(found, X) == {}


@ORDERS
def test_values_and_gradients_are_those_of_a_base_masked_by_hand(
    build: Callable[..., PeftModel],
) -> None:
    found = teach(build(lora()))
    plain = masked_by_hand(found)
    torch.testing.assert_close(found(X), plain(X))
    one, other = gradients(found), gradients(plain)
    assert {name for name, grad in one.items() if grad is not None} == set(adapters(found))
    for name in adapters(found):
        torch.testing.assert_close(one[name], other[name], msg=name)
    x = X.clone().requires_grad_()
    found(x).sum().backward()
    expected = X.clone().requires_grad_()
    plain(expected).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


@ORDERS
def test_disabled_adapters_leave_the_sparse_base(build: Callable[..., PeftModel]) -> None:
    found = teach(build(lora()))
    with found.disable_adapter():
        base = found(X)
    torch.testing.assert_close(base, nmfx.sparsify(model(), "2:4")(X))


def test_globs_do_not_reach_adapters_and_names_are_refused() -> None:
    found = get_peft_model(model(), lora())
    nmfx.sparsify(found, {"*.block.*": "2:4"})
    assert [name for name in nmfx.masks(found) if "lora_" in name] == []
    again = get_peft_model(model(), lora())
    with pytest.raises(nmfx.NMError, match="it is lora_A of a PEFT adapter, and adapters stay"):
        nmfx.sparsify(again, {"base_model.model.block.up.lora_A.default": "2:4"})
    assert not any(row.state == "sparse" for row in nmfx.report(again).rows)


def test_a_head_that_is_adapted_is_still_the_head() -> None:
    class Declared(Model):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

    config = lora(target_modules=["up", "head"])
    for kind in (Model, Declared):
        found = nmfx.sparsify(get_peft_model(kind(), config), "2:4")
        states = {row.fqn: row.state for row in nmfx.report(found).rows}
        assert states["base_model.model.head.base_layer.weight"] == "dense", kind
        assert states["base_model.model.block.up.base_layer.weight"] == "sparse", kind


def test_modules_to_save_stay_dense() -> None:
    found = get_peft_model(model(), lora(target_modules=["up"], modules_to_save=["down", "head"]))
    nmfx.sparsify(found, "2:4")
    reasons = {row.fqn: row.reason for row in nmfx.report(found).rows if row.state == "dense"}
    copies = [name for name, reason in reasons.items() if "(modules_to_save)" in reason]
    assert len(copies) == 4, reasons
    assert list(nmfx.masks(found)) == ["base_model.model.block.up.base_layer.weight"]


@pytest.mark.parametrize("build", [sparse_first, sparse_last])
@pytest.mark.parametrize("frozen", [False, True])
def test_merging_gives_the_sum_under_a_mask(build: Callable[..., PeftModel], frozen: bool) -> None:
    found = teach(build(lora()))
    if frozen:
        nmfx.freeze(found)
    masks = {name.split(".")[-3]: mask for name, mask in nmfx.masks(found).items()}
    sums = {}
    for name in ("up", "down"):
        layer = getattr(found.base_model.model.block, name)
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
        sums[name] = (layer.base_layer.weight + delta).detach()
    merged = found.merge_and_unload()
    assert type(merged) is Model
    expected = model()
    with torch.no_grad():
        for name, value in sums.items():
            mask = masks[name] if frozen else nm_mask(value, 2, 4, 1)
            getattr(expected.block, name).weight.copy_(value.masked_fill(~mask, 0.0))
    torch.testing.assert_close(merged(X), expected(X))
    fast = nmfx.lower(merged, tune=False)
    torch.testing.assert_close(fast(X), expected(X), rtol=1e-4, atol=1e-5)


@ORDERS
def test_folded_before_merging_nothing_of_the_adapters_is_lost(
    build: Callable[..., PeftModel],
) -> None:
    found = teach(build(lora()))
    expected = found(X)
    merged = nmfx.fold(found).merge_and_unload()
    assert type(merged.block.up) is nn.Linear
    torch.testing.assert_close(merged(X), expected)


@ORDERS
def test_merged_and_unmerged_is_what_it_was(build: Callable[..., PeftModel]) -> None:
    found = teach(build(lora()))
    expected = found(X)
    found.merge_adapter()
    found.unmerge_adapter()
    torch.testing.assert_close(found(X), expected, rtol=1e-4, atol=1e-5)


@ORDERS
def test_adapters_are_saved_and_loaded_alone(
    build: Callable[..., PeftModel], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    found = teach(build(lora()))
    found.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    assert len(saved) == len(adapters(found))
    again = PeftModel.from_pretrained(nmfx.sparsify(model(), "2:4"), tmp_path)
    assert torch.equal(again(X), found(X))


@ORDERS
def test_adapters_train_on_a_lowered_base(build: Callable[..., PeftModel]) -> None:
    found = teach(build(lora()))
    fast = nmfx.lower(found, tune=False)
    states = {row.fqn: row.state for row in nmfx.report(fast).rows}
    assert [name for name, state in states.items() if state == "packed"] == [
        "base_model.model.block.up.base_layer.weight",
        "base_model.model.block.down.base_layer.weight",
    ]
    one, other = gradients(found), gradients(fast)
    for name in adapters(found):
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    assert {name for name, grad in other.items() if grad is not None} == set(adapters(fast))
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    fast(x).sum().backward()
    found(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)

    twins = (found, fast)
    optimizers = [torch.optim.SGD(adapters(twin).values(), 1e-3) for twin in twins]
    for _ in range(5):
        for twin, optimizer in zip(twins, optimizers, strict=True):
            gradients(twin)
            optimizer.step()
    torch.testing.assert_close(fast(X), found(X), rtol=1e-4, atol=1e-5)
    dense = nmfx.fold(fast).merge_and_unload()
    torch.testing.assert_close(dense(X), found(X), rtol=1e-4, atol=1e-5)


def test_new_adapters_are_never_packed_although_zeros_fit_any_pattern() -> None:
    found = sparse_last(lora())  # its lora_B is zero
    fast = nmfx.lower(found, tune=False)
    assert len(adapters(fast)) == len(adapters(found)) == 4
    reasons = {row.fqn: row.reason for row in nmfx.report(fast).rows if "lora_B" in row.fqn}
    assert set(reasons.values()) == {"it is lora_B of a PEFT adapter, and adapters stay dense"}


def test_a_base_that_was_lowered_before_takes_adapters() -> None:
    fast = nmfx.lower(nmfx.sparsify(model(), "2:4"), tune=False)
    found = teach(get_peft_model(fast, lora()))
    torch.testing.assert_close(found(X), teach(sparse_first(lora()))(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("safe", [False, True])
def test_a_packed_base_cannot_be_merged(safe: bool) -> None:
    """It would change nothing but a copy of the weight, and the adapters would be gone."""
    fast = nmfx.lower(teach(sparse_first(lora())), tune=False)
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    expected = fast(X)
    for merge in (fast.merge_adapter, fast.merge_and_unload):
        with pytest.raises(nmfx.NMError, match=r"made for reading, .* nmfx.fold\(model\) makes"):
            merge(safe_merge=safe)
    assert all(torch.equal(value, fast.state_dict()[name]) for name, value in before.items())
    assert torch.equal(fast(X), expected)
    torch.testing.assert_close(nmfx.fold(fast).merge_and_unload()(X), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.mul_(2),
        lambda w: w.detach().copy_(w),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: setattr(w, "data", torch.zeros(2)),
        lambda w: nn.init.zeros_(w),
    ],
)
def test_the_weight_of_a_packed_layer_is_for_reading(write: Callable[[Tensor], object]) -> None:
    fast = nmfx.lower(nmfx.sparsify(model(), "2:4"), tune=False)
    with pytest.raises(nmfx.NMError, match="made for reading"):
        write(fast.block.up.weight)
    weight = fast.block.up.weight
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.float32, (64, 32), "cpu")
    folded = nmfx.fold(nmfx.sparsify(model(), "2:4")).block.up.weight
    for plain in (weight * 1, weight.clone(), weight.t(), weight.to(torch.float64)):
        assert type(plain) is Tensor
    assert torch.equal(weight, folded)
    x = X.clone().requires_grad_()
    nn.functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, folded.sum(0).expand_as(x))


def test_convolutions_and_transposed_linears_are_a_base_too() -> None:
    from transformers.pytorch_utils import Conv1D

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.proj = nn.Conv2d(4, 8, 3), Conv1D(16, 32)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.proj(self.conv(x).flatten(1)))

    config = lora(target_modules=["conv", "proj"], fan_in_fan_out=True)
    found = nmfx.sparsify(get_peft_model(Other(), config), "2:4")
    assert {row.kind for row in nmfx.report(found).rows if row.state == "sparse"} == {
        "conv",
        "addmm",
    }
    assert len([row for row in nmfx.report(found).rows if "adapters stay" in row.reason]) == 4
    assert nmfx.verify(found, torch.randn(2, 4, 4, 4)) == {}


def test_a_frozen_base_has_its_masks_computed_once() -> None:
    """By `nmfx.freeze`; nobody tells whether a weight changed (through `.data`, say) by itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    found = teach(sparse_last(lora()))
    expected = found(X)
    with Operators() as operators:
        found(X)
    assert "nmfx.sr_ste_project.default" in operators.seen
    nmfx.freeze(found)
    operators.seen.clear()
    with operators:
        out = found(X)
        out.sum().backward()
    assert not any("sr_ste" in name for name in operators.seen), operators.seen
    assert torch.equal(out, expected)


SAFE = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "ia3": peft.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
    "loha": peft.LoHaConfig(r=4, target_modules=["up", "down"]),
    "lokr": peft.LoKrConfig(r=4, target_modules=["up", "down"]),
    "vera": peft.VeraConfig(r=4, target_modules=["up", "down"]),
    "adalora": peft.AdaLoraConfig(target_modules=["up", "down"], total_step=10),
}
READERS = {
    "dora": lora(use_dora=True),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["up", "down"]),
    "hra": peft.HRAConfig(r=4, target_modules=["up", "down"]),
}


@pytest.mark.parametrize("name", SAFE)
def test_adapters_beside_their_layer_leave_it_sparse(name: str) -> None:
    found = nmfx.sparsify(get_peft_model(model(), copy.deepcopy(SAFE[name])), "2:4")
    assert list(nmfx.masks(found)) == [
        "base_model.model.block.up.base_layer.weight",
        "base_model.model.block.down.base_layer.weight",
    ]
    assert nmfx.verify(found, X) == {}


@pytest.mark.parametrize("name", READERS)
def test_adapters_that_read_the_weight_keep_it_dense(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would compile a CUDA kernel, fail, and leave a lock for which all later runs wait forever.
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    config = copy.deepcopy(READERS[name])
    found = get_peft_model(model(), config)
    with pytest.raises(nmfx.NMError, match="adapter around it may read its weight"):
        nmfx.sparsify(found, {"base_model.model.block.up.base_layer": "2:4"})
    # The way that the message names: exact zeros first.
    folded = nmfx.fold(nmfx.sparsify(model(), "2:4"))
    adapted = get_peft_model(folded, copy.deepcopy(READERS[name]))
    torch.testing.assert_close(adapted(X), nmfx.sparsify(model(), "2:4")(X))

    # In the other order nobody asks; the audit and the report tell.
    late = sparse_first(copy.deepcopy(READERS[name]))
    if name != "boft":  # of linear layers it rotates the input: refused for what it does to others
        assert set(nmfx.verify(late, X)) == set(nmfx.masks(late))
    rows = [row for row in nmfx.report(late).rows if row.state == "sparse"]
    assert all("adapter around it may read its weight" in row.reason for row in rows), rows


@pytest.mark.parametrize("tensor", ["qweight", "W_q", "weight"])
def test_layers_that_hold_integers_are_skipped_with_a_reason(tensor: str) -> None:
    """As GPTQ, AWQ, HQQ and BitNet have them: no nn.Linear, no float weight."""

    class QuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer(tensor, torch.zeros(4, 32, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return x

    found = nn.Sequential(nn.Linear(32, 32), QuantLinear(), nn.Linear(32, 8))
    nmfx.sparsify(found, "2:4")
    reasons = {row.fqn: row.reason for row in nmfx.report(found).rows}
    assert reasons["1.weight"] == "QuantLinear holds its weight in integers (quantized)"
