"""How often a small model's gradients hold the SR-STE decay: measured, never assumed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim import SGD

import nmfx

LAMBDA = 0.5
X = torch.linspace(-1, 1, 96).view(6, 16)


def sparse() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    return nmfx.sparsify(model, {"0": "2:4", "2": "2:4"}, lambda_w=LAMBDA)


def sgd(model: nn.Module) -> SGD:
    """The rate is 0, so that several steps see the same weights."""
    return SGD(model.parameters(), lr=0.0)


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(X).square().sum().backward()


def plain_gradients(model: nn.Module) -> dict[str, Tensor]:
    twin = deepcopy(model)
    nmfx.set_lambda(twin, 0.0)
    backward(twin)
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


def decays(model: nn.Module, act: Callable[[], object]) -> dict[str, float]:
    """What `act` leaves in the gradients of sparse weights, as multiples of the decay at LAMBDA."""
    plain = plain_gradients(model)
    masks = nmfx.masks(model)
    weights = {name: model.get_parameter(name).detach().clone() for name in masks}
    act()
    found = {}
    for name, weight in weights.items():
        decay = LAMBDA * weight.masked_fill(masks[name], 0.0)
        extra = model.get_parameter(name).grad - plain[name]
        found[name] = round(float((extra * decay).sum() / decay.square().sum()), 3)
        torch.testing.assert_close(extra, found[name] * decay, rtol=1e-3, atol=2e-5)
    return found


def in_backward(model: nn.Module) -> dict[str, float]:
    return decays(model, lambda: backward(model))


def at_step(model: nn.Module, *optimizers: SGD) -> dict[str, float]:
    def act() -> None:
        backward(model)
        for optimizer in optimizers:
            optimizer.step()

    return decays(model, act)


def both(value: float) -> dict[str, float]:
    return {"0.weight": value, "2.weight": value}
