"""Weights that hold their zeros themselves: what `fold` leaves, and what others pruned."""

from __future__ import annotations

from torch import Tensor, nn

from ..packing import detect_pattern
from ..pattern import Pattern
from .candidates import Candidate
from .refs import is_freed, weight_or_none


def folded_pattern(candidate: Candidate) -> Pattern | None:
    """The pattern that a weight without a mask satisfies, if it makes it smaller.

    Only plain weights that are there are looked at: to read a sharded one all ranks must call, and
    one on the meta device, of fake tensors or whose memory FSDP1 took has no values.
    """
    weight = weight_or_none(candidate.host, candidate.path)
    if candidate.obstacle is not None or type(weight) not in (Tensor, nn.Parameter):
        return None
    if weight.is_meta or is_freed(weight):
        return None
    return detect_pattern(weight, candidate.dim)
