"""Tensor parallelism: a linear layer whose weight is a DTensor as a layer of this rank's part of it.

    hook of                  LinearPart                              hook of
    parallelize_module       to_local ── nn.Linear of ── from_local  parallelize_module
    x whole (colwise), or                this rank's     some outputs (colwise), or
    some columns (rowwise)               rows / columns  a term of each sum (rowwise)

The layer inside is a plain one, so it is measured, packed and run as any other; what ranks send
each other stays as it was. `join` makes DTensors of the parts again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.sharded import is_sharded
from .candidates import read_around, tied_names
from .generate import base_class
from .refs import sites_in
from .site import MARKS
from .site import join as joined

_PLACE = "_nmfx_place"
_PART = "part"


@dataclass(frozen=True)
class _Place:
    """Where a part belongs: the class of its layer, the ranks, and the dimension that they cut."""

    base: type[nn.Module]
    mesh: Any
    dim: int


class LinearPart(nn.Module):
    """A linear layer of which every rank computes its part; takes and gives DTensors."""

    part: nn.Module
    bias: Any  # rowwise: added to the sum, of which each rank has a term
    out_features: int

    def forward(self, input: Any) -> Any:
        """What `nn.Linear.forward` makes of a DTensor."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        place: _Place = self.__dict__[_PLACE]
        columns, last = place.dim == 1, input.ndim - 1
        taken, grad = (Shard(last), Shard(last)) if columns else (Replicate(), Partial())
        x = input.redistribute(place.mesh, [taken]).to_local(grad_placements=[grad])
        shape = torch.Size((*input.shape[:-1], self.out_features))
        out = DTensor.from_local(
            self.part(x),
            place.mesh,
            [Partial() if columns else Shard(last)],
            run_check=False,
            shape=shape,
            stride=_strides(shape),
        )
        return out + self.bias if columns and self.bias is not None else out

    def extra_repr(self) -> str:
        place: _Place = self.__dict__[_PLACE]
        cut = "columns" if place.dim == 1 else "rows"
        return f"{cut} of the weight, rank {place.mesh.get_local_rank()} of {place.mesh.size()}"


def split(model: nn.Module) -> None:
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
        dim = weight.placements[0].dim
        mine = weight.to_local()
        part = nn.Linear(mine.shape[1], mine.shape[0], bias=False, device="meta")
        part.weight = nn.Parameter(mine.detach(), requires_grad=weight.requires_grad)
        del module._parameters["weight"]
        if dim == 0 and bias is not None:
            part.bias = nn.Parameter(bias.to_local().detach(), requires_grad=bias.requires_grad)
            del module._parameters["bias"]
        part.train(module.training)
        _move_marks(module, part)
        module.__dict__[_PLACE] = _Place(type(module), weight.device_mesh, dim)
        module.__class__ = LinearPart
        module._modules[_PART] = part


def why_whole(module: nn.Module) -> str | None:
    """Why a layer is not a part on each rank, or None."""
    from torch.distributed.tensor import Replicate, Shard

    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
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
    if 0 in weight.to_local().shape:
        return "its weight is a DTensor, of which this rank has nothing"
    return None


def has_parts(model: nn.Module) -> bool:
    """Whether a model computes with parts of weights, each on another rank."""
    return any(isinstance(module, LinearPart) for module in model.modules())


def join(model: nn.Module) -> None:
    """Makes DTensors again of all parts that are dense."""
    for module in list(model.modules()):
        if not isinstance(module, LinearPart) or any(sites_in(module.part)):
            continue
        part = module.part
        place: _Place = module.__dict__.pop(_PLACE)
        module.__class__ = place.base
        del module._modules[_PART]
        shape = torch.Size((module.out_features, module.in_features))
        module.weight = _whole(part.weight, place, shape)
        if place.dim == 0 and part.bias is not None:
            module.bias = _whole(part.bias, place, shape[:1])
        elif place.dim == 0:
            module.register_parameter("bias", None)
        _move_marks(part, module)


def _whole(part: nn.Parameter, place: _Place, shape: torch.Size) -> nn.Parameter:
    from torch.distributed.tensor import DTensor, Shard

    whole = DTensor.from_local(
        part.detach(),
        place.mesh,
        [Shard(place.dim)],
        run_check=False,
        shape=shape,
        stride=_strides(shape),
    )
    return nn.Parameter(whole, requires_grad=part.requires_grad)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
