"""What copies, schedules and the other verbs make of an attachment."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy

import pytest
import torch
from decay import LAMBDA, X, at_step, backward, both, in_backward, sgd, sparse
from torch import nn

import nmfx


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_attach_does_not_follow_copies(how: str) -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    if how == "deepcopy":
        copy = deepcopy(model)
    elif how == "pickle":
        copy = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copy = torch.load(file, weights_only=False)
    assert in_backward(copy) == both(1.0)
    assert not any(row.attached for row in nmfx.report(copy))
    assert at_step(copy, sgd(copy)) == both(1.0)
    assert in_backward(model) == both(0.0), "the original lost its attachment"
    assert at_step(model, optimizer) == both(1.0)


def test_attach_does_not_follow_a_copied_graph_module() -> None:
    model = nmfx.sparsify(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 4))), "2:4")
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    copy = deepcopy(model)
    assert [row.attached for row in nmfx.report(model)] == [True]
    assert [row.attached for row in nmfx.report(copy)] == [False]


def traces(model: nn.Module) -> list[str]:
    return [f"{fqn}.{key}" for fqn, m in model.named_modules() for key in vars(m) if "_nmfx" in key]


@pytest.mark.parametrize("verb", ["unsparsify", "fold", "fold in place", "lower in place"])
def test_attach_leaves_no_trace_after(verb: str) -> None:
    model = sparse()
    optimizer = sgd(model)
    handle = nmfx.attach(model, optimizer)
    if verb == "unsparsify":
        result = nmfx.unsparsify(model)
    elif verb == "lower in place":
        result = nmfx.lower(model, inplace=True, tune=False)
    else:
        result = nmfx.fold(model, inplace=verb == "fold in place")
    if verb != "lower in place":
        assert not traces(result), traces(result)
    assert not any(row.attached for row in nmfx.report(result))

    result.zero_grad()
    result(X).square().sum().backward()
    before = {name: p.grad.clone() for name, p in result.named_parameters()}
    optimizer.step()  # the hook that is left adds nothing
    for name, parameter in result.named_parameters():
        assert torch.equal(parameter.grad, before[name]), name
    assert (handle.parameters == []) == (result is model), handle.parameters
    handle.remove()


def test_attach_survives_fold_and_lower_of_a_copy() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    nmfx.fold(model)
    nmfx.lower(model, tune=False)
    assert in_backward(model) == both(0.0)
    assert at_step(model, optimizer) == both(1.0)


def test_attach_does_not_outlive_unsparsify_and_sparsify_again() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    nmfx.unsparsify(model)
    nmfx.sparsify(model, {"0": "2:4", "2": "2:4"}, lambda_w=LAMBDA)
    assert in_backward(model) == both(1.0)
    assert at_step(model, optimizer) == both(1.0)


def test_attach_ignores_layers_sparsified_later() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    nmfx.sparsify(model, {"0": "2:4"}, lambda_w=LAMBDA)
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    nmfx.sparsify(model, {"0": "2:4", "2": "2:4"}, lambda_w=LAMBDA)
    assert in_backward(model) == {"0.weight": 0.0, "2.weight": 1.0}
    assert at_step(model, optimizer) == both(1.0)


def test_attach_decays_no_frozen_layer() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    nmfx.freeze(model)
    backward(model)
    optimizer.step()
    for name, mask in nmfx.masks(model).items():
        assert not model.get_parameter(name).grad[~mask].any(), name
    nmfx.unfreeze(model)
    assert in_backward(model) == both(0.0)
    assert at_step(model, optimizer) == both(1.0)


def test_attach_follows_the_schedule() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    nmfx.set_lambda(model, 2 * LAMBDA)
    assert in_backward(model) == both(0.0)
    assert at_step(model, optimizer) == both(2.0)
    nmfx.set_pattern(model, "1:8")
    assert at_step(model, optimizer) == both(2.0)
    nmfx.set_lambda(model, 0.0)
    assert at_step(model, optimizer) == both(0.0)


def test_attach_survives_loading_an_optimizer_state() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}, state.keys()
    optimizer.load_state_dict(state)
    assert at_step(model, optimizer) == both(1.0)


def test_attach_does_not_follow_a_pickled_optimizer() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    other, other_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    assert at_step(other, other_optimizer) == both(1.0)
