"""Tensor parallelism: a linear layer whose weight is a DTensor, as a layer of this rank's part.

    hook of                  LinearPart                              hook of
    parallelize_module       to_local ── nn.Linear of ── from_local  parallelize_module
    x whole (colwise), or                this rank's     some outputs (colwise), or
    some columns (rowwise)               rows / columns  a term of each sum (rowwise)

What ranks send each other stays as it was.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PLACE = "_place_of_part"  # not _nmfx_: folding drops those
PART = "part"


@dataclass(frozen=True)
class Place:
    """Where a part belongs.

    Attributes:
        base: the class of the layer.
        mesh: the ranks.
        dim: the dimension of the weight that they cut: 0 are rows (colwise), 1 columns (rowwise).
        rank: which part this is.
        order: the names of the layer's parameters, as its state_dict has them.
        whole: the parameters that were cut, as long as nothing was written.
    """

    base: type[nn.Module]
    mesh: Any
    dim: int
    rank: int
    order: tuple[str, ...]
    whole: dict[str, nn.Parameter]


class LinearPart(nn.Module):
    """A mixin: a linear layer of which every rank computes its part; takes and gives DTensors."""

    part: Any
    in_features: int
    out_features: int

    @property
    def weight(self) -> Any:
        """The DTensor of all ranks' parts, unpacked."""
        return whole_of(self.part.weight, self._place, self._shape)

    @property
    def bias(self) -> Any:
        """The same of the bias; that of a rowwise layer is a parameter, whole on every rank."""
        if "bias" in self._parameters:
            return self._parameters["bias"]
        return whole_of(self.part.bias, self._place, self._shape[:1])

    @property
    def _place(self) -> Place:
        return self.__dict__[PLACE]

    @property
    def _shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def forward(self, input: Any) -> Any:
        """What `nn.Linear.forward` makes of a DTensor."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        place = self._place
        columns, last = place.dim == 1, input.ndim - 1
        taken, grad = (Shard(last), Shard(last)) if columns else (Replicate(), Partial())
        if tuple(input.placements) != (taken,):  # else its gradient would be summed here already
            input = input.redistribute(place.mesh, [taken])
        x = input.to_local(grad_placements=[grad])
        shape = torch.Size((*input.shape[:-1], self.out_features))
        out = DTensor.from_local(
            self.part(x),
            place.mesh,
            [Partial() if columns else Shard(last)],
            run_check=False,
            shape=shape,
            stride=_strides(shape),
        )
        bias = self._parameters.get("bias")  # of a sum, of which each rank has a term
        return out if bias is None else out + bias.to(out.dtype)

    def extra_repr(self) -> str:
        cut = "columns" if self._place.dim == 1 else "rows"
        return f"{cut} of the weight, part {self._place.rank} of {self._place.mesh.size()}"


@functools.cache
def part_class(base: type[nn.Module]) -> type[nn.Module]:
    """`LinearPart` of a class of linear layers, with the name and the other members of that."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (LinearPart, base), names)


def whole_of(part: Any, place: Place, shape: torch.Size) -> Any:
    """A DTensor of what each rank has a part of; shares the memory of this one."""
    from torch.distributed.tensor import DTensor, Shard

    if part is None:
        return None
    return DTensor.from_local(
        part, place.mesh, [Shard(place.dim)], run_check=False, shape=shape, stride=_strides(shape)
    )


def has_parts(model: nn.Module) -> bool:
    """Whether a model computes with parts of weights, each on another rank."""
    return any(isinstance(module, LinearPart) for module in model.modules())


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
