"""set_lambda, set_pattern, freeze, unfreeze, masks, sad: what they change, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from captures import CAPTURES, X, assert_masks_are, captures, lambdas, patterns, states
from torch import Tensor, fx, nn

import nmfx
from nmfx.mask import nm_mask


def masked_output(model: nn.Module, *wanted: str) -> Tensor:
    """The output of the unsparsified model with masked weights."""
    plain = nmfx.unsparsify(deepcopy(model))
    with torch.no_grad():
        for (name, _), pattern in zip(nmfx.masks(model).items(), wanted, strict=True):
            weight = plain.get_parameter(name)
            weight.masked_fill_(~nm_mask(weight, pattern, 1), 0.0)
    return plain(X)


# --- set_lambda ----------------------------------------------------------------------------------


@captures
@pytest.mark.parametrize("value", [0, 0.0, 1, 3e-3])
def test_set_lambda_changes_every_layer(capture: str, value: float) -> None:
    model = CAPTURES[capture]()
    assert lambdas(model) == [2e-4, 2e-4]
    assert nmfx.set_lambda(model, value) is None
    assert lambdas(model) == [float(value)] * 2
    model(X).sum().backward()
    with_decay = {name: model.get_parameter(name).grad.clone() for name in nmfx.masks(model)}
    nmfx.set_lambda(model, 0)
    model.zero_grad()
    model(X).sum().backward()
    for name, mask in nmfx.masks(model).items():
        weight = model.get_parameter(name)
        decay = value * weight.detach().masked_fill(mask, 0.0)
        torch.testing.assert_close(with_decay[name], weight.grad + decay)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "lambda_w=True is not a number; the paper's default is 2e-4"),
        ("2e-4", "lambda_w='2e-4' is not a number; the paper's default is 2e-4"),
        (None, "lambda_w=None is not a number; the paper's default is 2e-4"),
        (
            -1e-9,
            "lambda_w=-1e-09 is not finite and >= 0: SR-STE decays pruned weights",
        ),
        (
            math.nan,
            "lambda_w=nan is not finite and >= 0: SR-STE decays pruned weights",
        ),
        (
            math.inf,
            "lambda_w=inf is not finite and >= 0: SR-STE decays pruned weights",
        ),
    ],
)
def test_set_lambda_refuses(value: Any, text: str) -> None:
    model = CAPTURES["leaf"]()
    with pytest.raises(nmfx.NMError) as error:
        nmfx.set_lambda(model, value)
    assert str(error.value).startswith(text), error.value
    assert lambdas(model) == [2e-4, 2e-4]


# --- set_pattern ---------------------------------------------------------------------------------


@captures
@pytest.mark.parametrize("new", ["1:4", "4:4", "3:8", (1, 2), nmfx.Pattern(2, 16)], ids=str)
def test_set_pattern_changes_masks_and_outputs(capture: str, new: Any) -> None:
    model = CAPTURES[capture]()
    before = model(X)
    assert torch.equal(before, masked_output(model, "2:4", "2:4"))
    assert nmfx.set_pattern(model, new) is None
    text = nmfx.Pattern.parse(new).text
    assert patterns(model) == [text, text]
    assert_masks_are(model, text, text)
    assert torch.equal(model(X), masked_output(model, text, text))
    assert not torch.equal(model(X), before)
    nmfx.set_pattern(model, "2:4")
    assert torch.equal(model(X), before)


def test_set_pattern_takes_globs_and_leaves_the_rest() -> None:
    model = CAPTURES["leaf"]()
    nmfx.set_pattern(model, {"2": "1:4"})
    assert patterns(model) == ["2:4", "1:4"]
    nmfx.set_pattern(model, {"0": "1:8", "*": "3:4"})  # the first match counts
    assert patterns(model) == ["1:8", "3:4"]
    assert_masks_are(model, "1:8", "3:4")
    assert torch.equal(model(X), masked_output(model, "1:8", "3:4"))


@captures
def test_set_pattern_generates_code_only_for_another_m(capture: str) -> None:
    model = CAPTURES[capture]()

    def code() -> list[Any]:
        graphs = [m.code for m in model.modules() if isinstance(m, fx.GraphModule)]
        return [*map(type, model.modules()), *graphs]

    before = code()
    nmfx.set_pattern(model, "1:4")
    nmfx.set_lambda(model, 0.1)
    assert code() == before
    nmfx.set_pattern(model, "1:8")
    assert code() != before
    nmfx.set_pattern(model, "2:4")
    assert list(map(str, code())) == list(map(str, before))


@captures
def test_set_pattern_keeps_parameters_and_keys(capture: str) -> None:
    model = CAPTURES[capture]()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    nmfx.set_pattern(model, "1:8")
    nmfx.freeze(model)
    nmfx.unfreeze(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"0": None}, "rule '0': None would make a layer dense; use nmfx.unsparsify"),
        ({"*": "1:4", "head": "1:2"}, "rule 'head' matches no sparsified layer"),
        ({"1": "1:4"}, "rule '1' matches no sparsified layer"),
        (
            {"0": "1:4", "2": "1:3"},
            "2: its reduced axis of 16 is not a multiple of 3, so 1:3 groups would straddle it; "
            "leave it out with a glob",
        ),
        ({}, "the rules are empty; write for example {'*': '2:4'}"),
        ({0: "2:4"}, "rule 0: keys are globs over module names, like 'encoder.*'"),
        (
            "4:2",
            "pattern 4:2 breaks 1 <= N <= M <= 64; N:M means keep N of every M, for example '2:4'",
        ),
        (
            {"0": "2x4"},
            "rule '0': pattern '2x4' is not of the form 'N:M' with 1 <= N <= M <= 64 (ASCII "
            "digits, no blanks or signs); write for example '2:4'",
        ),
    ],
)
def test_set_pattern_refuses_and_changes_nothing(rules: Any, text: str) -> None:
    model = CAPTURES["leaf"]()
    before = model(X)
    with pytest.raises(nmfx.NMError) as error:
        nmfx.set_pattern(model, rules)
    assert str(error.value) == text
    assert patterns(model) == ["2:4", "2:4"]
    assert torch.equal(model(X), before)


def test_set_pattern_of_a_bare_layer_names_the_model() -> None:
    with pytest.raises(nmfx.NMError, match=r"^model: its reduced axis of 8 is not a multiple of 3"):
        nmfx.set_pattern(nmfx.sparsify(nn.Linear(8, 8), "2:4"), "1:3")


def test_set_pattern_refuses_frozen_layers_and_changes_nothing() -> None:
    model = CAPTURES["leaf"]()
    nmfx.freeze(model)
    nmfx.set_pattern(model, "2:4")  # no change
    with pytest.raises(nmfx.NMError) as error:
        nmfx.set_pattern(model, {"2": "1:4"})
    assert str(error.value) == (
        "2: its mask is frozen at 2:4 (keep 2 of every 4); call nmfx.unfreeze first"
    )
    assert patterns(model) == ["2:4", "2:4"]
    assert states(model) == ["frozen", "frozen"]


@pytest.mark.parametrize(
    "verb",
    [
        lambda model: nmfx.set_lambda(model, 0.1),
        lambda model: nmfx.set_pattern(model, "2:4"),
        nmfx.freeze,
        nmfx.unfreeze,
        nmfx.masks,
    ],
    ids=["set_lambda", "set_pattern", "freeze", "unfreeze", "masks"],
)
def test_schedule_verbs_refuse_what_is_not_sparsified(
    verb: Callable, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    with pytest.raises(nmfx.NMError) as error:
        verb(nn.Linear(8, 8))
    assert str(error.value) == (
        f"nmfx.{name}: Linear has no sparsified layer; call nmfx.sparsify(model, '2:4') first"
    )
    with pytest.raises(nmfx.NMError) as error:
        verb({"a": 1})
    assert str(error.value) == f"nmfx.{name} takes an nn.Module, got dict"
    lowered = nmfx.lower(nmfx.sparsify(nn.Linear(8, 8), "2:4"), tune=False)
    with pytest.raises(nmfx.NMError) as error:
        verb(lowered)
    assert str(error.value) == (
        f"nmfx.{name}: NMLinear is lowered, and packed layers have no dense weight; call it on "
        f"the model that nmfx.lower was given"
    )
