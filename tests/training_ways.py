"""Ways to train: what an attached optimizer must get through with its decay intact."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

import nmfx

LAMBDA = 0.5


class Mlp(nn.Module):
    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.calls = calls
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = torch.tanh(self.body(x))
        return self.head(x)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": model.body.parameters(), "lr": 0.01},
        {"params": [model.head.weight], "lr": 0.1, "weight_decay": 0.01},
        {"params": [model.head.bias]},
    ]


@dataclass(frozen=True)
class Way:
    """A way to train."""

    optimizer: Callable[[nn.Module], Optimizer]
    model: Callable[[], nn.Module] = Mlp
    accumulate: int = 1
    clip: float | None = None
    scaler: bool = False
    unscale: bool = False
    closure: str | None = None
    dtype: torch.dtype = torch.float32
    loss_scale: float = 1.0
    # What becomes of lambda without attach: the reason for attach, and proof that this table could
    # show something else than 1.
    inside: float | None = 1.0
    tolerance: dict[str, float] = field(default_factory=dict)


def sgd(**kwargs: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: SGD(model.parameters(), lr=0.05, **kwargs)


def adam(kind: type[Optimizer], **kwargs: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: kind(model.parameters(), lr=0.01, **kwargs)


FP16 = 2.0**-16
HALF = {"rtol": 5e-3, "atol": 2e-3}

WAYS: dict[str, Way] = {
    "SGD": Way(sgd()),
    "SGD, momentum and weight decay": Way(sgd(momentum=0.9, weight_decay=0.01)),
    "4-step accumulation": Way(sgd(), accumulate=4, inside=4.0),
    "clip_grad_norm_ to 0.01": Way(sgd(), clip=0.01, inside=None),
    "module called twice": Way(sgd(), model=lambda: Mlp(calls=2), inside=None),
    "several parameter groups": Way(lambda model: SGD(groups(model), lr=0.05)),
    "SGD, foreach": Way(sgd(foreach=True)),
    "Adam, foreach": Way(adam(Adam, foreach=True)),
    "SGD, fused": Way(sgd(fused=True, momentum=0.9)),
    "Adam, fused": Way(adam(Adam, fused=True)),
    "AdamW, fused": Way(adam(AdamW, fused=True)),
    "Adagrad, fused": Way(adam(Adagrad, fused=True)),
    "GradScaler": Way(sgd(), scaler=True, inside=FP16),
    "GradScaler, unscale_, clip": Way(sgd(), scaler=True, unscale=True, clip=0.01, inside=None),
    "GradScaler, 4-step accumulation": Way(sgd(), scaler=True, accumulate=4, inside=4 * FP16),
    "GradScaler, SGD fused": Way(sgd(fused=True), scaler=True, inside=FP16),
    "GradScaler, Adam fused": Way(adam(Adam, fused=True), scaler=True, inside=FP16),
    "GradScaler, AdamW fused": Way(adam(AdamW, fused=True), scaler=True, inside=FP16),
    "GradScaler, AdamW fused, unscale_, clip": Way(
        adam(AdamW, fused=True), scaler=True, unscale=True, clip=0.01, inside=None
    ),
    "GradScaler, SGD fused, float16 weights": Way(
        sgd(fused=True),
        scaler=True,
        dtype=torch.float16,
        loss_scale=2.0**-12,
        inside=None,
        tolerance=HALF,
    ),
    "SGD, bfloat16 weights": Way(sgd(), dtype=torch.bfloat16, loss_scale=2.0**-6, tolerance=HALF),
    "step(closure)": Way(sgd(), closure="positional"),
    "step(closure=closure)": Way(adam(Adam), closure="keyword"),
}


def sparse(way: Way) -> nn.Module:
    return nmfx.sparsify(way.model().to(way.dtype), {"body": "2:4", "head": "2:4"}, lambda_w=LAMBDA)


def accumulate(
    model: nn.Module, way: Way, seed: int, scale: Callable = lambda loss: loss
) -> Tensor:
    """The micro-batches of one step, with their backwards."""
    torch.manual_seed(seed)
    for _ in range(way.accumulate):
        x = torch.randn(6, 16).to(way.dtype)
        loss = model(x).float().square().sum() * way.loss_scale
        scale(loss).backward()
    return loss


def step(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    way: Way,
    seed: int,
) -> None:
    """One step of a training loop as users write it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        return accumulate(model, way, seed)

    if way.closure == "positional":
        optimizer.step(closure)
        return
    if way.closure == "keyword":
        optimizer.step(closure=closure)
        return
    optimizer.zero_grad()
    accumulate(model, way, seed, scaler.scale)
    if way.unscale:
        scaler.unscale_(optimizer)
    if way.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), way.clip)
    scaler.step(optimizer)
    scaler.update()


def plain_gradients(model: nn.Module, way: Way, seed: int) -> dict[str, Tensor]:
    """The gradients that the same step would use with lambda 0."""
    twin = deepcopy(model)
    nmfx.set_lambda(twin, 0.0)
    twin.zero_grad()
    accumulate(twin, way, seed)
    if way.clip is not None:
        nn.utils.clip_grad_norm_(twin.parameters(), way.clip)
    return {name: parameter.grad for name, parameter in twin.named_parameters()}
