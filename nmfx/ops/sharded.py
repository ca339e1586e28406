"""Masks of sharded weights (DTensor: tensor parallel, FSDP2): each rank masks the part it has.

    sr_ste(w)    becomes    from_local(sr_ste(to_local(w)))

where every rank has whole groups. Where a group lies on two ranks, the weight is gathered along the
dimension that cuts it, and the result is cut again.

The gradient comes back with the placements of the weight: what ranks have yet to sum is summed
before the decay is added, so that the decay counts once, on however many ranks.

torch.distributed.tensor takes half a second to import: only where a DTensor is, and it is imported
then, is it needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "placements")


def local_part(tensor: Any) -> Tensor:
    """What this process has of a sharded tensor (DTensor); any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Any) -> Tensor:
    """All of a sharded tensor, on every rank (a collective: all ranks must call); others as is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def uncut_placements(tensor: Any, m: int, dim: int) -> tuple[Any, ...]:
    """Placements of a DTensor under which each rank has whole groups of M: its own, if it can be.

    Args:
        tensor: a DTensor.
        m: group length M.
        dim: the grouped dimension.
    """
    from torch.distributed.tensor import Replicate, Shard

    dim %= tensor.ndim
    placements, mesh = list(tensor.placements), tensor.device_mesh
    # Plain loops: Dynamo breaks the graph at a generator.
    cutting = [i for i, p in enumerate(placements) if getattr(p, "dim", None) == dim]
    ranks = 1
    for i in cutting:
        ranks *= mesh.size(i)
    size = tensor.shape[dim]
    uncut = size % (m * ranks) == 0
    if len(cutting) == 1 and type(placements[cutting[0]]) is Shard:
        uncut = -(-size // ranks) % m == 0  # as torch.chunk cuts: the last parts are smaller
    for i, placement in enumerate(placements):
        if placement.is_partial() or (i in cutting and not uncut):
            placements[i] = Replicate()
    return tuple(placements)


def with_whole_groups(tensor: Any, m: int, dim: int) -> Any:
    """A DTensor of which every rank has whole groups: itself, or gathered as far as that takes.

    Any other tensor as it is.
    """
    if groups_are_whole(tensor, m, dim):
        return tensor
    return tensor.redistribute(placements=uncut_placements(tensor, m, dim))


def groups_are_whole(tensor: Any, m: int, dim: int) -> bool:
    """Whether no group of M along `dim` lies on several ranks."""
    return not is_sharded(tensor) or uncut_placements(tensor, m, dim) == tuple(tensor.placements)


def on_parts(
    function: Callable[..., Tensor], m: int, dim: int, weight: Any, *others: Tensor
) -> Any:
    """`function(weight, *others)` of a DTensor, by each rank for its part; differentiable.

    Args:
        function: works within groups of M along `dim`; the shape of its result is the weight's.
        m, dim: what a group is.
        weight: a DTensor.
        others: tensors of the weight's shape, whole on every rank.

    Returns:
        A DTensor placed like the weight, or, where that is a sum of parts, replicated.
    """
    from torch.distributed.tensor import DTensor, Replicate

    whole = with_whole_groups(weight, m, dim)
    parts = [placed_like(other, whole).to_local() for other in others]
    out = DTensor.from_local(
        function(whole.to_local(), *parts),
        weight.device_mesh,
        whole.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    # Nothing can be placed as sums yet to be made; they are made now.
    placements = [Replicate() if p.is_partial() else p for p in weight.placements]
    return out if whole is weight else out.redistribute(placements=placements)


def placed_like(tensor: Tensor, like: Any) -> Any:
    """A tensor that is whole on every rank, as a DTensor that is placed like another."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    whole = DTensor.from_local(tensor.to(like.device), mesh, everywhere, run_check=False)
    return whole.redistribute(placements=like.placements)
