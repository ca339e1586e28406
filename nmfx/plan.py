"""Which layers `lower` may touch, with which pattern, and why it leaves the others alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, fx, nn

from .capture import attention, experts
from .capture.candidates import Candidate, find_candidates, only_read
from .capture.forms import compressed_names, packed_names
from .capture.graph_module import find_graph_uses, masked_uses
from .capture.leaf import trace_leaf
from .capture.own_weights import EXPERTS
from .capture.parts import why_whole
from .capture.refs import SiteRef, iter_sites
from .capture.site import SKIPPED, get_path, marks_of, place_of
from .errors import NMError
from .graph.rewrite import can_pack
from .ops.sharded import is_sharded
from .packing import detect_pattern, makes_smaller, matrix_shape
from .pattern import Pattern
from .tuning.layers import PACKABLE


@dataclass(frozen=True)
class Entry:
    """A layer that can be packed as it stands, and the pattern of its weight."""

    candidate: Candidate
    pattern: Pattern


@dataclass(frozen=True)
class Plan:
    """What `lower` finds in a model.

    Attributes:
        entries: layers that can be packed.
        dense: layers that stay dense, with the reason.
    """

    entries: list[Entry]
    dense: list[tuple[Candidate, str]]


_UNDIVIDED = "its weight is a DTensor, and something reads it that does not call its layer"
_SHARED = "several modules share its {}, and each would lower it"
_NEVER_CALLED = (
    "{} reads its weight and does not call it, so a packed one would be unpacked every time"
)


def make_plan(model: nn.Module, required: bool = True) -> Plan:
    """Sorts all weights of a model that are not lowered yet; changes nothing.

    Raises:
        NMError: no weight of the model is N:M sparse and not lowered, if `required`; or one is on
            the meta device.
    """
    refs = {ref.name: ref for ref in iter_sites(model)}
    plan, readers = Plan([], []), only_read(model)
    any_sparse = False
    children = (child for module in model.modules() for child in module._modules.values())
    parents = Counter(map(id, children))
    for candidate in find_candidates(model):
        ref = refs.get(candidate.name)
        if ref is not None and ref.site.lowered:
            continue
        pattern, reason = _outcome(candidate, ref)
        if pattern is not None and reason is None and candidate.name in readers:
            reason = _NEVER_CALLED.format(readers[candidate.name])
        owner, _ = place_of(candidate.host, candidate.path)
        # Attention's `out_proj`, which is lowered as a layer of its own.
        below = candidate.capture == "scoped" and owner is not candidate.host
        if reason is None and below and parents[id(owner)] > 1:
            reason = _SHARED.format(type(owner).__name__)
        any_sparse |= pattern is not None
        if pattern is not None and reason is None:
            plan.entries.append(Entry(candidate, pattern))
        else:
            assert reason is not None
            plan.dense.append((candidate, _for_report(candidate, ref, reason)))
    if required and not any_sparse:
        name, dense = type(model).__name__, plan.dense
        if any(ref.site.lowered for ref in refs.values()):
            raise NMError(
                f"nmfx.lower: {name} is lowered already, and no other weight of it is N:M sparse; "
                f"nmfx.lower(nmfx.fold(model), x) measures again and chooses anew"
            )
        raise NMError(
            f"nmfx.lower: no weight of {name} is N:M sparse"
            + (f"; the first of {len(dense)}, {dense[0][0].name}: {dense[0][1]}" if dense else "")
        )
    return plan


def _outcome(candidate: Candidate, ref: SiteRef | None) -> tuple[Pattern | None, str | None]:
    """(the pattern of a layer or None, why it stays dense or None)."""
    if ref is None and candidate.obstacle is not None:
        return None, candidate.obstacle
    weight = get_path(candidate.host, candidate.path)
    if is_sharded(weight):
        return None, why_whole(*place_of(candidate.host, candidate.path)) or _UNDIVIDED
    if weight.is_meta:
        raise NMError(f"{candidate.name}: it is on the meta device, so there is nothing to pack")
    pattern = detect_pattern(weight, candidate.dim) if ref is None else ref.site.pattern
    if pattern is None:
        return None, "its weight satisfies no N:M pattern that would make it smaller"
    return pattern, obstacle_to_packing(candidate, pattern, weight)


def obstacle_to_packing(candidate: Candidate, pattern: Pattern, weight: Tensor) -> str | None:
    """Why a layer cannot be packed, or None; its weight need not satisfy the pattern yet."""
    if candidate.kind not in PACKABLE or weight.ndim > 4:
        dims = f"{weight.ndim - 2}-D " if weight.ndim > 4 else ""
        return f"{dims}{candidate.kind} has no packed kernel yet"
    if candidate.capture == "scoped":
        if candidate.kind == EXPERTS:
            reason = experts.why_not_lowered(candidate.host, candidate.path, weight)
        elif isinstance(candidate.host, nn.MultiheadAttention):
            reason = attention.why_not_lowered(candidate.host, candidate.path)
        else:
            reason = "its weight is not read by a traced linear"
        if reason is not None:
            return reason
    module, name = place_of(candidate.host, candidate.path)
    taken = [key for key in (*packed_names(name), *compressed_names(name)) if hasattr(module, key)]
    if taken:
        return f"it has an attribute {taken[0]} of its own"
    columns = matrix_shape(weight.shape, candidate.dim)[1]
    if not makes_smaller(columns, pattern, weight.dtype.itemsize):
        return f"packed as {pattern} it would not be smaller"
    return _unpackable_graph(candidate)


def _for_report(candidate: Candidate, ref: SiteRef | None, reason: str) -> str:
    """A layer that was never sparsified keeps the reason it has."""
    if ref is not None:
        return f"{reason}; folded"
    return marks_of(candidate.host).get(SKIPPED, {}).get(candidate.path, reason)


def _unpackable_graph(candidate: Candidate) -> str | None:
    if candidate.capture == "scoped":
        return None  # attention.py and experts.py know its uses
    if candidate.capture == "leaf":
        _, uses, _ = trace_leaf(candidate.host)
        return can_pack(uses)
    gm = candidate.host
    assert isinstance(gm, fx.GraphModule)
    path = candidate.path
    uses = find_graph_uses(gm)[path] if candidate.site is None else masked_uses(gm, path)
    return can_pack(uses, lambda node: _is_bias(gm, node, candidate))


def _is_bias(gm: fx.GraphModule, node: fx.Node, candidate: Candidate) -> bool:
    outputs = candidate.shape[1 - candidate.dim]
    return node.op == "get_attr" and get_path(gm, str(node.target)).shape == (outputs,)
