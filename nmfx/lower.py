"""nmfx.lower: from trained, masked weights to packed ones.

    sparsified layer, or a weight that satisfies N:M
        linear  -> pack (checked bit for bit), nmfx::linear_nm instead of linear
        other   -> folded: dense, with exact zeros, and the reason in the report

This first form packs every linear layer that has a pattern. Its kernel is the reference in plain
torch, which unpacks on every call: exact, smaller, and slower than dense.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .calls import compare_outputs, evaluation_mode, parse_calls
from .capture.candidates import Candidate, find_candidates
from .capture.graph_module import find_graph_uses, masked_uses
from .capture.install import check_classes, refresh
from .capture.leaf import trace_leaf
from .capture.site import (
    HOLDER,
    SITES,
    SKIPPED,
    Holder,
    Site,
    SiteRef,
    get_path,
    holder_of,
    iter_sites,
    packed_names,
)
from .capture.snapshot import restored_on_error
from .errors import NMError
from .fold import bake, masked_weight
from .graph.rewrite import can_pack
from .mask import as_bits
from .packing import detect_pattern, pack, packed_bytes, unpack
from .pattern import Pattern
from .report import NOTES

_SLOW = (
    "packed layers run the reference kernel in plain torch, which unpacks the weight on every "
    "call: smaller than dense, and slower. Nothing was timed."
)
_NOTHING_PACKED = (
    "nothing was packed: the N:M layers of this model have no packed kernel yet, so they are "
    "folded (dense, with exact zeros)."
)


def lower(model: nn.Module, example_inputs: Any = None, *, inplace: bool = False) -> nn.Module:
    """A packed inference model: weights in N:M form, everything else as `nmfx.fold` leaves it.

    Takes sparsified and folded models, in train or eval mode, partly dense. The result computes
    what the folded model computes, within rounding; it gives gradients to its inputs and to what
    stayed dense, and refuses gradients of packed weights. Its state_dict holds plain tensors,
    `weight_values` and `weight_index` in place of `weight`. Every layer that stays dense says why
    in `nmfx.report`.

    Args:
        model: a sparsified model, or one whose weights satisfy an N:M pattern.
        example_inputs: a tuple is one call's arguments, a dict one call's keywords, a list several
            calls. Each is run, in eval mode, before and after, and the outputs are compared.
        inplace: lower `model` itself and free its dense weights.

    Returns:
        The lowered model: a deep copy, or `model`.

    Raises:
        NMError: no weight is N:M sparse, a weight on the meta device, or outputs that differ.
            Nothing is changed then.
    """
    calls = parse_calls(example_inputs)
    check_classes(model)
    _plan(model)  # refuse before a copy is made
    model = model if inplace else copy.deepcopy(model)
    plan, dense = _plan(model)
    with evaluation_mode(model, calls):
        expected = [model(*args, **kwargs) for args, kwargs in calls]
    with restored_on_error(module for entry in plan for module in _touched(entry)):
        for entry in plan:
            _pack_layer(entry)
        with evaluation_mode(model, calls):
            for number, (args, kwargs) in enumerate(calls):
                compare_outputs(expected[number], model(*args, **kwargs), number)
    bake(model)
    for candidate, reason in dense:
        candidate.host.__dict__.setdefault(SKIPPED, {})[candidate.path] = reason
    model.__dict__[NOTES] = (_SLOW if plan else _NOTHING_PACKED,)
    return model


@dataclass(frozen=True)
class _Entry:
    """A layer to pack: its candidate, its pattern, and its site if it is sparsified."""

    candidate: Candidate
    pattern: Pattern
    ref: SiteRef | None


def _plan(model: nn.Module) -> tuple[list[_Entry], list[tuple[Candidate, str]]]:
    """(layers to pack, layers that stay dense with the reason); changes nothing.

    Raises:
        NMError: no weight of the model is N:M sparse.
    """
    refs = {ref.name: ref for ref in iter_sites(model)}
    plan: list[_Entry] = []
    dense: list[tuple[Candidate, str]] = []
    any_sparse = False
    for candidate in find_candidates(model):
        ref = refs.get(candidate.name)
        if ref is not None and ref.site.state == "packed":
            continue
        pattern, reason = _outcome(candidate, ref)
        any_sparse |= pattern is not None
        if pattern is not None and reason is None:
            plan.append(_Entry(candidate, pattern, ref))
        else:
            assert reason is not None
            dense.append((candidate, _for_report(candidate, ref, reason)))
    if not any_sparse:
        name = type(model).__name__
        raise NMError(
            f"nmfx.lower: no weight of {name} is N:M sparse"
            + (f"; the first of {len(dense)}, {dense[0][0].name}: {dense[0][1]}" if dense else "")
        )
    return plan, dense


def _outcome(candidate: Candidate, ref: SiteRef | None) -> tuple[Pattern | None, str | None]:
    """(the pattern of a layer or None, why it stays dense or None)."""
    if ref is None and candidate.obstacle is not None:
        return None, candidate.obstacle
    weight = get_path(candidate.host, candidate.path)
    if weight.is_meta:
        raise NMError(f"{candidate.name}: it is on the meta device, so there is nothing to pack")
    pattern = detect_pattern(weight, candidate.dim) if ref is None else ref.site.pattern
    if pattern is None:
        return None, "its weight satisfies no N:M pattern that would make it smaller"
    return pattern, _obstacle_to_packing(candidate, ref, pattern, weight)


def _obstacle_to_packing(
    candidate: Candidate, ref: SiteRef | None, pattern: Pattern, weight: Tensor
) -> str | None:
    if candidate.kind not in ("linear", "addmm"):
        return f"{candidate.kind} has no packed kernel yet"
    if candidate.capture == "scoped":
        return "its weight is not read by a traced linear"
    rows = weight.shape[1 - candidate.dim]
    itemsize = weight.dtype.itemsize
    if packed_bytes(rows, candidate.reduced, pattern, itemsize) >= weight.numel() * itemsize:
        return f"packed as {pattern} it would not be smaller"
    return _unpackable_graph(candidate, ref)


def _for_report(candidate: Candidate, ref: SiteRef | None, reason: str) -> str:
    """A layer that was never sparsified keeps the reason it has."""
    if ref is not None:
        return f"{reason}; folded"
    return candidate.host.__dict__.get(SKIPPED, {}).get(candidate.path, reason)


def _unpackable_graph(candidate: Candidate, ref: SiteRef | None) -> str | None:
    if candidate.capture == "leaf":
        _, uses, _ = trace_leaf(candidate.host)
        return can_pack(uses)
    gm = candidate.host
    assert isinstance(gm, fx.GraphModule)
    uses = find_graph_uses(gm)[candidate.path] if ref is None else masked_uses(gm, candidate.path)
    return can_pack(uses, lambda node: _is_bias(gm, node, candidate))


def _is_bias(gm: fx.GraphModule, node: fx.Node, candidate: Candidate) -> bool:
    outputs = candidate.shape[1 - candidate.dim]
    return node.op == "get_attr" and get_path(gm, str(node.target)).shape == (outputs,)


@torch.no_grad()
def _pack_layer(entry: _Entry) -> None:
    """Swaps one layer's weight for packed buffers."""
    host = entry.candidate.host
    owner, name = _owner(entry)
    weight = getattr(owner, name).detach()
    dense = weight if entry.ref is None else masked_weight(entry.ref)
    rows = dense if entry.candidate.dim == 1 else dense.t()
    values, index = pack(rows, entry.pattern)
    if not torch.equal(as_bits(unpack(values, index, *rows.shape, entry.pattern)), _bits(rows)):
        raise AssertionError(f"{entry.candidate.name}: packing is not exact, please report this")

    store = _store(entry)
    for buffer_name, tensor in zip(packed_names(name), (values, index), strict=True):
        owner.register_buffer(buffer_name, tensor)
    sites = list(store.__dict__.get(SITES, ()))
    if entry.ref is None:
        sites.append(_packed_site(entry))
    else:
        sites[entry.ref.index] = _packed_site(entry)
    store.__dict__[SITES] = sites
    refresh(host, store)  # while the weight still exists: graph uses are found by its name
    del owner._parameters[name]


