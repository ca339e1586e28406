"""The life of an attachment: made, replaced, removed, refused.

The values are in `test_attach_lambda.py`, what later verbs make of it in `test_attach_verbs.py`.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from decay import at_step, backward, both, decays, in_backward, sgd, sparse
from torch import nn
from torch.optim import SGD

import nmfx


def test_attach_moves_the_decay_from_backward_to_the_step() -> None:
    model = sparse()
    optimizer = sgd(model)
    assert in_backward(model) == both(1.0)
    handle = nmfx.attach(model, optimizer)
    assert in_backward(model) == both(0.0)
    assert at_step(model, optimizer) == both(1.0)
    assert handle.parameters == ["0.weight", "2.weight"]
    assert [row.attached for row in nmfx.report(model)] == [True, True]


def test_attach_twice_counts_once() -> None:
    model = sparse()
    optimizer = sgd(model)
    first, second = nmfx.attach(model, optimizer), nmfx.attach(model, optimizer)
    assert at_step(model, optimizer) == both(1.0)
    assert first.parameters == []
    first.remove()  # the handle of a replaced attachment has no say any more
    assert at_step(model, optimizer) == both(1.0)
    second.remove()
    assert at_step(model, optimizer) == both(1.0)
    assert in_backward(model) == both(1.0)


def test_attach_to_a_new_optimizer_replaces_the_old_one() -> None:
    model = sparse()
    old, new = sgd(model), sgd(model)
    nmfx.attach(model, old)
    nmfx.attach(model, new)
    assert at_step(model, old) == both(0.0)
    assert at_step(model, new) == both(1.0)
    assert at_step(model, old, new) == both(1.0)


def test_attach_to_two_optimizers_that_share_the_model() -> None:
    model = sparse()
    first, second = sgd(model[0]), sgd(model[2])
    handles = [nmfx.attach(model, first), nmfx.attach(model, second)]
    assert [handle.parameters for handle in handles] == [["0.weight"], ["2.weight"]]
    assert at_step(model, first) == {"0.weight": 1.0, "2.weight": 0.0}
    assert at_step(model, second, first) == both(1.0)


def test_attach_leaves_weights_of_nobody_inside_backward() -> None:
    model = sparse()
    optimizer = sgd(model[2])
    nmfx.attach(model, optimizer)
    assert in_backward(model) == {"0.weight": 1.0, "2.weight": 0.0}
    assert at_step(model, optimizer) == both(1.0)


def test_attach_remove_moves_the_decay_back() -> None:
    model = sparse()
    optimizer = sgd(model)
    handle = nmfx.attach(model, optimizer)
    handle.remove()
    handle.remove()
    assert handle.parameters == []
    assert in_backward(model) == both(1.0)
    assert at_step(model, optimizer) == both(1.0)
    assert not optimizer._optimizer_step_pre_hooks, "a hook stayed behind"


def test_attach_to_a_deleted_optimizer_moves_the_decay_back() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    del optimizer
    gc.collect()
    assert in_backward(model) == both(1.0)
    assert not any(row.attached for row in nmfx.report(model))


def test_attach_keeps_neither_model_nor_optimizer_alive() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    seen = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_attach_skips_weights_without_a_gradient() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    backward(model)
    optimizer.step()
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)


def test_attach_works_below_a_scheduler_and_a_compiled_step() -> None:
    torch.compiler.reset()
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert at_step(model, optimizer) == both(1.0)

    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    compiled = torch.compile(optimizer.step, backend="aot_eager")

    def act() -> None:
        backward(model)
        compiled()

    assert decays(model, act) == both(1.0)
    torch.compiler.reset()


def test_attach_returns_what_the_closure_returns() -> None:
    model = sparse()
    optimizer = sgd(model)
    nmfx.attach(model, optimizer)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert optimizer.step(closure=lambda: 8.0) == 8.0
    assert optimizer.step() is None


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: (nn.Linear(8, 8), sgd(nn.Linear(8, 8))),
            "nmfx.attach: Linear has no sparsified layer; call nmfx.sparsify(model, '2:4') first",
        ),
        (
            lambda: (sgd(nn.Linear(8, 8)), sparse()),
            "nmfx.attach takes an nn.Module, got SGD",
        ),
        (
            lambda: (sparse(), [nn.Parameter(torch.ones(1))]),
            "nmfx.attach takes a torch.optim.Optimizer, got list",
        ),
        (
            lambda: (sparse(), sgd(sparse())),
            "SGD owns none of the sparsified weights; attach the optimizer that was built from "
            "model.parameters()",
        ),
    ],
    ids=["dense", "swapped", "no optimizer", "another model's"],
)
def test_attach_refuses(make: Callable, text: str) -> None:
    model, optimizer = make()
    with pytest.raises(nmfx.NMError) as error:
        nmfx.attach(model, optimizer)
    assert str(error.value) == text
    if isinstance(optimizer, SGD):
        assert not optimizer._optimizer_step_pre_hooks
    if isinstance(model, nn.Sequential):
        assert in_backward(model) == both(1.0)
