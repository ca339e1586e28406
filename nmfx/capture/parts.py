"""The linear layers of a tensor-parallel model as layers of this rank's parts, and back.

What `lower` finds in a `LinearPart` is a plain layer, measured, packed and run as any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.sharded import is_sharded
from .candidates import Candidate, find_candidates, only_read
from .generate import base_class
from .leaf import WEIGHT
from .linear_part import PART, PLACE, LinearPart, Place, has_parts, part_class, whole_of
from .refs import iter_sites
from .site import MEASURED, SKIPPED


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether a weight of a model is a DTensor, or a part of one."""
    return has_parts(model) or any(map(is_sharded, model.parameters()))


def divisible(model: nn.Module) -> list[Candidate]:
    """The linear layers of a model that every rank can have its part of."""
    never_called = only_read(model)
    return [
        c
        for c in find_candidates(model)
        if (c.kind, c.capture, c.path, c.obstacle) == ("linear", "leaf", WEIGHT, None)
        and c.name not in never_called
        and why_whole(c.host) is None
    ]


def why_whole(module: nn.Module, weight_name: str = WEIGHT) -> str | None:
    """Why a layer cannot be a part on each rank, or None."""
    from torch.distributed.tensor import Replicate, Shard

    weight: Any = module._parameters.get(weight_name)
    bias: Any = module._parameters.get("bias")
    if weight is None or not is_sharded(weight):
        return "its weight is no DTensor"
    name = base_class(module).__name__
    if not isinstance(module, nn.Linear) or weight_name != WEIGHT:
        return f"its weight is a DTensor; of these, linear layers are lowered, and no {name}"
    if base_class(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        return f"its weight is a DTensor, and {name} computes in a forward of its own"
    if hasattr(module, PART):
        return f"its weight is a DTensor, and it has an attribute {PART} of its own"
    placements, mesh = weight.placements, weight.device_mesh
    if len(placements) != 1 or type(placements[0]) is not Shard:
        return f"its weight is a DTensor placed as {placements}, not cut along one dimension"
    if mesh.get_coordinate() is None:
        return "its weight is a DTensor, of which only other processes have parts"
    wanted = (Shard(0),) if placements[0].dim == 0 else (Replicate(),)
    if bias is not None and (not is_sharded(bias) or tuple(bias.placements) != wanted):
        return "its weight is a DTensor, and its bias is not placed to go with it"
    size, ranks = weight.shape[placements[0].dim], mesh.size()
    if -(-size // ranks) * (ranks - 1) >= size:  # as torch.chunk cuts
        return "its weight is a DTensor, of which some rank has nothing"
    return None


def split_into_parts(model: nn.Module) -> None:
    """Makes a `LinearPart` of each linear layer that can be one; all ranks make the same ones.

    Args:
        model: changed; nothing in it is sparsified or lowered. The memory of its weights stays.
            What is done when something interrupts this, `join_parts` takes back.
    """
    for candidate in divisible(model):
        module: Any = candidate.host
        weight, bias = module._parameters[WEIGHT], module._parameters.get("bias")
        dim, mesh = weight.placements[0].dim, weight.device_mesh
        whole = {WEIGHT: weight}
        with torch.inference_mode(weight.is_inference()):
            mine = weight.to_local()
            part = nn.Linear(mine.shape[1], mine.shape[0], bias=False, device="meta")
            part.weight = nn.Parameter(mine.detach(), requires_grad=weight.requires_grad)
            if dim == 0 and bias is not None:
                whole["bias"] = bias
                mine = bias.to_local().detach()
                part.bias = nn.Parameter(mine, requires_grad=bias.requires_grad)
        part.train(module.training)
        names, cls = tuple(module._parameters), type(module)
        module.__dict__[PLACE] = Place(cls, mesh, dim, mesh.get_local_rank(), names, whole)
        module._modules[PART] = part
        for name in whole:
            del module._parameters[name]
        module.__class__ = part_class(cls)  # type: ignore[arg-type]
        _move_marks(module, part)


def forget_whole(model: nn.Module) -> None:
    """Gives up the parameters that were cut, so that their memory is that of the parts."""
    for module in model.modules():
        if isinstance(module, LinearPart):
            module.__dict__[PLACE].whole.clear()


def join_parts(model: nn.Module) -> None:
    """Makes DTensors again of all parts that are dense: the same ones, unless forgotten.

    Called again after an interruption, it does the rest.
    """
    module: Any
    for module in list(model.modules()):
        place: Place | None = module.__dict__.get(PLACE)
        if place is None or any(iter_sites(module)):
            continue
        part: Any = module._modules.get(PART)
        shape = torch.Size((module.out_features, module.in_features))
        whole = place.whole
        if not whole and isinstance(part, nn.Linear):
            whole = {WEIGHT: _parameter(part.weight, place, shape)}
            if place.dim == 0 and part.bias is not None:
                whole["bias"] = _parameter(part.bias, place, shape[:1])
        found = {**module._parameters, **whole}
        first = {name: found[name] for name in place.order if name in found}
        module.__class__ = place.base
        module.__dict__["_parameters"] = first | found
        if part is not None:
            _move_marks(part, module)
            del module._modules[PART]
        del module.__dict__[PLACE]


def _parameter(part: Any, place: Place, shape: torch.Size) -> nn.Parameter:
    with torch.inference_mode(part.is_inference()):
        whole = whole_of(part.detach(), place, shape)
        return nn.Parameter(whole, requires_grad=part.requires_grad)


def _move_marks(old: nn.Module, new: nn.Module) -> None:
    for key in (SKIPPED, MEASURED):
        if key in old.__dict__:
            new.__dict__[key] = old.__dict__.pop(key)


def on_any_rank(model: nn.Module, here: bool) -> bool:
    """Whether it holds for any process that has parts of this model; all of them must call."""
    meshes: list[Any] = []
    parameter: Any
    for parameter in model.parameters():
        if is_sharded(parameter) and parameter.device_mesh not in meshes:
            meshes.append(parameter.device_mesh)
    for mesh in meshes * 2:  # again: some share no mesh, but one with the same rank
        if mesh.get_coordinate() is None:
            continue
        for dim in range(mesh.ndim):
            said: list[Any] = [None] * mesh.size(dim)
            torch.distributed.all_gather_object(said, here, group=mesh.get_group(dim))
            here = any(said)
    return here
