"""freeze, unfreeze and masks: fixed masks, and schedules that survive copies and moves."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from captures import CAPTURES, RULES, X, assert_masks_are, captures, dense, lambdas, states
from torch import nn

import nmfx
from nmfx.mask import nm_mask


def shake(model: nn.Module) -> None:
    """Other weights, and so other masks."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))


@captures
def test_freeze_keeps_masks_while_weights_move(capture: str) -> None:
    model = CAPTURES[capture]()
    fixed = nmfx.masks(model)
    out = model(X)
    assert nmfx.freeze(model) is None
    assert states(model) == ["frozen", "frozen"]
    assert torch.equal(model(X), out)
    shake(model)
    for name, mask in nmfx.masks(model).items():
        assert torch.equal(mask, fixed[name]), name
        assert not torch.equal(mask, nm_mask(model.get_parameter(name), "2:4", 1)), name

    plain = nmfx.unsparsify(deepcopy(model))
    with torch.no_grad():
        for name, mask in fixed.items():
            plain.get_parameter(name).masked_fill_(~mask, 0.0)
    assert torch.equal(model(X), plain(X))
    assert torch.equal(nmfx.fold(model)(X), plain(X))


@captures
def test_unfreeze_lets_masks_follow_the_weights_again(capture: str) -> None:
    model = CAPTURES[capture]()
    nmfx.freeze(model)
    shake(model)
    assert nmfx.unfreeze(model) is None
    assert states(model) == ["sparse", "sparse"]
    assert_masks_are(model, "2:4", "2:4")
    twin = CAPTURES[capture]()
    shake(twin)
    assert torch.equal(model(X), twin(X))
    left = [key for m in model.modules() for key in vars(m) if key.startswith("_nmfx_mask")]
    assert not left, left


def test_freeze_again_keeps_the_first_masks() -> None:
    model = CAPTURES["leaf"]()
    nmfx.freeze(model)
    fixed = nmfx.masks(model)
    shake(model)
    nmfx.freeze(model)
    for name, mask in nmfx.masks(model).items():
        assert torch.equal(mask, fixed[name]), name


def test_freeze_takes_in_layers_sparsified_later() -> None:
    model = nmfx.sparsify(dense(), {"0": "2:4"})
    nmfx.freeze(model)
    nmfx.sparsify(model, RULES)
    assert states(model) == ["frozen", "sparse"]
    nmfx.freeze(model)
    assert states(model) == ["frozen", "frozen"]


def test_unfreeze_of_a_model_that_is_not_frozen_does_nothing() -> None:
    model = CAPTURES["leaf"]()
    out = model(X)
    nmfx.unfreeze(model)
    assert states(model) == ["sparse", "sparse"]
    assert torch.equal(model(X), out)


def test_set_lambda_while_frozen_counts_after_unfreeze() -> None:
    model = CAPTURES["leaf"]()
    nmfx.freeze(model)
    nmfx.set_lambda(model, 0.5)
    model(X).sum().backward()
    mask = nmfx.masks(model)["0.weight"]
    assert not model[0].weight.grad[~mask].any(), "a frozen layer decayed"
    nmfx.unfreeze(model)
    assert lambdas(model) == [0.5, 0.5]
    plain = model[0].weight.grad.clone()
    model.zero_grad()
    model(X).sum().backward()
    assert not torch.equal(model[0].weight.grad[~mask], plain[~mask])


def copied(model: nn.Module) -> nn.Module:
    return deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_bfloat16(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16).to(torch.float32)


def through_double(model: nn.Module) -> nn.Module:
    return model.double().to("cpu").float()


def through_meta(model: nn.Module) -> nn.Module:
    state = deepcopy(model.state_dict())
    model.to_empty(device="meta")
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def onto_meta_and_assigned(model: nn.Module) -> nn.Module:
    state = deepcopy(model.state_dict())
    model.to("meta")
    model.load_state_dict(state, assign=True)
    return model


TRIPS: list[Callable[[nn.Module], nn.Module]] = [
    copied,
    pickled,
    saved,
    through_bfloat16,
    through_double,
    through_meta,
    onto_meta_and_assigned,
]


@captures
@pytest.mark.parametrize("trip", TRIPS)
def test_frozen_masks_survive(trip: Callable, capture: str) -> None:
    model = CAPTURES[capture]()
    nmfx.freeze(model)
    shake(model)  # from here on, only the fixed masks know what was pruned
    fixed, out = nmfx.masks(model), model(X)
    model = trip(model)
    assert states(model) == ["frozen", "frozen"]
    for name, mask in nmfx.masks(model).items():
        assert torch.equal(mask, fixed[name]), name
    if trip is not through_bfloat16:
        assert torch.equal(model(X), out)
    nmfx.unfreeze(model)
    assert_masks_are(model, "2:4", "2:4")
    assert not torch.equal(model(X), out)


@captures
@pytest.mark.parametrize("trip", TRIPS)
def test_schedules_survive(trip: Callable, capture: str) -> None:
    model = CAPTURES[capture]()
    nmfx.set_lambda(model, 0.3)  # no bfloat16 holds 0.3
    nmfx.set_pattern(model, "3:8")
    model = trip(model)
    assert lambdas(model) == [0.3, 0.3]
    assert_masks_are(model, "3:8", "3:8")
    model(X).sum().backward()
    name, mask = next(iter(nmfx.masks(model).items()))
    weight = model.get_parameter(name)
    grad = weight.grad.clone()
    nmfx.set_lambda(model, 0.0)
    model.zero_grad()
    model(X).sum().backward()
    decay = 0.3 * weight.detach().masked_fill(mask, 0.0)
    torch.testing.assert_close(grad, weight.grad + decay)


def test_a_copy_has_a_schedule_of_its_own() -> None:
    model = CAPTURES["leaf"]()
    nmfx.freeze(model)
    copy = deepcopy(model)
    nmfx.unfreeze(copy)
    nmfx.set_lambda(copy, 0.5)
    nmfx.set_pattern(copy, "1:8")
    assert states(model) == ["frozen", "frozen"]
    assert lambdas(model) == [2e-4, 2e-4]
    nmfx.unfreeze(model)
    assert_masks_are(model, "2:4", "2:4")


def test_freeze_refuses_the_meta_device_and_changes_nothing() -> None:
    model = CAPTURES["leaf"]()
    model[2].to("meta")
    with pytest.raises(nmfx.NMError) as error:
        nmfx.freeze(model)
    assert str(error.value) == "2.weight: it is on the meta device, so it has no mask yet"
    assert states(model) == ["sparse", "sparse"]


@captures
def test_masks_are_snapshots(capture: str) -> None:
    model = CAPTURES[capture]()
    for prepare in (lambda: None, lambda: nmfx.freeze(model)):
        prepare()
        first = nmfx.masks(model)
        for name, mask in first.items():
            assert mask.dtype == torch.bool, mask.dtype
            assert mask.shape == model.get_parameter(name).shape, name
            assert not mask.requires_grad
            mask.fill_(False)
        for name, mask in nmfx.masks(model).items():
            assert mask.sum() * 2 == mask.numel(), f"{name}: a caller wrote into the live mask"
