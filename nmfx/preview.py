"""nmfx.preview: what N:M would buy on this machine, before a step is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calls import evaluation_mode, kept_random_state, parse_calls, run_calls, undisturbed
from .capture.candidates import Candidate, find_candidates
from .capture.own_weights import EXPERTS
from .capture.packed import packed_weight_bytes
from .capture.refs import GONE, weight_or_none
from .capture.sharding import BEFORE, refuse_sharded
from .capture.site import get_path
from .errors import NMError
from .kernels import semi_structured
from .mask import nm_project
from .packing import matrix_shape
from .pattern import Pattern
from .plan import obstacle_to_packing
from .policy import Decision, Rules, decide, parse_rules
from .report import dense_bytes
from .report_table import Report, Row
from .sparsify import check_existing
from .tuning.bench import Bench
from .tuning.choose import choose
from .tuning.decide import DENSE, PACKED, SEMI, Choice, stays_dense
from .tuning.progress import progress
from .tuning.shapes import Recorder, Seen
from .tuning.table import ASSUMED

_STATES = {DENSE: "dense", PACKED: "would pack", SEMI: "would be semi_structured"}


def preview(model: nn.Module, rules: Rules, example_inputs: Any = None) -> Report:
    """The table that `nmfx.report` would show after sparsify, training and `nmfx.lower`.

    Every layer that `rules` make sparse is timed with random weights under a random mask, as
    `lower` would time it. The model and torch's random state stay as they are: the example inputs
    run through a copy of its structure, which shares the weights.

    Args:
        model: dense or sparsified.
        rules: as for `nmfx.sparsify`.
        example_inputs: as for `nmfx.lower`.

    Returns:
        A `Report`; its rows' states are "would pack", "would prepack" or "dense".

    Raises:
        NMError: what `sparsify` and `lower` raise for such rules and inputs.
    """
    if not isinstance(model, nn.Module):
        raise NMError(f"nmfx.preview takes an nn.Module, got {type(model).__name__}")
    refuse_sharded(model, "preview", BEFORE)
    calls = parse_calls(example_inputs)
    decisions = decide(model, find_candidates(model), parse_rules(rules))
    check_existing(decisions)
    chosen = [d for d in decisions if d.pattern is not None]
    seen: Mapping[str, Mapping[Seen, int]] = {}
    with kept_random_state():
        if calls:
            seen = _run(model, calls, [d.candidate for d in chosen])
        bench = Bench(model)
        choices = {
            d.candidate.name: _choice(bench, d.candidate, d.pattern, seen if calls else None)
            for d in progress(chosen, "measuring")
            if d.pattern is not None
        }
    rows = tuple(_row(d, choices.get(d.candidate.name)) for d in decisions)
    return Report(rows, tuple(_notes(rows, bool(calls), bench)))


def _run(
    model: nn.Module, calls: list[Any], chosen: list[Candidate]
) -> Mapping[str, Mapping[Seen, int]]:
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, shared)  # a forward may set attributes and buffers
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    names = [c.name for c in chosen if c.name in parameters]
    experts = (c for c in chosen if c.kind == EXPERTS and c.name in parameters)
    mixtures = {c.name: twin.get_submodule(c.module_name) for c in experts}
    recorder = Recorder({name: parameters[name] for name in names}, mixtures)
    with undisturbed(twin), evaluation_mode(twin, calls), recorder.hooked(), recorder:
        run_calls(twin, calls)
    return recorder.seen


@torch.no_grad()
def _choice(
    bench: Bench,
    candidate: Candidate,
    pattern: Pattern,
    seen: Mapping[str, Mapping[Seen, int]] | None,
) -> Choice:
    if candidate.site is not None and candidate.site.lowered:
        return stays_dense("it is lowered already")
    weight = weight_or_none(candidate.host, candidate.path)
    if weight is None:
        raise NMError(f"{candidate.name}: {GONE}")
    if weight.is_meta:
        raise NMError(f"{candidate.name}: it is on the meta device, so there is nothing to time")
    obstacle = obstacle_to_packing(candidate, pattern, weight)
    if obstacle is not None:
        return stays_dense(obstacle)
    shapes = None if seen is None else seen.get(candidate.name, {})
    return choose(
        bench, candidate, _random(weight, pattern, candidate.dim), pattern, shapes, prepack=True
    )


def _random(weight: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """A random weight like the given one that satisfies the pattern."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
    return nm_project(values, pattern, dim)


def _row(decision: Decision, choice: Choice | None) -> Row:
    c, pattern = decision.candidate, decision.pattern
    dense = stored = dense_bytes(c)
    if choice is None or pattern is None:
        return Row(
            c.name, c.kind, c.shape, None, "dense", "", None, False, dense, dense, decision.reason
        )
    if choice.name == PACKED:
        itemsize = get_path(c.host, c.path).dtype.itemsize
        stored = packed_weight_bytes(c.shape, c.dim, c.groups, pattern, itemsize)
    elif choice.name == SEMI:
        backend = semi_structured.backend_of(get_path(c.host, c.path).device)
        assert isinstance(backend, semi_structured.Backend), backend
        stored = semi_structured.compressed_bytes(*matrix_shape(c.shape, c.dim), backend)
    elif choice.name != DENSE:
        stored = 2 * dense
    return Row(
        c.name,
        c.kind,
        c.shape,
        pattern,
        _STATES.get(choice.name, "would prepack"),
        c.capture,
        None,
        False,
        dense,
        stored,
        choice.reason,
        choice.rows,
        *((choice.ms_dense, choice.ms) if choice.rows else ()),
    )


def _notes(rows: tuple[Row, ...], ran: bool, bench: Bench) -> list[str]:
    notes = ["preview: nothing was changed; timed with random weights under random masks"]
    if not ran:
        notes.append(ASSUMED)
    dense = sum(row.ms_dense or 0.0 for row in rows)
    chosen = sum(row.ms_chosen or 0.0 for row in rows)
    if chosen:
        notes.append(
            f"all timed layers: dense {dense:.3f} ms, as chosen {chosen:.3f} ms "
            f"({dense / chosen:.2f}x)"
        )
    return [*notes, *bench.notes()]
