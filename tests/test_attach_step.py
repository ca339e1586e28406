"""What an attached optimizer's step costs and which tensors it takes: one pass, and shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from decay import sgd, sparse
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import nmfx


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def step_operators(model: nn.Module, *, attached: bool) -> list[str]:
    optimizer = sgd(model)
    if attached:
        nmfx.attach(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Operators() as seen:
        optimizer.step()
    return seen.names


def test_the_decay_of_a_layer_is_one_operator_in_place() -> None:
    plain, attached = (step_operators(sparse(), attached=flag) for flag in (False, True))
    for name in plain:
        attached.remove(name)
    assert attached.count("nmfx.sr_ste_decay_.default") == 2, attached
    # The rest makes and fills the 16 bytes of [lambda, N] that layers of a schedule share.
    assert set(attached) <= {
        "nmfx.sr_ste_decay_.default",
        "aten.empty.memory_format",
        "aten.detach.default",
        "aten.lift_fresh.default",
    }, attached


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def sharded(mesh: DeviceMesh, dim: int, columns: int = 16) -> tuple[nn.Linear, Tensor]:
    """A sparse layer with weight and gradient sharded along `dim`; its weight in one piece."""
    layer = nmfx.sparsify(nn.Linear(columns, 8, bias=False), {"*": "2:4"}, lambda_w=0.5)
    whole = layer.weight.detach().clone()
    layer.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None))
    ones = torch.ones(8, columns)  # nothing is sent: there is nobody else
    layer.weight.grad = distribute_tensor(ones, mesh, [Shard(dim)], src_data_rank=None)
    return layer, whole


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_gets_the_decay_of_its_part(mesh: DeviceMesh, dim: int) -> None:
    layer, whole = sharded(mesh, dim)
    optimizer = sgd(layer)
    nmfx.attach(layer, optimizer)
    optimizer.step()
    wanted = 1.0 + 0.5 * (~nmfx.mask.nm_mask(whole, "2:4", 1) * whole)
    torch.testing.assert_close(layer.weight.grad.to_local(), wanted.chunk(2, dim)[0])


def test_a_group_on_two_ranks_is_gathered_and_cut_again(mesh: DeviceMesh) -> None:
    # The values are those of a real process group: test_distributed.py, tp_equals_one_process.
    layer, _ = sharded(mesh, 1, columns=12)
    optimizer = sgd(layer)
    nmfx.attach(layer, optimizer)
    optimizer.step()
    assert layer.weight.grad.placements == layer.weight.placements == (Shard(1),)
    assert layer.weight.grad.to_local().shape == (8, 6)
