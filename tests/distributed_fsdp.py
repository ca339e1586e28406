"""What must hold under FSDP2 (fully_shard), on two ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from distributed_net import (
    RULES,
    X,
    check_close,
    check_equal,
    check_same_masks,
    copied,
    dense,
    halves,
    my_part,
    one_process,
    refuses,
    sparse,
    train,
    weights,
    whole,
    whole_batch,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard

import nmfx


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Per block, as one does."""
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def before(**options: Any) -> nn.Module:
    return shard(sparse(), **options)


def after(**options: Any) -> nn.Module:
    return nmfx.sparsify(shard(dense(), **options), RULES, lambda_w=0.05)


def check_fsdp_equals_one_process() -> None:
    wanted = one_process()
    for make in (before, after):
        for reshard in (True, False):
            model = make(reshard_after_forward=reshard)
            names = list(model.state_dict())
            train(model, my_part)
            check_equal(model, wanted, f"{make.__name__} {reshard}")
            check_same_masks(model)
            assert list(model.state_dict()) == names == list(dense().state_dict())


def check_fsdp_attached_equals_one_process() -> None:
    wanted = one_process(attached=True)
    for make in (before, after):
        check_equal(train(make(), my_part, attached=True), wanted, make.__name__)
    clipped = one_process(attached=True, clip=0.05)
    # The norm over shards is summed in another order.
    check_close(train(before(), my_part, attached=True, clip=0.05), clipped)


def check_fsdp_attach_finds_shards() -> None:
    """Also after a forward alone, and where gathered weights were to be kept."""
    model = before()
    model(X)
    assert not hasattr(model.head.weight, "placements"), "the root keeps its weights gathered"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert len(nmfx.attach(model, optimizer).parameters) == 4
    for module in (model, *model.blocks):
        module.set_reshard_after_backward(False)
    my_part(model)
    assert not hasattr(model.blocks[0].fc1.weight, "placements"), "still gathered"
    optimizer.step()
    wanted = sparse(lambda_w=0.0)
    halves(wanted)
    weight, plain = model.blocks[0].fc1.weight, wanted.blocks[0].fc1.weight
    decay = 0.05 * plain.detach().masked_fill(nmfx.nm_mask(plain, "2:4", 1), 0.0)
    torch.testing.assert_close(whole(weight.grad), plain.grad + decay)


def check_fsdp_lambda_does_not_depend_on_the_ranks() -> None:
    for attached in (False, True):
        one = train(sparse(), whole_batch, attached)
        check_close(train(before(), my_part, attached), one, f"attached={attached}")


def check_fsdp_accumulates() -> None:
    def two_turns(model: nn.Module) -> None:
        model.set_requires_gradient_sync(False)
        my_part(model)
        model.set_requires_gradient_sync(True)
        my_part(model)

    def twice(model: nn.Module) -> None:
        halves(model)
        for parameter in model.parameters():
            parameter.grad = parameter.grad + parameter.grad

    for attached in (False, True):
        model = train(before(), two_turns, attached)
        check_close(model, one_process(twice, attached=attached), f"attached={attached}")


def check_fsdp_masks_are_those_of_the_shards() -> None:
    """Not of what the last forward left gathered."""
    model = fully_shard(sparse())
    first = check_same_masks(model)
    model(X)
    assert nmfx.sad(first, nmfx.masks(model)).total == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    my_part(model)
    optimizer.step()
    assert nmfx.sad(first, check_same_masks(model)).total > 0, "masks never moved"


def check_fsdp_frozen() -> None:
    wanted = sparse()
    nmfx.freeze(wanted)
    fixed = nmfx.masks(wanted)
    train(wanted, halves)
    model = before()
    nmfx.freeze(model)
    assert nmfx.sad(fixed, nmfx.masks(model)).total == 0
    train(model, my_part)
    check_equal(model, wanted)
    state = nmfx.state_dict(model)
    assert all(torch.equal(state["masks"][name], mask) for name, mask in fixed.items())
    other = before()
    nmfx.load_state_dict(other, state)
    assert nmfx.sad(fixed, nmfx.masks(other)).total == 0
    monitor = nmfx.Monitor(model, every=1)
    assert monitor.step()["nmfx/density"] == 0.5
    nmfx.unfreeze(model)
    check_same_masks(model)
    nmfx.unsparsify(model)
    check_equal(model, wanted)
    assert type(model.blocks[0].fc1) is nn.Linear


