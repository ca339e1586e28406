"""Leaf capture: one linear or conv module, traced, rewritten, and run from the generated code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ..graph.fuse import fuse_masks
from ..graph.rewrite import Use, find_uses, insert_keep, insert_sr_ste
from ..ops.keep import keep
from ..ops.sr_ste import sr_ste
from .forms import forms_of
from .generate import base_class, compile_forward, generated_class
from .packed import decompress_weight, unpack_weight
from .read_only import read_only
from .replace import replace_uses
from .site import SITES, Site, control_name, mask_name
from .tracer import Untraceable, trace_late_bound

WEIGHT = "weight"


def trace_leaf(module: nn.Module) -> tuple[fx.Graph, list[Use], dict[str, str]]:
    """The graph of a module's own forward and the uses of its `weight` in it.

    Raises:
        Untraceable: the forward does not trace, no table operator reads the weight, or something
            else reads it too.
    """
    base = base_class(module)
    graph, baked = trace_late_bound(module, base)
    uses = find_uses(graph, lambda node: node.op == "get_attr" and node.target == WEIGHT)
    if not uses:
        raise Untraceable(f"{base.__name__}.forward does not pass its weight to a linear or conv")
    readers = {user for use in uses for user in use.weight.users}
    if readers != {use.node for use in uses}:
        raise Untraceable(f"{base.__name__}.forward also reads its weight elsewhere")
    if len({use.consumer.dim for use in uses}) > 1:
        raise Untraceable(f"{base.__name__}.forward uses its weight along two dimensions")
    return graph, uses, baked


def leaf_class(module: nn.Module, site: Site) -> type[nn.Module]:
    """The class that runs `module` with its weight masked, fixed or lowered, as `site` says.

    Raises:
        Untraceable: see `trace_leaf`.
    """
    graph, uses, baked = trace_leaf(module)
    members: dict[str, Any] = {"nmfx_graph": graph, "nmfx_baked": baked}
    if site.lowered:
        replace_uses(graph, uses, site)
        forms = forms_of(site.state)
        if not {"dense", "prepacked"}.intersection(forms):  # else the weight is where it was
            read = _unpacked_weight if "packed" in forms else _decompressed_weight
            members["weight"] = property(read)
    elif site.state == "frozen":
        insert_keep(graph, uses, mask_name(0))
        members["nmfx_masked"] = _kept_weight
    else:
        insert_sr_ste(graph, uses, control_name(0), site.pattern.m, site.dim)
        members["nmfx_masked"] = _masked_weight(site.pattern.m, site.dim)
    graph.lint()
    eager = fx.Graph()
    eager.output(eager.graph_copy(graph, {}))
    fuse_masks(eager)
    eager.lint()
    code = eager.python_code("self")
    return generated_class(
        base_class(module),
        ("leaf", site.state, code.src),
        lambda: compile_forward(code.src, code.globals),
        **members,
    )


def _masked_weight(m: int, dim: int) -> Callable[[Any], dict[str, Tensor]]:
    """What a parent that reads the weight itself is shown, by parameter."""

    def nmfx_masked(self: Any) -> dict[str, Tensor]:
        return {WEIGHT: sr_ste(self.weight, getattr(self, control_name(0)), m, dim)}

    return nmfx_masked


def _kept_weight(self: Any) -> dict[str, Tensor]:
    """The same of a frozen layer."""
    return {WEIGHT: keep(self.weight, getattr(self, mask_name(0)))}


def _unpacked_weight(self: Any) -> Tensor:
    """The dense weight of a packed layer, for code that reads it; made anew on every access."""
    site = self.__dict__[SITES][0]
    values, index = self.weight_values, self.weight_index
    weight = unpack_weight(values, index, site.shape, site.dim, site.groups, site.pattern)
    return read_only(weight)


def _decompressed_weight(self: Any) -> Tensor:
    """The same of a semi-structured layer."""
    site = self.__dict__[SITES][0]
    tensors = self.weight_compressed, self.weight_meta
    return read_only(decompress_weight(*tensors, site.shape, site.dim, site.dtype))
