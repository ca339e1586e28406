"""The linear layers of a tensor-parallel model as layers of this rank's parts, and back.

What `lower` finds in a `LinearPart` is a plain layer, measured, packed and run as any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.sharded import is_sharded
from .candidates import read_around, tied_names
from .generate import base_class
from .linear_part import PART, PLACE, LinearPart, Place, has_parts, strides
from .refs import iter_sites
from .site import MEASURED, SKIPPED
from .site import join as joined


def split_into_parts(model: nn.Module) -> None:
    """Makes a `LinearPart` of every linear layer whose weight is a DTensor, where it can be one.

    Args:
        model: changed; nothing in it is sparsified or lowered. The memory of its weights stays.
    """
    around, tied = read_around(model), tied_names(model)
    for name, module in list(model.named_modules()):
        path = joined(name, "weight")
        if path in around or path in tied or why_whole(module) is not None:
            continue
        weight, bias = module.weight, module.bias
        dim, whole = weight.placements[0].dim, {"weight": weight}
        mine = weight.to_local()
        part = nn.Linear(mine.shape[1], mine.shape[0], bias=False, device="meta")
        part.weight = nn.Parameter(mine.detach(), requires_grad=weight.requires_grad)
        module._parameters["weight"] = None  # keeps its place in the state_dict
        if dim == 0 and bias is not None:
            part.bias = nn.Parameter(bias.to_local().detach(), requires_grad=bias.requires_grad)
            module._parameters["bias"], whole["bias"] = None, bias
        part.train(module.training)
        _move_marks(module, part)
        module.__dict__[PLACE] = Place(type(module), weight.device_mesh, dim, whole)
        module.__class__ = LinearPart
        module._modules[PART] = part


def why_whole(module: nn.Module) -> str | None:
    """Why a layer is not a part on each rank, or None."""
    from torch.distributed.tensor import Replicate, Shard

    weight: Any = module._parameters.get("weight")
    bias: Any = module._parameters.get("bias")
    if weight is None or not is_sharded(weight):
        return "its weight is no DTensor"
    if base_class(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        return f"its weight is a DTensor, and {type(module).__name__} is no nn.Linear"
    placements = weight.placements
    if len(placements) != 1 or type(placements[0]) is not Shard:
        return f"its weight is a DTensor placed as {placements}, not cut along one dimension"
    wanted = (Shard(0),) if placements[0].dim == 0 else (Replicate(),)
    if bias is not None and (not is_sharded(bias) or tuple(bias.placements) != wanted):
        return "its weight is a DTensor, and its bias is not placed to go with it"
    size, ranks = weight.shape[placements[0].dim], weight.device_mesh.size()
    if -(-size // ranks) * (ranks - 1) >= size:  # as torch.chunk cuts
        return "its weight is a DTensor, of which some rank has nothing"
    return None


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether a weight of a model is a DTensor, or a part of one."""
    return has_parts(model) or any(map(is_sharded, model.parameters()))


def on_any_rank(model: nn.Module, here: bool) -> bool:
    """Whether it holds for any process that has parts of this model; all of them must call."""
    for module in model.modules():
        if isinstance(module, LinearPart):
            mesh = module.__dict__[PLACE].mesh
            said: list[Any] = [None] * mesh.size()
            torch.distributed.all_gather_object(said, here, group=mesh.get_group())
            return any(said)
    return here


def forget_whole(model: nn.Module) -> None:
    """Gives up the parameters that were cut, so that their memory is that of the parts."""
    for module in model.modules():
        if isinstance(module, LinearPart):
            module.__dict__[PLACE].whole.clear()


def join_parts(model: nn.Module) -> None:
    """Makes DTensors again of all parts that are dense: the same ones, unless forgotten."""
    for module in list(model.modules()):
        if not isinstance(module, LinearPart) or any(iter_sites(module.part)):
            continue
        part = module.part
        place: Place = module.__dict__.pop(PLACE)
        shape = torch.Size((module.out_features, module.in_features))
        module.__class__ = place.base  # type: ignore[assignment]
        del module._modules[PART]
        whole = place.whole or {"weight": _whole(part.weight, place, shape)}
        if not place.whole and place.dim == 0 and part.bias is not None:
            whole["bias"] = _whole(part.bias, place, shape[:1])
        module._parameters.update(whole)
        _move_marks(part, module)


def _move_marks(old: nn.Module, new: nn.Module) -> None:
    for key in (SKIPPED, MEASURED):
        if key in old.__dict__:
            new.__dict__[key] = old.__dict__.pop(key)


def _whole(part: nn.Parameter, place: Place, shape: torch.Size) -> nn.Parameter:
    from torch.distributed.tensor import DTensor, Shard

    whole = DTensor.from_local(
        part.detach(),
        place.mesh,
        [Shard(place.dim)],
        run_check=False,
        shape=shape,
        stride=strides(shape),
    )
    return nn.Parameter(whole, requires_grad=part.requires_grad)
