"""Tensor-parallel models for `lower`: every rank lowers its parts of the weights."""

from __future__ import annotations

from torch import nn

from .capture.copied import copied
from .capture.parts import forget_whole, on_any_rank, split_into_parts
from .capture.refs import iter_sites
from .errors import NMError
from .fold import fold
from .plan import Plan, make_plan

IN_PARTS = "tensor parallel: names, shapes and times are of this process's parts of the weights"


def in_parts(model: nn.Module, inplace: bool) -> nn.Module:
    """A tensor-parallel model, folded, whose linear layers are those of this rank's parts."""
    sites = list(iter_sites(model))
    if any(ref.site.lowered for ref in sites):
        raise NMError(
            f"nmfx.lower: {type(model).__name__} is lowered already, at least in parts; "
            f"nmfx.lower(nmfx.fold(model), x) measures again and chooses anew"
        )
    if sites:
        model = fold(model, inplace=inplace)
    elif not inplace:
        model = copied(model, "lower")
    split_into_parts(model)
    return model


def plan_in_parts(model: nn.Module) -> Plan:
    """The plan of a tensor-parallel model; all ranks must call. This one's may have no entries.

    Raises:
        NMError: as `make_plan`, if there is nothing to lower on any rank.
    """
    plan = make_plan(model, required=False)
    if not on_any_rank(model, bool(plan.entries)):
        plan = make_plan(model)
    forget_whole(model)
    return plan