def check_fsdp_schedules() -> None:
    def run(model: nn.Module, gradients: Callable[[nn.Module], Any]) -> nn.Module:
        for pattern, lambda_w in (("3:4", 0.1), ("1:4", 0.2), ("2:2", 0.0)):
            nmfx.set_pattern(model, pattern)
            nmfx.set_lambda(model, lambda_w)
            train(model, gradients, steps=2)
        return model

    check_equal(run(before(), my_part), run(sparse(), halves))


def check_fsdp_fold() -> None:
    wanted = nmfx.fold(one_process())
    model = train(before(), my_part)
    refuses("cannot be copied; pass inplace=True", lambda: nmfx.fold(model))
    model(X)  # the root's weights are gathered: folding must reach the shards
    assert nmfx.fold(model, inplace=True) is model
    check_equal(model, wanted)
    assert type(model.blocks[0].fc1) is nn.Linear
    assert torch.equal(model(X), wanted(X))
    frozen = before()
    nmfx.freeze(frozen)
    nmfx.fold(frozen, inplace=True)
    check_equal(frozen, nmfx.fold(sparse()))


def check_fsdp_refusals() -> None:
    model = before()
    values, classes = weights(model), [type(module) for module in model.modules()]
    gather = "is a DTensor, of which this process has a part; gather"
    refuses(gather, lambda: nmfx.lower(model, (X,)))
    refuses("is a DTensor", lambda: nmfx.lower(model, (X,), inplace=True))
    refuses("before the model is sharded", lambda: nmfx.preview(model, "2:4", (X,)))
    refuses("before the model is sharded", lambda: nmfx.verify(model, X))
    refuses("get_model_state_dict", lambda: nmfx.save(model, "/nowhere.safetensors"))
    refuses("tensor.full_tensor()", lambda: nmfx.nm_mask(model.head.weight, "2:4"))
    check_equal(model, values)
    assert [type(module) for module in model.modules()] == classes


def check_fsdp_load_is_refused() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        nmfx.save(sparse(), f"{folder}/x.safetensors")
        model = shard(dense())
        values = weights(model)
        refuses("set_model_state_dict(", lambda: nmfx.load(f"{folder}/x.safetensors", into=model))
        check_equal(model, values)
        assert not any(row.pattern for row in nmfx.report(model))


def check_fsdp_of_single_layers() -> None:
    """fully_shard puts a class of its own on top of, or below, that of nmfx."""
    wanted = one_process()
    model = sparse()
    for block in model.blocks:
        fully_shard(block.fc1)
    fully_shard(model)
    check_equal(train(model, my_part), wanted, "on top")
    refuses("fully_shard the module above it", lambda: nmfx.freeze(model))
    check_same_masks(model)
    below = dense()
    for block in below.blocks:
        fully_shard(block.fc1)
    fully_shard(below)
    nmfx.sparsify(below, RULES, lambda_w=0.05)
    check_equal(train(below, my_part), wanted, "below")
    nmfx.freeze(below)
    nmfx.unfreeze(below)
    nmfx.fold(below, inplace=True)
    check_equal(below, nmfx.fold(wanted))


def check_fsdp_offloaded() -> None:
    model = before(offload_policy=CPUOffloadPolicy(pin_memory=False))
    check_equal(train(model, my_part), one_process())


