"""What must hold under DistributedDataParallel, on two ranks."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from distributed_net import (
    LAMBDA,
    X,
    Y,
    check_close,
    check_equal,
    check_same_masks,
    halves,
    loss_of,
    my_loss,
    my_part,
    one_process,
    part,
    sparse,
    train,
    weights,
    whole_batch,
)
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import nmfx

OPTIONS: list[dict[str, Any]] = [
    {},
    {"broadcast_buffers": False},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
    {"static_graph": True, "gradient_as_bucket_view": True},
]


def check_ddp_equals_one_process() -> None:
    for attached in (False, True):
        wanted = one_process(attached=attached)
        for options in OPTIONS:
            model = train(DDP(sparse(), **options), my_part, attached)
            check_equal(model, wanted, f"{options} attached={attached}")
            check_same_masks(model)


def check_ddp_no_sync_accumulates() -> None:
    def two_turns(model: nn.Module) -> None:
        with model.no_sync():
            my_part(model)
        my_part(model)

    def twice(model: nn.Module) -> None:
        halves(model)
        for parameter in model.parameters():
            parameter.grad = parameter.grad + parameter.grad

    for attached in (False, True):
        model = train(DDP(sparse()), two_turns, attached)
        check_equal(model, one_process(twice, attached=attached), f"attached={attached}")


def check_ddp_lambda_does_not_depend_on_the_ranks() -> None:
    """The decay of two ranks is that of one with the same global batch, in both places."""
    for attached in (False, True):
        one = train(sparse(), whole_batch, attached)
        two = train(DDP(sparse()), my_part, attached)
        check_close(two, one, f"attached={attached}")
        without = train(sparse(lambda_w=0.0), whole_batch)
        moved = max(
            float((a - b).abs().max())
            for a, b in zip(weights(one).values(), weights(without).values(), strict=True)
        )
        assert moved > 1e-2, f"the decay changes nothing: {moved}"


def check_summed_gradients_multiply_lambda_in_backward_only() -> None:
    """Loss / ranks and a sum, as the paper's code: lambda times the ranks, but not if attached."""
    for attached, times in ((False, 2), (True, 1)):
        model = sparse()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if attached:
            nmfx.attach(model, optimizer)
        (my_loss(model) / dist.get_world_size()).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        plain = sparse(lambda_w=0.0)
        whole_batch(plain)
        for name, mask in nmfx.masks(model).items():
            weight, wanted = model.get_parameter(name), plain.get_parameter(name).grad
            decay = times * LAMBDA * weight.detach().masked_fill(mask, 0.0)
            torch.testing.assert_close(weight.grad, wanted + decay, rtol=1e-5, atol=1e-6)


# By another name, as DDP takes the hook of that name with NCCL only; and it reads annotations.
def _through_bfloat16(state, bucket):  # type: ignore[no-untyped-def]
    return bf16_compress_hook(state, bucket)


def check_ddp_bf16_hook() -> None:
    """Gradients rounded to bfloat16 on the wire: as near as that; if attached, lambda is exact."""
    model = DDP(sparse())
    model.register_comm_hook(None, _through_bfloat16)
    my_part(model)
    wanted = sparse()
    halves(wanted)
    for (name, parameter), other in zip(
        model.module.named_parameters(), wanted.parameters(), strict=True
    ):
        near = 2**-7 * float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, rtol=2**-7, atol=near, msg=name)
    attached = DDP(sparse())
    attached.register_comm_hook(None, _through_bfloat16)
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.0)
    nmfx.attach(attached, optimizer)
    my_part(attached)
    before = {name: p.grad.clone() for name, p in attached.module.named_parameters()}
    optimizer.step()
    for name, mask in nmfx.masks(attached.module).items():
        weight = attached.module.get_parameter(name)
        decay = LAMBDA * weight.detach().masked_fill(mask, 0.0)
        torch.testing.assert_close(weight.grad, before[name] + decay, rtol=1e-6, atol=1e-7)


def check_ddp_leaves_controls_alone() -> None:
    """Neither broadcast nor reduced: what a rank sets is what it has."""
    model = sparse()
    keys, buffers = set(model.state_dict()), dict(model.named_buffers())
    nmfx.set_lambda(model, 0.25 + dist.get_rank())
    wrapped = DDP(model, broadcast_buffers=True)
    for _ in range(2):
        my_part(wrapped)
    assert set(model.state_dict()) == keys, "state_dict"
    assert dict(model.named_buffers()) == buffers, "buffers"
    assert not any("nmfx" in name for name, _ in wrapped.named_parameters()), "parameters"
    assert not any("nmfx" in name for name, _ in wrapped.named_buffers()), "buffers of DDP"
    assert all(b.data_ptr() not in _controls(model) for b in wrapped.modules_buffers)
    for module in model.modules():
        control = module.__dict__.get("_nmfx_control0")
        if control is not None:
            assert control.tolist() == [0.25 + dist.get_rank(), 2.0], control


def _controls(model: nn.Module) -> set[int]:
    found = [
        value.data_ptr()
        for module in model.modules()
        for key, value in module.__dict__.items()
        if key.startswith("_nmfx_control")
    ]
    assert len(found) == 4, found
    return set(found)


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def check_ddp_broadcasts_buffers_as_ever() -> None:
    torch.manual_seed(3)
    images = torch.randn(4, 3, 8, 8)
    outcomes = []
    for rules in (None, {"conv": "2:4", "fc": "2:4"}):
        torch.manual_seed(2)
        model = Picture() if rules is None else nmfx.sparsify(Picture(), rules)
        wrapped = DDP(model, broadcast_buffers=True)
        for _ in range(2):
            loss_of(wrapped, part(images), part(Y[:4])).backward()
        wrapped(part(images))
        outcomes.append(model.norm.running_mean.clone())
    # The batch norm comes before all sparse layers.
    assert torch.equal(*outcomes), outcomes
    every = [torch.empty_like(outcomes[1]) for _ in range(2)]
    dist.all_gather(every, outcomes[1])
    assert not torch.equal(*every), "the last forward is each rank's own"


def check_ddp_verbs() -> None:
    model = DDP(sparse())
    before = check_same_masks(model)
    train(model, my_part)
    monitor = nmfx.Monitor(model, every=1)
    after = check_same_masks(model)
    moved = nmfx.sad(before, after)
    assert moved.total > 0, "masks never moved"
    train(model, my_part, steps=1)
    assert monitor.step()["nmfx/density"] == 0.5
    rows = [row for row in nmfx.report(model) if row.state == "sparse"]
    assert [row.fqn for row in rows] == list(after), rows
    state = nmfx.state_dict(model)
    nmfx.freeze(model)
    fixed = nmfx.masks(model)
    train(model, my_part)
    assert nmfx.sad(fixed, nmfx.masks(model)).total == 0, "a frozen mask moved"
    nmfx.unfreeze(model)
    nmfx.load_state_dict(model, state)
    nmfx.set_pattern(model, "1:4")
    train(model, my_part, steps=1)
    folded = nmfx.fold(model.module)
    with tempfile.TemporaryDirectory() as folder:
        nmfx.save(model.module, f"{folder}/x.safetensors")
        again = nmfx.load(f"{folder}/x.safetensors", into=sparse())
    assert torch.equal(again(X), model.module(X)), "saved and loaded"
    assert torch.equal(folded(X), model.module(X)), "folded"
    fast = nmfx.lower(model.module, (X,), tune=False)
    torch.testing.assert_close(fast(X), folded(X), rtol=1e-4, atol=1e-5)
