"""Tensor-parallel models that `lower` could get wrong: what reads its layers, and interruptions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_net import (
    RULES,
    Block,
    X,
    check_equal,
    copied,
    dense,
    train,
    whole_batch,
)
from distributed_tp import before, mesh_of_all, parallel
from distributed_tp_lower import LAYERS, check_outputs, parts, states
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import nmfx
from nmfx.capture import parts as capture_parts


class Reading(Block):
    """Reads what its layers are and have."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.norm(x).to(self.fc1.weight.dtype))
        if self.fc1.bias is not None and isinstance(self.fc1, nn.Linear):
            y = y + 5 * self.fc1.bias.to_local()
        y = self.fc2(torch.tanh(y))
        return x + y * self.fc2.weight.shape[1] + self.penalty() + self.fc2.bias.to_local().sum()

    def penalty(self) -> Tensor:
        return self.fc1.weight.full_tensor().abs().sum()


def reading(block: type[Block] = Reading) -> nn.Module:
    net = dense(24)
    for old in net.blocks:
        old.__class__ = block
    return parallel(nmfx.sparsify(net, RULES))


def check_tp_lower_layers_that_are_read() -> None:
    for model in (reading(), before(24)):
        for block in model.blocks:
            block.fc1.register_forward_hook(lambda m, args, out: out + m.bias.to_local())
        folded = nmfx.fold(model)
        fast = nmfx.lower(model, (X,), tune=False)
        assert parts(fast) == LAYERS
        check_outputs(fast, folded)
        for ours, plain in zip(fast.blocks, folded.blocks, strict=True):
            for layer in ("fc1", "fc2"):
                mine, wanted = getattr(ours, layer), getattr(plain, layer)
                assert type(mine).__name__ == "Linear"
                for name in ("weight", "bias"):
                    found, other = getattr(mine, name), getattr(wanted, name)
                    assert found.placements == other.placements
                    assert torch.equal(found.full_tensor(), other.full_tensor())
        with pytest.raises(KeyError, match="weight"):
            fast.blocks[0].fc1.weight = nn.Parameter(torch.zeros(24, 16))
        assert "columns of the weight, part " in str(fast.blocks[0].fc2)


class Scaled(nn.Linear):
    """Computes otherwise than nn.Linear does."""

    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """Has what a part would be called."""

    part = "of a whole"


