"""torch.distributed.checkpoint: from dense models to sparse ones and back, on two ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_fsdp import shard
from distributed_net import (
    RULES,
    X,
    adamw,
    check_equal,
    check_same_masks,
    dense,
    halves,
    my_part,
    sparse,
    train,
    weights,
)
from distributed_tp import parallel
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import nmfx

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def folder() -> Path:
    """One that all ranks see."""
    name = [tempfile.mkdtemp()]
    dist.broadcast_object_list(name, 0)
    return Path(name[0])


def other(model: nn.Module) -> nn.Module:
    """Other weights, so that loading has something to do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3.0)
    return model


def layouts() -> dict[str, Any]:
    return {
        "plain": lambda model: model,
        "fsdp": shard,
        "tensor parallel": parallel,
    }


def check_dcp_between_dense_and_sparse() -> None:
    """Saved in any layout and form, loaded into any other: the same weights, and their masks."""
    trained = train(dense(), halves)
    values = weights(trained)
    for name, lay in layouts().items():
        for saved_sparse in (False, True):
            saved = lay(dense())
            set_model_state_dict(saved, trained.state_dict(), options=WHOLE)
            if saved_sparse:
                nmfx.sparsify(saved, RULES)
            path = folder()
            dcp.save({"model": get_model_state_dict(saved)}, checkpoint_id=path)
            for other_name, other_lay in layouts().items():
                loaded = other_lay(other(sparse() if not saved_sparse else dense()))
                state = {"model": get_model_state_dict(loaded)}
                dcp.load(state, checkpoint_id=path)
                set_model_state_dict(loaded, state["model"])
                check_equal(loaded, values, f"{name} -> {other_name}, sparse={saved_sparse}")
                if not saved_sparse:
                    check_same_masks(loaded)


def check_dcp_whole_state_dicts() -> None:
    trained = train(shard(sparse()), my_part)
    state = get_model_state_dict(trained, options=WHOLE)
    if dist.get_rank() == 0:
        plain = dense()
        plain.load_state_dict(state)
        for name, value in weights(plain).items():
            assert torch.equal(value, state[name]), name
        gathered = nmfx.sparsify(plain, RULES)
        fast = nmfx.lower(gathered, (X,), tune=False)  # on one rank
        assert [row.state for row in nmfx.report(fast) if row.pattern] == ["packed"] * 4
        torch.testing.assert_close(fast(X), nmfx.fold(gathered)(X))
    again = shard(other(sparse()))
    set_model_state_dict(again, state if dist.get_rank() == 0 else {}, options=FROM_FIRST)
    check_equal(again, trained)


def check_dcp_resumes() -> None:
    """Model, optimizer and what nmfx adds; the run goes on as if it had not been interrupted."""

    def change(model: nn.Module) -> None:
        nmfx.set_pattern(model, {"blocks.0.*": "1:4"})
        nmfx.set_lambda(model, 0.2)
        nmfx.freeze(model)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            my_part(model)
            optimizer.step()

    model = shard(sparse())
    optimizer = adamw(model)
    step(model, optimizer)
    change(model)
    step(model, optimizer)
    nmfx.unfreeze(model)
    path = folder()
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
    state["nmfx"] = nmfx.state_dict(model)
    dcp.save(state, checkpoint_id=path)
    step(model, optimizer)

    again = shard(other(sparse()))
    optimizer = adamw(again)
    empty = {
        "model": get_model_state_dict(again),
        "optimizer": get_optimizer_state_dict(again, optimizer),
        "nmfx": nmfx.state_dict(again),
    }
    dcp.load(empty, checkpoint_id=path)
    set_model_state_dict(again, empty["model"])
    set_optimizer_state_dict(again, optimizer, empty["optimizer"])
    nmfx.load_state_dict(again, empty["nmfx"])
    step(again, optimizer)
    check_equal(again, model)
    assert {row.fqn: row.pattern for row in nmfx.report(again)} == {
        row.fqn: row.pattern for row in nmfx.report(model)
    }