def _bits(rows: Tensor) -> Tensor:
    # A -0.0 that somebody else's pruning left unpacks to +0.0, and that is the only change allowed.
    return as_bits(torch.where(rows == 0, 0.0, rows))


def _touched(entry: _Entry) -> list[nn.Module]:
    host, holder = entry.candidate.host, holder_of(entry.candidate.host)
    return [host, _owner(entry)[0], *([holder] if holder is not None else [])]


def _owner(entry: _Entry) -> tuple[nn.Module, str]:
    owner_path, _, name = entry.candidate.path.rpartition(".")
    host = entry.candidate.host
    return (get_path(host, owner_path) if owner_path else host), name


def _packed_site(entry: _Entry) -> Site:
    c = entry.candidate
    if entry.ref is not None:
        return replace(entry.ref.site, state="packed", attached=None)
    return Site(c.path, c.shape, c.dim, c.reduced, entry.pattern, 0.0, c.kind, c.capture, "packed")


def _store(entry: _Entry) -> nn.Module:
    if entry.ref is not None:
        return entry.ref.store
    host = entry.candidate.host
    if entry.candidate.capture != "graph":
        return host
    holder = holder_of(host)
    if holder is None:
        holder = Holder()
        holder.__dict__[SITES] = []
        host._modules[HOLDER] = holder
    return holder
