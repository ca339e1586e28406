"""Tied weights, sparsified knowingly: one tensor, one mask, wherever it is used."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_timer import PACKED_WINS, PREPACKED_WINS, install
from masked_reference import nm_mask
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import nmfx


class Tied(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8, **options)
        self.hidden = nn.Linear(8, 8)
        self.out = nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.embed(ids))))


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.relu(self.a(x))))


IDS = torch.tensor([[1, 2, 3], [4, 5, 15]])
RULES = {"out": "2:4", "*": "2:4"}


def masked(model: nn.Module, name: str) -> nn.Module:
    model = copy.deepcopy(model)
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.copy_(torch.where(nm_mask(weight, 2, 4, 1), weight, 0.0))
    return model


def states(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.state for row in nmfx.report(model)}


def test_embedding_and_output_layer_share_one_mask() -> None:
    torch.manual_seed(0)
    dense = Tied()
    reference = masked(masked(dense, "embed.weight"), "hidden.weight")
    assert reference.out.weight is reference.embed.weight
    model = nmfx.sparsify(copy.deepcopy(dense), RULES, tied=True, lambda_w=0.25)
    assert states(model) == dict.fromkeys(("embed.weight", "hidden.weight", "out.weight"), "sparse")
    assert list(model.state_dict()) == list(dense.state_dict())
    assert model.out.weight is model.embed.weight
    assert torch.equal(model(IDS), reference(IDS))
    assert not nmfx.verify(model, IDS)
    for one in (model, reference):
        one(IDS).square().sum().backward()
    raw = dense.embed.weight
    decay = 0.25 * torch.where(nm_mask(raw, 2, 4, 1), 0.0, raw)
    # Inside backward the decay counts once per use, and there are two.
    torch.testing.assert_close(model.embed.weight.grad, reference.embed.weight.grad + 2 * decay)


def test_attached_the_decay_counts_once() -> None:
    torch.manual_seed(0)
    model = nmfx.sparsify(Tied(), RULES, tied=True, lambda_w=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    nmfx.attach(model, optimizer)
    model(IDS).square().sum().backward()
    raw, grad = model.embed.weight.detach().clone(), model.embed.weight.grad.clone()
    optimizer.step()
    decay = 0.25 * torch.where(nm_mask(raw, 2, 4, 1), 0.0, raw)
    torch.testing.assert_close(model.embed.weight.detach(), raw - (grad + decay))


def test_folded_and_lowered_compute_what_training_did(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nmfx.sparsify(Tied(), RULES, tied=True).eval()
    wanted = model(IDS)
    folded = nmfx.fold(model)
    assert folded.out.weight is folded.embed.weight
    assert type(folded.embed) is nn.Embedding
    assert torch.equal(folded(IDS), wanted)
    fast = nmfx.lower(model, (IDS,), tune=False)
    assert states(fast)["out.weight"] == "packed"
    torch.testing.assert_close(fast(IDS), wanted)
    nmfx.save(fast, tmp_path / "fast.safetensors")
    loaded = nmfx.load(tmp_path / "fast.safetensors", into=Tied()).eval()
    assert torch.equal(loaded(IDS), fast(IDS))
    nmfx.save(model, tmp_path / "sparse.safetensors")
    loaded = nmfx.load(tmp_path / "sparse.safetensors", into=Tied()).eval()
    assert torch.equal(loaded(IDS), wanted)
    assert states(loaded) == states(model)


def test_the_verbs_keep_both_alike() -> None:
    torch.manual_seed(0)
    model = nmfx.sparsify(Tied(), RULES, tied=True)
    wanted = model(IDS)
    nmfx.freeze(model)
    assert torch.equal(model(IDS), wanted)
    nmfx.unfreeze(model)
    assert torch.equal(copy.deepcopy(model)(IDS), wanted)
    with pytest.raises(nmfx.NMError, match=r"embed\.weight and out\.weight are one tensor"):
        nmfx.set_pattern(model, {"out": "1:4"})
    nmfx.set_pattern(model, {"out": "1:4", "embed": "1:4"})
    with torch.no_grad():
        assert int(nmfx.fold(model).embed.weight.count_nonzero()) == 16 * 8 // 4
    assert type(nmfx.unsparsify(model).embed) is nn.Embedding


def test_without_the_option_or_without_a_rule_all_stays_dense() -> None:
    model = nmfx.sparsify(Tied(), RULES | {"out": None})
    assert states(model) == {"hidden.weight": "sparse", "out.weight": "dense"}
    model = nmfx.sparsify(Tied(), {"hidden": "2:4", "*": "2:4"}, tied=True)  # out is the head
    assert states(model) == {"hidden.weight": "sparse", "out.weight": "dense"}
    with pytest.raises(nmfx.NMError, match=r"out: its weight is tied to embed\.weight; skip"):
        nmfx.sparsify(Tied(), RULES)


def test_two_linears_take_one_pattern() -> None:
    torch.manual_seed(0)
    dense, x = TwoLinears(), torch.randn(3, 8)
    model = nmfx.sparsify(copy.deepcopy(dense), "2:4", tied=True)
    assert states(model) == {"a.weight": "sparse", "b.weight": "sparse", "head.weight": "dense"}
    assert torch.equal(model(x), masked(dense, "a.weight")(x))
    for rules in ({"a": "2:4"}, {"a": "2:4", "b": "1:4"}, {"a": None, "*": "2:4"}):
        other = copy.deepcopy(dense)
        with pytest.raises(nmfx.NMError, match=r"a\.weight and b\.weight are one tensor"):
            nmfx.sparsify(other, rules, tied=True)
        assert type(other.a) is nn.Linear


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sparse": True}, "its gradients are sparse"),
        ({"max_norm": 1.0}, "it writes to its weight"),
    ],
)
def test_an_embedding_that_cannot_be_masked_keeps_the_layer_dense(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(nmfx.NMError, match=rf"tied to embed\.weight: {reason}"):
        nmfx.sparsify(Tied(**options), RULES, tied=True)


def test_a_tied_weight_under_another_module_stays_dense() -> None:
    class Bag(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.EmbeddingBag(16, 8)
            self.out.weight = self.embed.weight

    with pytest.raises(nmfx.NMError, match=r"tied to embed\.weight, which nmfx cannot mask"):
        nmfx.sparsify(Bag(), RULES, tied=True)


def test_hugging_face_output_embeddings() -> None:
    torch.manual_seed(0)
    fields = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    dense = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **fields)).eval()
    ids = torch.randint(3, 32, (2, 6))
    model = nmfx.sparsify(copy.deepcopy(dense), {"lm_head": "2:4"}, tied=True)
    assert set(nmfx.masks(model)) == {"transformer.wte.weight", "lm_head.weight"}
    reference = masked(dense, "transformer.wte.weight")
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert not nmfx.verify(model, ids)
    assert torch.equal(nmfx.fold(model)(ids).logits, model(ids).logits)


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.out.weight = nn.Parameter(self.out.weight.detach().clone())


VERBS = {
    "fold": nmfx.fold,
    "fold in place": lambda model: nmfx.fold(model, inplace=True),
    "lower": lambda model: nmfx.lower(model, tune=False),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_weight_tied_since_is_not_masked_for_the_other(verb: str) -> None:
    model = nmfx.sparsify(Untied(), RULES)
    model.out.weight = model.embed.weight
    wanted, raw = model(IDS), copy.deepcopy(model.state_dict())
    with pytest.raises(nmfx.NMError) as error:
        VERBS[verb](model)
    assert str(error.value) == (
        "out.weight: it is tied to embed.weight since it was sparsified, which reads it without "
        "the mask; give each a parameter of its own, or call nmfx.unsparsify, and nmfx.sparsify "
        "with tied=True to mask both"
    )
    assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS), wanted)
    nmfx.sparsify(nmfx.unsparsify(model), RULES, tied=True)
    assert torch.equal(nmfx.fold(model)(IDS), model(IDS))


@pytest.mark.parametrize("verb", VERBS)
def test_layers_tied_since_fold_if_they_have_one_pattern(verb: str) -> None:
    x, model = torch.randn(3, 8), TwoLinears()
    model.b.weight = nn.Parameter(model.b.weight.detach().clone())
    nmfx.sparsify(model, {"a": "1:4", "b": "2:4"})
    model.b.weight = model.a.weight
    with pytest.raises(nmfx.NMError, match=r"^a\.weight and b\.weight are one tensor since they"):
        VERBS[verb](model)
    nmfx.set_pattern(model, "1:4")
    wanted = model(x)
    torch.testing.assert_close(VERBS[verb](model)(x), wanted)


def test_tied_weights_are_one_parameter_again_when_lowering_is_taken_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nmfx.sparsify(Tied(), RULES, tied=True)
    folded = nmfx.fold(model)
    fast = nmfx.lower(model, (IDS,), tune=False)
    reasons = {row.fqn: row.reason for row in nmfx.report(fast)}
    assert reasons["out.weight"] == "embed.weight, which it is tied to, keeps a dense copy"
    assert reasons["hidden.weight"] == ""
    nmfx.save(fast, tmp_path / "fast.safetensors")
    loaded = nmfx.load(tmp_path / "fast.safetensors", into=Tied())
    for lowered in (fast, loaded, copy.deepcopy(fast)):
        again = nmfx.fold(lowered)
        assert again.out.weight is again.embed.weight
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in folded.named_parameters()]
        assert torch.equal(again(IDS), folded(IDS))


def test_two_tied_layers_are_one_parameter_again_when_lowering_is_taken_back() -> None:
    x = torch.randn(3, 8)
    model = nmfx.sparsify(TwoLinears(), "2:4", tied=True)
    fast = nmfx.lower(model, (x,), tune=False)
    assert states(fast) | {"head.weight": ""} == {
        "a.weight": "packed",
        "b.weight": "packed",
        "head.weight": "",
    }
    again = nmfx.fold(fast)
    assert again.a.weight is again.b.weight
    assert torch.equal(again(x), nmfx.fold(model)(x))


def test_a_weight_that_was_changed_since_is_not_tied_again() -> None:
    fast = nmfx.lower(nmfx.sparsify(Tied(), RULES, tied=True), (IDS,), tune=False)
    with torch.no_grad():
        fast.embed.weight[0, 0] += 1.0
    again = nmfx.fold(fast)
    assert again.out.weight is not again.embed.weight
    assert again.embed.weight[0, 0] != again.out.weight[0, 0]


def test_tied_weights_stay_one_parameter_where_lowering_is_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, PACKED_WINS, whole=(4.0, 5.0, 4.1))
    fast = nmfx.lower(nmfx.sparsify(Tied(), RULES, tied=True), (IDS,))
    assert "lowered, the whole model is slower than dense" in str(nmfx.report(fast))
    assert fast.out.weight is fast.embed.weight


def test_the_report_says_so_only_where_the_dense_weight_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, PREPACKED_WINS, whole=(4.0, 2.0))
    fast = nmfx.lower(nmfx.sparsify(Tied(), RULES, tied=True), (IDS,))
    assert states(fast)["out.weight"] == "prepacked"
    assert fast.out.weight is fast.embed.weight
    assert "keeps a dense copy" not in str(nmfx.report(fast))


class ManyNames(nn.Module):
    """Three linears and an embedding, of which the last is declared last, share a weight."""

    def __init__(self, embedded: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)
        if embedded:
            self.embed = nn.Embedding(8, 8)
            self.embed.weight = self.a.weight
        self.b.weight = self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("embedded", [False, True])
def test_a_weight_of_many_names_is_one_parameter_again(embedded: bool) -> None:
    x = torch.randn(3, 8)
    fast = nmfx.lower(nmfx.sparsify(ManyNames(embedded), "2:4", tied=True), (x,), tune=False)
    kept = fast.embed.weight if embedded else None
    again = nmfx.fold(fast, inplace=True)
    names = ["a", "b", "c", *(["embed"] if embedded else [])]
    assert len({id(getattr(again, name).weight) for name in names}) == 1
    assert kept is None or again.a.weight is kept, "the one that was dense all the time"


def test_ties_are_found_again_around_and_inside_the_lowered_model() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = Tied(), Tied()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids) + self.other(ids)

    rules = {"*.out": "2:4", "*": "2:4"}
    fast = nmfx.lower(nmfx.sparsify(Outer(), rules, tied=True), (IDS,), tune=False)
    wrapped = nmfx.fold(nn.ModuleDict({"net": fast}))["net"]
    part = nmfx.fold(fast.inner)
    for model in (wrapped.inner, wrapped.other, part):
        assert model.out.weight is model.embed.weight
    assert wrapped.inner.out.weight is not wrapped.other.out.weight


def test_a_part_gets_no_ties_that_its_names_would_suggest() -> None:
    """A name of the whole model may be that of something else in a part of it."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.part = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
            self.head = nn.Linear(8, 4)
            with torch.no_grad():
                for name in ("a", "b"):
                    self.part[name].weight.copy_(self.a.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.part["b"](self.part["a"](self.b(self.a(x)))))

    fast = nmfx.lower(nmfx.sparsify(Outer(), "2:4", tied=True), (torch.randn(2, 8),), tune=False)
    again = nmfx.fold(fast)
    assert again.a.weight is again.b.weight
    for part in (again.part, nmfx.fold(fast.part)):
        assert part["a"].weight is not part["b"].weight
