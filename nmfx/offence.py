"""Where a tensor breaks a pattern, in words: for files of weights and of graphs."""

from __future__ import annotations

from torch import Tensor

from .pattern import Pattern


def find_offence(nonzero: Tensor, dim: int, pattern: Pattern) -> str | None:
    """Where the first group with more than N nonzeros is; None if there is none.

    Args:
        nonzero: bool, any shape; `nonzero.shape[dim]` is a multiple of M.
        dim: the grouped dimension, not negative.
        pattern: the rule.
    """
    groups = nonzero.movedim(dim, -1).unflatten(-1, (-1, pattern.m))
    over = groups.sum(-1) > pattern.n
    if not over.any():
        return None
    place = over.nonzero()[0].tolist()
    count = int(groups[tuple(place)].sum())
    *others, group = place
    first = group * pattern.m
    index = [str(one) for one in others]
    index.insert(dim, f"{first}:{first + pattern.m}")
    return (
        f"[{', '.join(index)}] holds {count} nonzeros, {pattern.text} allows {pattern.n}; "
        f"groups like it: {int(over.sum()):,} of {over.numel():,}"
    )
