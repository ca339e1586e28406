"""Models whose weights lie on several ranks: what must be whole first, and what is refused.

A *sharded* model has DTensors (tensor parallel, FSDP2). FSDP2 also exchanges them for whole
weights, perhaps rounded ones, while a model runs and for some time after that.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import NMError
from ..ops.sharded import is_sharded
from .linear_part import LinearPart

BEFORE = "call it before the model is sharded"
LOAD = (
    "load it into a dense model, and give its weights to this one: set_model_state_dict(model, "
    "dense.state_dict(), options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict"
)
GATHER = (
    "gather it into a dense model: get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True)) of torch.distributed.checkpoint.state_dict gives its weights whole"
)
_FOLD = f"nmfx.fold(model) makes DTensors of the parts again; then {GATHER}"


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that FSDP2 (`fully_shard`) works on."""
    return _modules_of(model, "FSDPModule")


def _modules_of(model: nn.Module, kind: str) -> list[Any]:
    # By name: importing torch.distributed.fsdp takes time, and who has such modules has done it.
    return [
        module
        for module in model.modules()
        if any(
            c.__name__ == kind and c.__module__.startswith("torch.distributed.fsdp")
            for c in type(module).__mro__
        )
    ]


def reshard(model: nn.Module) -> None:
    """Takes FSDP2's gathered weights away, as `model.state_dict()` does: the shards are the truth.

    The next forward or backward gathers them again.
    """
    for module in fsdp_modules(model):
        module.reshard()


def refuse_sharded(model: nn.Module, verb: str, instead: str = GATHER) -> None:
    """Refuses a model of which this process has a part.

    Args:
        model: is not changed.
        verb: for the message.
        instead: what to do, for the message.

    Raises:
        NMError: with the first weight that is sharded, or FSDP1 at work.
    """
    if _modules_of(model, "FullyShardedDataParallel"):
        raise NMError(
            f"nmfx.{verb}: FullyShardedDataParallel flattens and shards weights; {instead}"
        )
    refuse_parts(model, verb)
    reshard(model)
    for name, tensor in model.named_parameters():
        if is_sharded(tensor):
            raise NMError(
                f"nmfx.{verb}: {name} is a {type(tensor.data).__name__}, of which this process has "
                f"a part; {instead}"
            )


def refuse_parts(model: nn.Module, verb: str) -> None:
    """Refuses what `lower` made of a tensor-parallel model.

    Raises:
        NMError: with the first layer of which this process has a part.
    """
    for name, module in model.named_modules():
        if isinstance(module, LinearPart):
            raise NMError(f"nmfx.{verb}: {name} is this process's part of a layer; {_FOLD}")


def refuse_fsdp(model: nn.Module, verb: str) -> None:
    """Refuses a model that FSDP gathers and shards while it runs; tensor parallel ones pass.

    Raises:
        NMError: as `refuse_sharded`.
    """
    if _modules_of(model, "FullyShardedDataParallel") or fsdp_modules(model):
        refuse_sharded(model, verb)


def refuse_copy(model: nn.Module, verb: str) -> None:
    """Refuses to copy a model that FSDP2 works on, which torch cannot copy.

    Raises:
        NMError: with the first such module.
    """
    for module in fsdp_modules(model):
        name = next(fqn for fqn, one in model.named_modules() if one is module)
        raise NMError(
            f"nmfx.{verb}: {name or 'model'} is sharded by fully_shard and cannot be copied; pass "
            f"inplace=True, or {GATHER}"
        )
