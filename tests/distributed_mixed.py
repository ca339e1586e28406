"""FSDP2 with bfloat16 weights: masks are those of the float32 shards, on two ranks."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from distributed_fsdp import shard
from distributed_net import (
    LAMBDA,
    RULES,
    STEPS,
    Net,
    X,
    Y,
    adamw,
    check_close,
    dense,
    loss_of,
    my_part,
    part,
    train,
    weights,
    whole,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import nmfx

BF16 = torch.bfloat16
POLICY = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
HOOKS = ("fsdp_pre_all_gather", "fsdp_post_all_gather")


@torch.no_grad()
def tie(model: nn.Module) -> nn.Module:
    """Gives all linear layers weights that differ in float32, and hardly any in bfloat16."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            few = torch.tensor([-0.25, 0.125, 0.25])
            chosen = few[torch.randint(3, module.weight.shape)]
            module.weight.copy_(chosen * (1 + 2**-11 * torch.randn_like(chosen)))
    return model


def tied() -> Net:
    torch.manual_seed(5)
    return tie(Net())


def before(**options: Any) -> nn.Module:
    model = nmfx.sparsify(tied(), RULES, lambda_w=LAMBDA)
    return shard(model, mp_policy=POLICY, **options)


def after(**options: Any) -> nn.Module:
    model = shard(tied(), mp_policy=POLICY, **options)
    return nmfx.sparsify(model, RULES, lambda_w=LAMBDA)


def later(**options: Any) -> nn.Module:
    """Sparsified when FSDP2 has gathered weights already."""
    model = shard(tied(), mp_policy=POLICY, **options)
    model(X)
    return nmfx.sparsify(model, RULES, lambda_w=LAMBDA)


def masks_of(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: nmfx.nm_mask(values[name], "2:4", 1) for name in nmfx.masks(model)}