def check_fsdp_from_meta() -> None:
    with torch.device("meta"):
        model = dense()
    nmfx.sparsify(model, RULES, lambda_w=0.05)
    shard(model)
    model.to_empty(device="cpu")
    for parameter, value in zip(model.parameters(), dense().parameters(), strict=True):
        local = parameter.detach().to_local()
        rows = -(-len(value) // 2)
        local.copy_(value.detach().split(rows)[torch.distributed.get_rank()])
    check_equal(train(model, my_part), one_process())


def check_fsdp_graph_module() -> None:
    model = nmfx.sparsify(torch.fx.symbolic_trace(dense()), RULES, lambda_w=0.05)
    check_equal(train(fully_shard(model), my_part), one_process())
    check_same_masks(model)


class Odd(nn.Module):
    """What is not leaf capture, and what is not grouped along dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv1d(16, 20, 1)
        self.turned = nn.ConvTranspose1d(20, 20, 1)  # sharded along its groups: 10 + 10 rows
        self.cut = nn.ConvTranspose1d(20, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, 2))
        x = self.attention(x, x, x)[0]
        return self.cut(self.turned(self.conv(x.mT))).mT.flatten(0, 1)


def odd() -> nn.Module:
    torch.manual_seed(4)
    rules = {"attention*": "2:4", "conv": "2:4", "turned": "1:5", "cut": "2:4"}
    return nmfx.sparsify(Odd(), rules, lambda_w=0.05)


def check_fsdp_of_other_layers() -> None:
    for attached in (False, True):
        wanted = train(odd(), halves, attached)
        model = fully_shard(odd())
        check_close(train(model, my_part, attached), wanted)
        masks, others = nmfx.masks(model), nmfx.masks(wanted)
        assert len(masks) == 5, list(masks)
        assert nmfx.sad(masks, others).total == 0
    nmfx.freeze(model)
    assert nmfx.sad(masks, nmfx.masks(model)).total == 0
    train(model, my_part)
    nmfx.fold(model, inplace=True)
    folded = weights(model)
    assert nmfx.is_nm(folded["turned.weight"], "1:5", 0)
    assert nmfx.is_nm(folded["cut.weight"], "2:4", 0)


def check_fsdp1() -> None:
    """FullyShardedDataParallel: it trains; verbs that need weights refuse, or work when whole."""
    wanted = one_process()
    for original in (True, False):
        model: Any = FullyShardedDataParallel(
            sparse(), use_orig_params=original, device_id=torch.device("cpu")
        )
        train(model, my_part)
        other = torch.optim.SGD([nn.Parameter(X)])
        for verb in (nmfx.masks, nmfx.freeze, nmfx.fold, nmfx.Monitor):
            refuses("call this inside its summon_full_params", partial(verb, model))
        refuses("call this inside its summon_full_params", partial(nmfx.attach, model, other))
        refuses("FullyShardedDataParallel flattens", partial(nmfx.lower, model, (X,)))
        with FullyShardedDataParallel.summon_full_params(model):
            values = dict(wanted.named_parameters())
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, values[name.replace("_fsdp_wrapped_module.", "")])
            assert nmfx.sad(_bare(nmfx.masks(model)), nmfx.masks(wanted)).total == 0


def _bare(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_fsdp_wrapped_module.", ""): mask for name, mask in masks.items()}


def check_fsdp_monitor() -> None:
    """Each rank counts its part; flips add up to those of the gathered masks."""
    import torch.distributed as dist

    model = before()
    monitor, first = nmfx.Monitor(model, every=1), nmfx.masks(model)
    train(model, my_part)
    for _ in range(3):
        measured = monitor.step()
    moved = nmfx.sad(first, nmfx.masks(model))
    name = "blocks.0.fc1.weight"
    local = model.get_parameter(name).to_local().numel()
    mine = torch.tensor(measured[f"nmfx/sad_since_start/{name}"] * local, dtype=torch.float64)
    dist.all_reduce(mine)
    assert round(float(mine)) == moved.per_layer[name] > 0, (mine, moved)


def check_activation_checkpointing() -> None:
    """Both ways of torch.utils.checkpoint, the wrapper, with and without FSDP2."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        checkpoint_wrapper,
    )

    wanted = one_process()
    for reentrant in (True, False):
        for make, gradients in ((sparse, halves), (before, my_part)):
            model = make()
            model.reentrant = reentrant
            check_equal(train(model, gradients), wanted, f"{reentrant} {make.__name__}")
    for implementation in CheckpointImpl:
        if implementation is CheckpointImpl.REENTRANT:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                _wrapped(checkpoint_wrapper, implementation, wanted)
        else:
            _wrapped(checkpoint_wrapper, implementation, wanted)


def _wrapped(wrapper: Callable[..., nn.Module], implementation: Any, wanted: Any) -> None:
    model = sparse()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrapper(block, checkpoint_impl=implementation)
    assert list(model.state_dict()) == list(dense().state_dict())
    # The reentrant one makes no gradients otherwise.
    model.register_forward_pre_hook(lambda _, args: (args[0].clone().requires_grad_(),))
    alone = train(copied(model), halves)
    check_equal(alone, wanted, f"{implementation}")
    check_equal(train(shard(model), my_part), wanted, f"{implementation} FSDP")
    check_same_masks(model)


def check_fsdp_compiled() -> None:
    """Blocks compiled, before and after they are sharded."""
    wanted = one_process()
    for first in (True, False):
        model = sparse()
        for block in model.blocks:
            if first:
                block.compile(fullgraph=True)
            fully_shard(block)
            if not first:
                block.compile()
        fully_shard(model)
        check_close(train(model, my_part), wanted, f"compiled first={first}")
        check_same_masks(model)
