"""The consumers of a lowered weight replaced, in leaf and graph capture alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ..graph.rewrite import (
    Use,
    replace_with_by_rows,
    replace_with_packed,
    replace_with_prepacked,
    replace_with_semi_structured,
)
from .forms import compressed_names, form_names, forms_of, packed_names
from .site import COPY, Site


def replace_uses(graph: fx.Graph, uses: Sequence[Use], site: Site) -> None:
    """Replaces the consumers of a lowered weight by the operator of its state.

    Args:
        graph: of the host that `site.path` starts from.
        uses: all of them.
        site: lowered.
    """
    if site.state == "packed":
        names = packed_names(site.path)
        replace_with_packed(graph, uses, *names, site.shape, site.pattern, site.activation)
    elif site.state == "semi_structured":
        assert site.dtype is not None
        names = compressed_names(site.path)
        replace_with_semi_structured(graph, uses, *names, site.shape, site.dtype, site.algorithms)
    elif site.state == "prepacked":
        replace_with_prepacked(graph, uses, COPY, site.shape)
    else:
        by_form: dict[str, tuple[Any, ...]] = {
            "packed": (site.pattern.n, site.pattern.m),
            "semi_structured": (site.dtype, site.algorithms),
            "dense": (site.dim == 0,),
        }
        few, many = (
            (form, form_names(site.path, form), by_form[form]) for form in forms_of(site.state)
        )
        replace_with_by_rows(graph, uses, few, many, site.shape, site.threshold, site.activation)
