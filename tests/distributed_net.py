"""A small model, its data, and the training of one process that many must equal."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nmfx

STEPS = 5
LAMBDA = 0.05
RULES = {"*.fc*": "2:4"}

_GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(8, 16, generator=_GENERATOR)
Y = torch.randn(8, 8, generator=_GENERATOR)


class Block(nn.Module):
    """Two linear layers; the inner width is not a multiple of the number of ranks."""

    def __init__(self, width: int = 16, inner: int = 28) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Two blocks and a head; `reentrant` is how blocks are checkpointed, None if they are not."""

    def __init__(self, inner: int = 28) -> None:
        super().__init__()
        self.reentrant: bool | None = None
        self.blocks = nn.Sequential(Block(inner=inner), Block(inner=inner))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.blocks(x))
        for block in self.blocks:
            x = checkpoint(block, x.requires_grad_(), use_reentrant=self.reentrant)
        return self.head(x)


def dense(inner: int = 28) -> Net:
    torch.manual_seed(1)
    return Net(inner)


def sparse(inner: int = 28, lambda_w: float = LAMBDA) -> nn.Module:
    return nmfx.sparsify(dense(inner), RULES, lambda_w=lambda_w)


def loss_of(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return (model(x) - y).square().mean()


def part(tensor: Tensor, rank: int | None = None) -> Tensor:
    """This rank's share of a global batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank() if rank is None else rank]


def my_loss(model: nn.Module) -> Tensor:
    return loss_of(model, part(X), part(Y))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def train(
    model: nn.Module,
    gradients: Callable[[nn.Module], Any],
    attached: bool = False,
    clip: float | None = None,
    steps: int = STEPS,
) -> nn.Module:
    """`steps` steps of AdamW; `gradients` fills the gradients."""
    optimizer = adamw(model)
    if attached:
        nmfx.attach(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        gradients(model)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def halves(model: nn.Module) -> None:
    """The gradients of all ranks' shares, averaged as DDP and FSDP2 do it: equal bit for bit."""
    world = dist.get_world_size()
    sums: list[Tensor | None] = [None for _ in model.parameters()]
    for rank in range(world):
        model.zero_grad()
        loss_of(model, part(X, rank), part(Y, rank)).backward()
        for i, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            before = sums[i]
            grad = parameter.grad / world
            sums[i] = grad if before is None else before + grad
    for parameter, grad in zip(model.parameters(), sums, strict=True):
        parameter.grad = grad


def whole_batch(model: nn.Module) -> None:
    loss_of(model).backward()


def my_part(model: nn.Module) -> None:
    my_loss(model).backward()


def whole(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def plain(name: str) -> str:
    """Without what wrappers add."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("module.", "")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by their plain names, gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {plain(name): whole(value).clone() for name, value in model.named_parameters()}


def check_equal(model: nn.Module, wanted: nn.Module | dict[str, Tensor], what: str = "") -> None:
    """Bit for bit."""
    found = weights(model)
    wanted = wanted if isinstance(wanted, dict) else weights(wanted)
    assert found.keys() == wanted.keys(), (found.keys(), wanted.keys())
    for name, value in wanted.items():
        assert torch.equal(found[name], value), (
            f"{what} {name}: {(found[name] - value).abs().max()} of {value.abs().max()}"
        )


def check_close(
    model: nn.Module, wanted: nn.Module, what: str = "", tolerance: float = 2e-5
) -> None:
    """In another order of sums."""
    found, others = weights(model), weights(wanted)
    assert found.keys() == others.keys(), (found.keys(), others.keys())
    for name, value in others.items():
        difference = float((found[name] - value).abs().max())
        assert difference <= tolerance, f"{what} {name}: {difference}"


def check_same_masks(model: nn.Module) -> dict[str, Tensor]:
    """Masks are those of the gathered weights, on all ranks."""
    found, gathered = nmfx.masks(model), weights(model)
    assert found, "no masks"
    for name, mask in found.items():
        assert type(mask) is Tensor, (name, type(mask))
        assert torch.equal(mask, nmfx.nm_mask(gathered[plain(name)], "2:4", 1)), name
        every = [torch.empty_like(mask) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mask.contiguous())
        assert all(torch.equal(other, mask) for other in every), name
    return found


def refuses(message: str, act: Callable[[], object]) -> None:
    """`act` raises an NMError with `message` in it."""
    with pytest.raises(nmfx.NMError, match=re.escape(message)):
        act()


def one_process(
    gradients: Callable[[nn.Module], Any] = halves, inner: int = 28, **how: Any
) -> nn.Module:
    return train(sparse(inner), gradients, **how)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
