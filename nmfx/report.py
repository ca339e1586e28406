"""nmfx.report: one row per linear and conv weight, with what became of it and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from .capture.candidates import Candidate, find_candidates, read_around
from .capture.folded import folded_pattern
from .capture.fsdp import notes_on_rounding
from .capture.obstacles import computed_since
from .capture.own_weights import own_weights
from .capture.program import remarks
from .capture.refs import weight_or_none
from .capture.site import COPY, MADE_ON, MEASURED, NOTES, SKIPPED, marks_of, place_of, stored_names
from .capture.take_over import decomposed_names, exported_nodes
from .errors import NMError
from .kernels.masks import why_plain
from .metrics import density
from .ops.compiled import UNFUSED_REASON
from .report_table import Report, Row, numel
from .tuning.hardware import machine


def report(model: nn.Module) -> Report:
    """One row per linear and conv weight of any model: pattern, state, or the reason it is dense.

    A weight without a mask whose own zeros are N:M is "folded", with the pattern that makes it the
    smallest, whoever pruned it; to tell, a few lines of each such weight are read, and all of it
    where these are N:M. Changes nothing and runs nothing.

    Raises:
        NMError: not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise NMError(f"nmfx.report takes an nn.Module, got {type(model).__name__}")
    candidates = list(find_candidates(model))
    readers = read_around(model)
    rows = tuple(_row(candidate, readers.get(candidate.name)) for candidate in candidates)
    notes = [*marks_of(model).get(NOTES, ()), *_moved(model)]
    if UNFUSED_REASON is not None and any(row.state == "sparse" for row in rows):
        notes.append(f"compiled models call the eager mask kernel: {UNFUSED_REASON}")
    exported = dict.fromkeys(name for name, _ in exported_nodes(model))
    if exported:
        notes.append(
            f"weights in nmfx operators of an exported graph: {', '.join(exported)}; "
            f"nmfx.sparsify, fold and lower take them over"
        )
    decomposed = dict.fromkeys(decomposed_names(model))
    if decomposed:
        notes.append(
            f"linear layers that are decomposed in a graph (aten.permute and addmm or mm): "
            f"{', '.join(decomposed)}; nmfx.sparsify and lower put them together"
        )
    return Report(rows, (*notes, *_plain_masks(candidates), *notes_on_rounding(model)))


def _moved(model: nn.Module) -> Iterator[str]:
    """Whether a loaded model was lowered on another machine than this, or for more threads."""
    made_on = marks_of(model).get(MADE_ON)
    if made_on is not None:
        here = machine(next((buffer.device for buffer in model.buffers()), torch.device("cpu")))
        if made_on != here:
            yield (
                f"its kernels were chosen on {made_on}; this is {here}: "
                f"nmfx.lower(nmfx.fold(model), x) chooses anew"
            )


def _plain_masks(candidates: list[Candidate]) -> list[str]:
    reasons = Counter(
        why_plain(weight, candidate.site.pattern.m)
        for candidate in candidates
        if candidate.site is not None and candidate.site.state == "sparse"
        if (weight := weight_or_none(candidate.host, candidate.path)) is not None
    )
    return [
        f"masks come from plain torch, many times slower than a kernel (layers: {count}): {reason}"
        for reason, count in reasons.items()
        if reason is not None
    ]


def _row(candidate: Candidate, reader: str | None) -> Row:
    site = candidate.site
    reason = marks_of(candidate.host).get(SKIPPED, {}).get(candidate.path, "")
    times = marks_of(candidate.host).get(MEASURED, {}).get(candidate.path, ())
    dense = dense_bytes(candidate)
    if site is None:
        reason = _compiled(candidate) or reason or candidate.obstacle or ""
        pattern = None if reason else folded_pattern(candidate)
        return Row(
            candidate.name,
            candidate.kind,
            candidate.shape,
            pattern,
            "dense" if pattern is None else "folded",
            "",
            None,
            False,
            dense,
            dense,
            reason or ("not sparsified" if pattern is None else _zeros(candidate)),
            *times,
        )
    return Row(
        candidate.name,
        candidate.kind,
        candidate.shape,
        site.pattern,
        site.state,
        site.capture,
        None if site.lowered else site.lambda_w,
        site.attached is not None,
        dense,
        _stored_bytes(candidate, dense),
        reason or _explanation(candidate, reader),
        *times,
    )


def _compiled(candidate: Candidate) -> str:
    """What `nmfx.backend` made of a dense weight, if it was compiled with that."""
    module, name = place_of(candidate.host, candidate.path)
    weight = module._parameters.get(name)
    return "" if weight is None else remarks(weight)


def _zeros(candidate: Candidate) -> str:
    """How many zeros a folded weight has: its pattern tells how many at least."""
    return f"{density(weight_or_none(candidate.host, candidate.path)):.1%} nonzero"


def _explanation(candidate: Candidate, reader: str | None) -> str:
    site = candidate.site
    assert site is not None
    changed = computed_since(candidate.host, site)
    if changed is not None:
        return changed
    if candidate.adapted is not None and not site.lowered:
        return candidate.adapted.reason
    if reader is not None and not site.lowered:
        return f"{reader} also reads it around its module, and sees the masked weight"
    if site.capture == "scoped" and own_weights(candidate.host) is None:
        return "its forward does not trace, so it runs on a stand-in with the masked weight"
    return ""


def dense_bytes(candidate: Candidate) -> int:
    """Bytes of a weight as it is dense, in whatever form it is now; 0 where there is no weight."""
    return numel(candidate.shape) * _itemsize(candidate)


def _itemsize(candidate: Candidate) -> int:
    path = candidate.path
    if candidate.site is not None:
        if candidate.site.dtype is not None:
            return candidate.site.dtype.itemsize
        path = stored_names(candidate.site)[0]
    tensor = weight_or_none(candidate.host, path)
    return 0 if tensor is None else tensor.dtype.itemsize


def _stored_bytes(candidate: Candidate, dense: int) -> int:
    assert candidate.site is not None
    if candidate.site.state == "prepacked":
        copies = candidate.host.__dict__[COPY].count
        return (1 + max(1, copies)) * dense  # the first is made by the first call
    tensors = [weight_or_none(candidate.host, name) for name in stored_names(candidate.site)]
    return sum(one.numel() * one.dtype.itemsize for one in tensors if one is not None)
