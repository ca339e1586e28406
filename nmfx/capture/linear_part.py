"""Tensor parallelism: a linear layer whose weight is a DTensor, as a layer of this rank's part.

    hook of                  LinearPart                              hook of
    parallelize_module       to_local ── nn.Linear of ── from_local  parallelize_module
    x whole (colwise), or                this rank's     some outputs (colwise), or
    some columns (rowwise)               rows / columns  a term of each sum (rowwise)

What ranks send each other stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PLACE = "_place_of_part"  # not _nmfx_: folding drops those
PART = "part"


@dataclass(frozen=True)
class Place:
    """Where a part belongs: the class of its layer, the ranks, and the dimension that they cut.

    `whole` has the parameters that were cut, as long as nothing was written.
    """

    base: type[nn.Module]
    mesh: Any
    dim: int
    whole: dict[str, nn.Parameter]


class LinearPart(nn.Module):
    """A linear layer of which every rank computes its part; takes and gives DTensors."""

    part: Any
    bias: Any  # rowwise: added to the sum, of which each rank has a term
    in_features: int
    out_features: int

    def forward(self, input: Any) -> Any:
        """What `nn.Linear.forward` makes of a DTensor."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        place: Place = self.__dict__[PLACE]
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
            stride=strides(shape),
        )
        return out + self.bias if columns and self.bias is not None else out

    def extra_repr(self) -> str:
        place: Place = self.__dict__[PLACE]
        cut = "columns" if place.dim == 1 else "rows"
        return f"{cut} of the weight, rank {place.mesh.get_local_rank()} of {place.mesh.size()}"


def strides(shape: torch.Size) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def has_parts(model: nn.Module) -> bool:
    """Whether a model computes with parts of weights, each on another rank."""
    return any(isinstance(module, LinearPart) for module in model.modules())
