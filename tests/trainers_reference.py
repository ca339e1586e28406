"""A small model for every trainer, and its training worked out in plain torch, without nmfx."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from masked_reference import nm_mask
from torch import Tensor, nn

LAMBDA = 0.5  # large: a decay that counts twice, or not at all, shows at once
LR = 0.05
RULES = {"fc1": "2:4", "fc2": "2:4"}
WEIGHTS = ("fc1.weight", "fc2.weight")


class Net(nn.Module):
    """Gives its loss, as Hugging Face's Trainer expects it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.fc2(torch.tanh(self.fc1(x)))
        return {"loss": F.mse_loss(logits, labels), "logits": logits}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def rows(n: int = 64) -> list[dict[str, Tensor]]:
    make = torch.Generator().manual_seed(3)
    x = torch.randn(n, 16, generator=make)
    return [{"x": one, "labels": one[:4].roll(1)} for one in x]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class Recording:
    """A collate function that remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append(collate(items))
        return self.batches[-1]


def trained(
    model: Net,
    batches: list[dict[str, Tensor]],
    *,
    accumulate: int = 1,
    clip: float | None = None,
    lambda_w: Any = LAMBDA,
) -> dict[str, Tensor]:
    """The parameters after plain SGD on 2:4 masked weights, by definition.

    The decay is added once per step, after clipping. `model` is dense and stays as it is.
    """
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(len(batches) // accumulate):
        for value in values.values():
            value.requires_grad_().grad = None
        masks = {name: nm_mask(values[name], 2, 4, 1) for name in WEIGHTS}
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            straight = {
                # The value of the masked weight, the gradient of the weight.
                name: value + (value.detach().masked_fill(~masks[name], 0.0) - value.detach())
                if name in masks
                else value
                for name, value in values.items()
            }
            out = torch.func.functional_call(model, straight, (batch["x"], batch["labels"]))
            (out["loss"] / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(values.values(), clip)
        strength = lambda_w(step) if callable(lambda_w) else lambda_w
        with torch.no_grad():
            for name, mask in masks.items():
                values[name].grad += strength * values[name].masked_fill(mask, 0.0)
        values = {name: (v - LR * v.grad).detach() for name, v in values.items()}
    return values


LOOSE = {"rtol": 5e-2, "atol": 5e-3}  # for training in bfloat16, against float32


def assert_trained(
    model: nn.Module, expected: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-6
) -> None:
    for name, value in expected.items():
        found = model.get_parameter(name).detach()
        torch.testing.assert_close(found, value, rtol=rtol, atol=atol, msg=name)


def assert_identical(one: Any, other: Any, where: str = "") -> None:
    """The same types and the same bits, all the way down."""
    assert type(one) is type(other), (where, one, other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), f"{where}: {int((one != other).sum())} elements differ"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), (where, one.keys() ^ other.keys())
        for key in one:
            assert_identical(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_identical(left, right, f"{where}/{number}")
    else:
        assert one == other, (where, one, other)