class Attention(nn.Module):
    """Its `out_proj` is read, and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        whole = DTensor.from_local(self.fc(x), mesh_of_all(), [Replicate()], run_check=False)[None]
        return self.inner(whole, whole, whole)[0].full_tensor()


def check_tp_lower_layers_that_stay() -> None:
    """They are whole DTensors, with the reason in the report; the others are lowered."""
    for cls, reason in (
        (Scaled, "Scaled computes in a forward of its own"),
        (Named, "it has an attribute part of its own"),
    ):
        net = dense(24)
        net.blocks[0].fc1.__class__ = cls
        model = parallel(nmfx.sparsify(net, RULES))
        fast = nmfx.lower(model, (X,), tune=False)
        assert parts(fast) == LAYERS[1:]
        (row,) = (row for row in nmfx.report(fast).rows if row.fqn == "blocks.0.fc1.weight")
        assert reason in row.reason, row
        check_outputs(fast, nmfx.fold(model))
    torch.manual_seed(2)
    model = nmfx.sparsify(Attention(), {"inner*": "2:4", "fc": "2:4"})
    for name, parameter in list(model.inner.named_parameters()):
        owner, _, key = name.rpartition(".")
        place = Shard(1) if name == "out_proj.weight" else Replicate()
        placed = distribute_tensor(parameter.detach(), mesh_of_all(), [place])
        model.inner.get_submodule(owner).register_parameter(key, nn.Parameter(placed))
    fast = nmfx.lower(model, (X,), tune=False)
    assert not parts(fast)
    assert states(fast)["fc.weight"] == "packed", states(fast)
    torch.testing.assert_close(fast(X), nmfx.fold(model)(X))


@contextlib.contextmanager
def interrupted(function: str, number: int) -> Iterator[None]:
    """Ctrl-C at the call with this number of a function of capture/parts.py."""
    real, count = getattr(capture_parts, function), 0

    def broken(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_parts, function, broken)
        yield


def check_tp_lower_interrupted_while_it_splits() -> None:
    for function, number in (("_move_marks", 2), ("part_class", 2), ("whole_of", 1)):
        model = train(before(24), whole_batch)
        folded = nmfx.fold(model)
        with interrupted(function, number), contextlib.suppress(KeyboardInterrupt):
            nmfx.lower(model, (X,), inplace=True, tune=False)
        back = nmfx.fold(model) if parts(model) else model
        check_equal(back, folded)
        check_outputs(back, folded)


def check_tp_fold_interrupted_while_it_joins() -> None:
    for number in (1, 3):
        fast = nmfx.lower(before(24), (X,), tune=False)
        nmfx.sparsify(fast, {"head": "2:4"})
        wanted = nmfx.fold(fast)
        with interrupted("_parameter", number), pytest.raises(KeyboardInterrupt):
            nmfx.fold(fast, inplace=True)
        assert not parts(fast)
        check_equal(fast, wanted)


def check_tp_lower_first_run_fails() -> None:
    """Nothing was written, so parameters are the same objects."""
    model = parallel(nmfx.fold(nmfx.sparsify(dense(24), RULES)))
    parameters = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="normalized_shape"):
        nmfx.lower(model, (X[:, :3],), inplace=True)
    found = dict(model.named_parameters())
    assert list(found) == list(parameters)
    assert all(found[name] is parameters[name] for name in parameters)


def check_tp_lower_under_modes() -> None:
    model = nmfx.fold(before(24))
    folded, fast = copied(model), nmfx.lower(model, (X,), tune=False)
    dtypes = []
    for one in (folded, fast):
        one.blocks[0].fc2.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            one(X)
    assert dtypes == [torch.bfloat16] * 2
    with torch.inference_mode():
        back = nmfx.fold(nmfx.lower(folded, (X,), tune=False))
        torch.testing.assert_close(back(X), folded(X))
        nmfx.fold(nmfx.lower(model, (X,), tune=False, inplace=True), inplace=True)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def check_tp_fold_and_lower_under_inference_mode() -> None:
    """Of parameters that were made outside of it."""
    for verb in (nmfx.fold, lambda model, **how: nmfx.lower(model, (X,), tune=False, **how)):
        model = before(24)
        folded = nmfx.fold(model)
        with torch.inference_mode():
            verb(model, inplace=True)
        check_equal(nmfx.fold(model) if parts(model) else model, folded)
        assert not any(parameter.is_inference() for parameter in model.parameters())


def check_tp_lower_two_meshes() -> None:
    """One layer is cut on a mesh of one rank, the other on both, and one rank has N:M rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        rows = net[1].weight[:8]
        rows *= nmfx.nm_mask(rows, "2:4", 1)
    parallelize_module(net, mesh["tp"], {"0": ColwiseParallel()})
    parallelize_module(net, mesh["dp"], {"1": ColwiseParallel(output_layouts=Replicate())})
    fast = nmfx.lower(net, (X,), tune=False)
    wanted = "packed" if dist.get_rank() == 0 else "dense"
    assert states(fast)["1.part.weight"] == wanted
    check_outputs(fast, net)


class Branching(nn.Module):
    """Has a higher-order operator."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return torch.cond(y.sum() > 0, lambda a: a * 2, lambda a: a * 3, (y,))


def check_lower_listens_to_branches() -> None:
    model = nmfx.sparsify(Branching(), "2:4")
    with torch.no_grad():
        torch.testing.assert_close(nmfx.lower(model, (X,), tune=False)(X), nmfx.fold(model)(X))
