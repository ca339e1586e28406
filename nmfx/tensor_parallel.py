"""Tensor-parallel models for `lower`: every rank lowers its parts of the weights."""

from __future__ import annotations

from torch import nn

from .capture.copied import copied
from .capture.parts import divisible, on_any_rank
from .capture.refs import iter_sites
from .capture.site import get_path
from .errors import NMError
from .fold import fold
from .ops.sharded import local_part
from .packing import detect_pattern
from .plan import make_plan

IN_PARTS = (
    "tensor parallel: names, shapes, patterns and times are of this process's parts of the "
    "weights; a part that cuts groups of M may have another pattern"
)


def folded(model: nn.Module, inplace: bool) -> nn.Module:
    """A tensor-parallel model, folded: a copy of it unless `inplace`. All ranks must call.

    Raises:
        NMError: some of it is lowered, or nothing of it can be, on any rank. Nothing is changed.
    """
    sites = {ref.name: ref.site for ref in iter_sites(model)}
    if any(site.lowered for site in sites.values()):
        raise NMError(
            f"nmfx.lower: {type(model).__name__} is lowered already, at least in parts; "
            f"nmfx.lower(nmfx.fold(model), x) measures again and chooses anew"
        )
    if sites:
        return fold(model, inplace=inplace)
    here = bool(make_plan(model, required=False).entries) or any(
        detect_pattern(local_part(get_path(c.host, c.path)), c.dim) for c in divisible(model)
    )
    if not on_any_rank(model, here):
        make_plan(model)  # says why
    return model if inplace else copied(model, "lower")
