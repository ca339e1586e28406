"""What must hold under tensor parallelism, on two ranks that see the same batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from distributed_net import (
    LAMBDA,
    RULES,
    X,
    check_close,
    check_same_masks,
    dense,
    loss_of,
    refuses,
    sparse,
    train,
    weights,
    whole,
    whole_batch,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import nmfx

PLAN = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def parallel(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = mesh_of_all() if mesh is None else mesh
    for block in model.blocks:
        parallelize_module(block, mesh, PLAN)
    return model


def before(inner: int = 24) -> nn.Module:
    return parallel(sparse(inner))


def after(inner: int = 24) -> nn.Module:
    return nmfx.sparsify(parallel(dense(inner)), RULES, lambda_w=LAMBDA)


# Columns of fc2 on each rank: 12 + 12 and 16 + 16 cut no group of 4; 14 + 14 and 10 + 10 do.
WIDTHS = (24, 32, 28, 20)


def check_tp_equals_one_process() -> None:
    for attached in (False, True):
        for inner in WIDTHS:
            one = train(sparse(inner), whole_batch, attached)
            make = before if attached ^ (inner in (24, 28)) else after
            model = train(make(inner), whole_batch, attached)
            check_close(model, one, f"{make.__name__} {inner} attached={attached}")
            check_same_masks(model)
            placed = model.blocks[0].fc2.weight
            assert placed.placements == placed.grad.placements == (Shard(1),), placed.grad


def check_tp_uneven_shards() -> None:
    """9 columns as 5 + 4 in groups of 3, 7 rows as 4 + 3; a group of all columns."""
    for sizes, pattern in (((9, 7), "1:3"), ((15, 3), "2:3"), ((6, 5), "1:6")):
        columns, rows = sizes
        torch.manual_seed(8)
        plain = nn.Sequential(nn.Linear(16, columns), nn.Linear(columns, rows), nn.Linear(rows, 8))
        rules = {"0": "2:4", "1": pattern}
        one = nmfx.sparsify(copy.deepcopy(plain), rules, lambda_w=LAMBDA)
        for style in (RowwiseParallel(), ColwiseParallel(output_layouts=Replicate())):
            model = nmfx.sparsify(copy.deepcopy(plain), rules, lambda_w=LAMBDA)
            first = ColwiseParallel(output_layouts=Replicate())
            if isinstance(style, RowwiseParallel):
                first = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
            plan = {"0": first, "1": style}
            parallelize_module(model, mesh_of_all(), plan)
            for attached in (False, True):
                single = train(copy.deepcopy(one), whole_batch, attached)
                many = train(copy.deepcopy(model), whole_batch, attached)
                check_close(many, single, f"{sizes} {style} attached={attached}")
                assert nmfx.sad(nmfx.masks(many), nmfx.masks(single)).total == 0


class Sequence(nn.Module):
    """Each rank has a part of the sequence between the layers."""

    def __init__(self, net: nn.Module, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.net, self.mesh = net, mesh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(2, 4, 16)
        if self.mesh is not None:
            x = x.chunk(2, 1)[dist.get_rank()]
        x = self.net.blocks(x)
        if self.mesh is not None:
            x = DTensor.from_local(x, self.mesh, [Shard(1)], run_check=False).full_tensor()
        return self.net.head(x).view(8, 8)


def check_tp_sequence_parallel() -> None:
    plan = {
        "norm": SequenceParallel(use_local_output=True),
        "fc1": ColwiseParallel(input_layouts=Shard(1)),
        "fc2": RowwiseParallel(output_layouts=Shard(1)),
    }
    one, mesh = train(Sequence(sparse(28), None), whole_batch), mesh_of_all()
    model = Sequence(sparse(28), mesh)
    for block in model.net.blocks:
        parallelize_module(block, mesh, plan)
    check_close(train(model, whole_batch), one)


def check_tp_partial_gradients_get_one_decay() -> None:
    """A weight on every rank, and a batch that ranks share: gradients are sums yet to be made."""
    mesh = mesh_of_all()
    for attached in (False, True):
        torch.manual_seed(9)
        plain = nn.Linear(16, 8)
        model = nmfx.sparsify(copy.deepcopy(plain), {"": "2:4"}, lambda_w=LAMBDA)
        one = nmfx.sparsify(copy.deepcopy(plain), {"": "2:4"}, lambda_w=LAMBDA)
        for name, parameter in list(model.named_parameters()):
            everywhere = distribute_tensor(parameter.detach(), mesh, [Replicate()])
            model.register_parameter(name, nn.Parameter(everywhere))
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (model, one)]
        if attached:
            nmfx.attach(model, optimizers[0])
            nmfx.attach(one, optimizers[1])
        model(distribute_tensor(X, mesh, [Shard(0)])).square().sum().backward()
        one(X).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(whole(model.weight.grad), one.weight.grad)


def check_tp_clip() -> None:
    """Of the sharded weights: torch clips no mixture of those and others."""

    def clipped(model: nn.Module) -> None:
        whole_batch(model)
        sharded = [
            p for name, p in model.named_parameters() if ".fc" in name and "bias" not in name
        ]
        norm = torch.nn.utils.clip_grad_norm_(sharded, 0.05)
        assert whole(norm) > 0.1, norm

    one = train(sparse(28), clipped, attached=True)
    check_close(train(before(28), clipped, attached=True), one)


def check_tp_verbs() -> None:
    for inner in (24, 28):  # groups on one rank, and on two
        one, model = sparse(inner), before(inner)
        nmfx.freeze(one)
        nmfx.freeze(model)
        fixed = nmfx.masks(one)
        assert nmfx.sad(fixed, nmfx.masks(model)).total == 0
        check_close(train(model, whole_batch), train(one, whole_batch), f"frozen {inner}")
        state = nmfx.state_dict(model)
        assert all(torch.equal(state["masks"][name], mask) for name, mask in fixed.items())
        nmfx.unfreeze(model)
        nmfx.load_state_dict(model, state)
        copied = nmfx.fold(model)
        nmfx.unfreeze(one)
        nmfx.unfreeze(model)
        nmfx.set_pattern(one, "1:4")
        nmfx.set_pattern(model, "1:4")
        folded = nmfx.fold(model)
        assert type(folded.blocks[0].fc1) is nn.Linear
        values, frozen = weights(folded), weights(copied)
        for name, masked in weights(nmfx.fold(one)).items():
            assert torch.equal(values[name] == 0, masked == 0), name
        for name, mask in fixed.items():
            assert not frozen[name].masked_fill(mask, 0.0).any(), name
        torch.testing.assert_close(folded(X), model(X))
        before_fold = model(X)
        nmfx.fold(model, inplace=True)
        torch.testing.assert_close(model(X), before_fold)


def check_tp_monitor() -> None:
    refuses("nmfx.Monitor(model, every=100)", lambda: nmfx.Monitor(before(28)))
    nmfx.Monitor(before(24))
    for inner in (24, 28):
        model = before(inner)
        monitor, first = nmfx.Monitor(model, every=1), nmfx.masks(model)
        train(model, whole_batch)
        measured = monitor.step()
        assert measured["nmfx/density"] == 0.5, measured
        name = "blocks.1.fc2.weight"
        flips = nmfx.sad(first, nmfx.masks(model)).per_layer[name]
        mine = measured[f"nmfx/sad_since_start/{name}"]
        if inner == 28:  # groups lie on both ranks: each counts all
            assert round(mine * 16 * 28) == flips > 0, (mine, flips)
        else:
            both = torch.tensor(mine * 16 * 12, dtype=torch.float64)
            dist.all_reduce(both)
            assert round(float(both)) == flips > 0, (both, flips)


def check_tp_refusals() -> None:
    model = before(28)
    values, classes = weights(model), [type(module) for module in model.modules()]
    refuses("before the model is sharded", lambda: nmfx.preview(model, "2:4", (X,)))
    refuses("before the model is sharded", lambda: nmfx.verify(model, X))
    refuses("get_model_state_dict", lambda: nmfx.save(model, "/nowhere.safetensors"))
    for name, value in weights(model).items():
        assert torch.equal(value, values[name]), name
    assert [type(module) for module in model.modules()] == classes


def check_tp_autocast() -> None:
    one, model = sparse(28), before(28)
    for m in (one, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(m).backward()
    found = {name: whole(p.grad) for name, p in model.named_parameters()}
    for name, parameter in one.named_parameters():
        near = 0.02 * float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=0.02, atol=near, msg=name)


def check_tp_compiled() -> None:
    for inner in (24, 28):
        one = train(sparse(inner), whole_batch)
        model = before(inner)
        compiled: Any = torch.compile(model, fullgraph=True)
        train(compiled, whole_batch)
        check_close(model, one, f"compiled {inner}")
