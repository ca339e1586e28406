"""FSDP2 x tensor parallel, hybrid sharding, and resharding to fewer ranks: on four ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed_mixed import POLICY, masks_of, rounded_twin, tie
from distributed_net import (
    LAMBDA,
    RULES,
    Net,
    X,
    Y,
    check_close,
    check_equal,
    check_same_masks,
    dense,
    halves,
    loss_of,
    my_part,
    part,
    refuses,
    sparse,
    train,
    weights,
)
from distributed_tp import parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import nmfx

BF16 = torch.bfloat16


def both(model: nn.Module, **options: object) -> nn.Module:
    """Tensor parallel on pairs of ranks, FSDP2 over the pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallel(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"], **options)
    return fully_shard(model, mesh=mesh["dp"], **options)


def share(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return X.chunk(2)[rank], Y.chunk(2)[rank]


def my_share(model: nn.Module) -> None:
    loss_of(model, *share(dist.get_rank() // 2)).backward()


def two_shares(model: nn.Module) -> None:
    for rank in range(2):
        (loss_of(model, *share(rank)) / 2).backward()


def reference(inner: int, attached: bool) -> nn.Module:
    """One process. In backward, the decay counts in each of the two halves of a step."""

    def gradients(model: nn.Module) -> None:
        nmfx.set_lambda(model, LAMBDA if attached else LAMBDA / 2)
        two_shares(model)

    return train(sparse(inner), gradients, attached)


def check_2d_equals_one_process() -> None:
    for inner in (24, 28):  # groups on one rank, and on two
        for attached in (False, True):
            first = attached ^ (inner == 24)
            model = both(sparse(inner) if first else dense(inner))
            if not first:
                nmfx.sparsify(model, RULES, lambda_w=LAMBDA)
            train(model, my_share, attached)
            check_close(model, reference(inner, attached), f"{first} {inner} attached={attached}")
            check_same_masks(model)
    assert model.blocks[0].fc2.weight.placements == (Shard(0), Shard(1))


def check_2d_clip() -> None:
    def clipped(model: nn.Module, gradients: object) -> None:
        gradients(model)
        sharded = [
            p for name, p in model.named_parameters() if ".fc" in name and "bias" not in name
        ]
        torch.nn.utils.clip_grad_norm_(sharded, 0.05)

    one = train(sparse(28), lambda m: clipped(m, two_shares), attached=True)
    check_close(train(both(sparse(28)), lambda m: clipped(m, my_share), attached=True), one)


def check_2d_verbs() -> None:
    for inner in (24, 28):
        one, again = reference(inner, True), both(sparse(inner))
        nmfx.freeze(again)
        fixed = nmfx.masks(again)
        train(again, my_share, steps=1)
        assert nmfx.sad(fixed, nmfx.masks(again)).total == 0
        nmfx.unfreeze(again)
        again.load_state_dict(both(sparse(inner)).state_dict())
        train(again, my_share, attached=True)
        monitor = nmfx.Monitor(again, every=1)
        assert monitor.step()["nmfx/density"] == 0.5
        refuses("is a DTensor", lambda m=again: nmfx.lower(m, (X,)))
        nmfx.fold(again, inplace=True)
        check_close(again, nmfx.fold(one), f"folded {inner}")
        assert type(again.blocks[0].fc1) is nn.Linear


def check_2d_mixed_masks() -> None:
    torch.manual_seed(5)
    plain = tie(Net(24))
    model = nmfx.sparsify(Net(24), RULES, lambda_w=LAMBDA)
    model.load_state_dict(plain.state_dict())
    both(model, mp_policy=POLICY)
    twin = rounded_twin(plain, masks_of(model, weights(plain)))
    x = X.to(BF16)
    for _ in range(2):
        found = model(X)
        # Rowwise layers add two halves, rounded.
        torch.testing.assert_close(found, twin(x), rtol=0.02, atol=0.02)
        for block, other in zip(model.blocks, twin.blocks, strict=True):
            inner = torch.randn(3, 16).to(BF16)
            assert torch.equal(_columns(block, inner), _columns(other, inner))
        my_share(model)
    notes = [note for note in nmfx.report(model).notes if "FSDP2" in note]
    assert len(notes) == 1, notes
    assert "of the shards before (layers: 4)" in notes[0], notes


def _columns(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if hasattr(block, "unshard"):
        block.unshard()
    out = block.fc1(x)
    if hasattr(block, "reshard"):
        parts = [torch.empty_like(out) for _ in range(2)]
        group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"].get_group()
        dist.all_gather(parts, out.contiguous(), group)
        block.reshard()
        return torch.cat(parts, -1)
    return out


def check_resharding_to_fewer_ranks() -> None:
    """reshard_after_forward=2 of 4: shards of another mesh between forward and backward."""
    model = sparse()
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=2)
    fully_shard(model)
    check_close(train(model, my_part), train(sparse(), halves), tolerance=1e-6)
    torch.manual_seed(5)
    plain = tie(Net())
    model = nmfx.sparsify(Net(), RULES, lambda_w=LAMBDA)
    model.load_state_dict(plain.state_dict())
    for block in model.blocks:
        fully_shard(block, mp_policy=POLICY, reshard_after_forward=2)
    fully_shard(model, mp_policy=POLICY)
    twin = rounded_twin(plain, masks_of(model, weights(plain)))
    for _ in range(3):
        assert torch.equal(model(X), twin(X.to(BF16)))
        loss_of(model, part(X), part(Y)).backward()
    with torch.no_grad():
        model(X)
    assert "of the shards before (layers: 4)" in str(nmfx.report(model))


def check_hybrid_sharding() -> None:
    """Sharded over two ranks, the same on two pairs of them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    wanted = train(sparse(), halves)
    model = sparse()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_close(train(model, my_part), wanted, tolerance=1e-6)
    check_same_masks(model)
    again = sparse()
    fully_shard(again, mesh=mesh)
    check_close(
        train(again, my_part, attached=True), train(sparse(), halves, attached=True), tolerance=1e-6
    )
    nmfx.freeze(again)
    nmfx.fold(again, inplace=True)
    values = weights(again)
    assert all(nmfx.is_nm(values[name], "2:4", 1) for name in nmfx.masks(model))
    check_equal(again, values)