def rounded_twin(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A dense model in bfloat16 of the weights masked in float32."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            twin.get_parameter(name).masked_fill_(~mask, 0.0)
    return twin.to(BF16)


def check_mixed_masks_are_those_of_float32() -> None:
    plain = tied()
    for make in (before, after, later):
        for reshard in (True, False):
            model = make(reshard_after_forward=reshard)
            masks = masks_of(model, weights(plain))
            rounded = {
                name: nmfx.nm_mask(plain.get_parameter(name).to(BF16), "2:4", 1) for name in masks
            }
            assert nmfx.sad(masks, rounded).per_weight > 0.1, "no ties to lose"
            assert nmfx.sad(masks, nmfx.masks(model)).total == 0
            twin = rounded_twin(plain, masks)
            for _ in range(3):  # the first gathers without hooks on what came before
                assert torch.equal(model(X), twin(X.to(BF16))), (make.__name__, reshard)
                my_part(model)
            with torch.no_grad():
                assert torch.equal(model(X), twin(X.to(BF16))), "without gradients"


def check_mixed_training_equals_one_process() -> None:
    """Against dense twins in bfloat16 whose weights were masked in float32."""
    master = tied()
    optimizer = adamw(master)
    names = [f"blocks.{i}.{fc}.weight" for i in range(2) for fc in ("fc1", "fc2")]
    for _ in range(STEPS):
        masks = {name: nmfx.nm_mask(master.get_parameter(name), "2:4", 1) for name in names}
        sums = [torch.zeros_like(p) for p in master.parameters()]
        for rank in range(2):
            twin = rounded_twin(master, masks)
            loss_of(twin, part(X, rank).to(BF16), part(Y, rank)).backward()
            for total, parameter in zip(sums, twin.parameters(), strict=True):
                total += parameter.grad.float()
        for (name, parameter), total in zip(master.named_parameters(), sums, strict=True):
            parameter.grad = total / 2
            if name in masks:
                parameter.grad += LAMBDA * parameter.detach().masked_fill(masks[name], 0.0)
        optimizer.step()
    for make in (before, after):
        model = train(make(), my_part, attached=True)
        check_close(model, master, make.__name__, tolerance=1e-5)


def check_mixed_decay() -> None:
    """In backward it is rounded with the gradient, to bfloat16; attached, it is float32."""
    plain = tied()
    for attached in (False, True):
        grads = []
        for lambda_w in (LAMBDA, 0.0):
            model = before()
            nmfx.set_lambda(model, lambda_w)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            if attached:
                nmfx.attach(model, optimizer)
            my_part(model)
            optimizer.step()
            grads.append({name: whole(p.grad) for name, p in model.named_parameters()})
        for name, mask in masks_of(model, weights(plain)).items():
            decay = LAMBDA * plain.get_parameter(name).detach().masked_fill(mask, 0.0)
            off = float((grads[0][name] - grads[1][name] - decay).abs().max())
            unit = float(decay.abs().max())
            assert off < (1e-5 if attached else 0.1) * unit, (attached, name, off / unit)


def check_mixed_hooks_are_no_part_of_the_model() -> None:
    model = before()
    my_part(model)
    shards = [p for p in model.parameters() if hasattr(p._local_tensor, HOOKS[0])]
    assert len(shards) == 4, "hooks are on the shards of sparse weights"
    assert all(type(p._local_tensor) is Tensor for p in shards)
    state = model.state_dict()
    assert not any(hasattr(t._local_tensor, HOOKS[0]) for t in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert list(again) == list(tied().state_dict())
    nmfx.unsparsify(model)
    for parameter in model.parameters():
        assert not any(hasattr(parameter._local_tensor, hook) for hook in HOOKS)
    wanted = tied().to(BF16)
    assert torch.equal(model(X), wanted(X.to(BF16))), "dense again"


def check_mixed_uneven_and_offloaded() -> None:
    """Shards of 4 and 3 rows; shards that are kept on the CPU (here all are)."""
    for options in ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        torch.manual_seed(6)
        plain = tie(nn.Sequential(nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 8)))
        model = nmfx.sparsify(copy.deepcopy(plain), {"0": "2:4"})
        fully_shard(model, mp_policy=POLICY, **options)
        twin = rounded_twin(plain, {"0.weight": nmfx.nm_mask(plain[0].weight, "2:4", 1)})
        for _ in range(2):
            assert torch.equal(model(X), twin(X.to(BF16))), options
            my_part(model)


def check_mixed_on_one_rank() -> None:
    """A mesh of one rank, where nothing is gathered."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("others", "one"))["one"]
    plain = tied()
    model = before(mesh=mesh)
    twin = rounded_twin(plain, masks_of(model, weights(plain)))
    for _ in range(2):
        assert torch.equal(model(X), twin(X.to(BF16)))
        my_part(model)


def check_mixed_from_meta() -> None:
    plain = tied()
    with torch.device("meta"):
        model = Net()
    nmfx.sparsify(model, RULES, lambda_w=LAMBDA)
    shard(model, mp_policy=POLICY)
    model.to_empty(device="cpu")
    model.load_state_dict(before().state_dict())
    twin = rounded_twin(plain, masks_of(model, weights(plain)))
    for _ in range(2):
        assert torch.equal(model(X), twin(X.to(BF16)))
        my_part(model)


def check_mixed_report() -> None:
    model = before()
    note = "FSDP2 gathers weights as bfloat16; masks are those of the shards before (layers: 4)"
    assert note in str(nmfx.report(model)), nmfx.report(model).notes
    model(X)
    assert note in nmfx.report(model).notes, "while weights are gathered"
    nmfx.freeze(model)
    assert note not in str(nmfx.report(model))
    fixed = nmfx.masks(model)
    twin = rounded_twin(tied(), fixed)
    assert torch.equal(model(X), twin(X.to(BF16))), "frozen"

    attention = nmfx.sparsify(nn.MultiheadAttention(16, 2), "2:4")
    fully_shard(attention, mp_policy=POLICY)
    rows = nmfx.report(attention)
    assert [row.fqn for row in rows if row.pattern] == ["in_proj_weight", "out_proj.weight"]
    assert len(rows.notes) == 2, rows.notes
    assert "ties by index (layers: 1)" in rows.notes[1], rows.notes
    assert not any("FSDP2" in note for note in nmfx.report(shard(dense())).notes)


def check_mixed_part_of_a_sharded_model() -> None:
    """Sparsified through a module below the one that was sharded, after it has run."""
    model = fully_shard(tied(), mp_policy=POLICY)
    model(X)
    nmfx.sparsify(model.blocks, {"*.fc*": "2:4"})
    for _ in range(2):
        my_part(model)
    notes = nmfx.report(model).notes
    assert any("ties by index (layers: 4)" in note for note in notes), notes


def check_mixed_schedules() -> None:
    """Another N, and another M, from one step to the next."""
    plain, model = tied(), before()
    for pattern in ("1:4", "3:4", "2:2", "1:2", "2:4"):
        nmfx.set_pattern(model, pattern)
        masks = {
            name: nmfx.nm_mask(plain.get_parameter(name), pattern, 1) for name in nmfx.masks(model)
        }
        assert torch.equal(model(X), rounded_twin(plain, masks)(X.to(BF16))), pattern
        my_part(model)
