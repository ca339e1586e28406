"""nmfx.report: one row per linear and conv weight, with what became of it and why."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn

from .capture.candidates import Candidate, find_candidates, read_around
from .capture.fsdp import notes_on_rounding
from .capture.obstacles import computed_since
from .capture.own_weights import own_weights
from .capture.program import remarks
from .capture.refs import weight_or_none
from .capture.site import COPY, MADE_ON, MEASURED, NOTES, SKIPPED, marks_of, place_of, stored_names
from .capture.take_over import decomposed_names, exported_nodes
from .errors import NMError
from .kernels.masks import why_plain
from .ops.compiled import UNFUSED_REASON
from .pattern import Pattern
from .tuning.hardware import machine


@dataclass(frozen=True)
class Row:
    """One weight.

    Attributes:
        fqn: fully qualified name of the parameter.
        kind: "linear", "addmm", "conv", "conv_transpose", "recurrent", "bilinear", "experts", or
            the class of what nmfx leaves alone.
        shape: of the dense weight.
        pattern: the pattern in force, or None for a dense layer.
        state: "sparse" (masked at every forward), "frozen" (fixed mask), "packed",
            "semi_structured" (2:4 on a GPU's sparse tensor cores), "prepacked" (dense, with a copy
            in oneDNN's layout), two forms like "packed+dense" (the first for few rows) or "dense";
            from `nmfx.preview`, "would pack", "would be semi_structured", "would prepack" or
            "dense".
        capture: "leaf", "scoped" or "graph" for rewritten layers, else "".
        lambda_w: strength of the SR-STE decay; None for a dense or lowered layer.
        attached: whether an optimizer applies the decay (`nmfx.attach`).
        bytes_dense, bytes: of the dense weight, and as it is stored now, with all copies.
        reason: why the layer is as it is, where that needs one.
        rows: numbers of rows it was timed with; empty if it was not.
        ms_dense, ms_chosen: milliseconds that the timed calls take, dense and as chosen.
    """

    fqn: str
    kind: str
    shape: tuple[int, ...]
    pattern: Pattern | None
    state: str
    capture: str
    lambda_w: float | None
    attached: bool
    bytes_dense: int
    bytes: int
    reason: str
    rows: tuple[int, ...] = ()
    ms_dense: float | None = None
    ms_chosen: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as dense the layer is as chosen; None if it was not timed."""
        if self.ms_dense is None or not self.ms_chosen:
            return None
        return self.ms_dense / self.ms_chosen


@dataclass(frozen=True)
class Report:
    """What `nmfx.report` found; `print` it for a table."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def totals(self) -> dict[str, int]:
        """Layers and weights in all and under a pattern, and bytes before and now."""
        sparse = [row for row in self.rows if row.pattern is not None]
        return {
            "layers": len(self.rows),
            "layers_sparse": len(sparse),
            "weights": sum(_numel(row.shape) for row in self.rows),
            "weights_sparse": sum(_numel(row.shape) for row in sparse),
            "weights_kept": sum(
                _numel(row.shape) * row.pattern.n // row.pattern.m for row in sparse if row.pattern
            ),
            "bytes_dense": sum(row.bytes_dense for row in self.rows),
            "bytes": sum(row.bytes for row in self.rows),
        }

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        timed = any(row.rows for row in self.rows)
        left = ("parameter", "kind", "shape", "pattern", "state")
        for name in (*left, "bytes", *(_TIMES if timed else ()), "reason"):
            justify = "left" if name in (*left, "reason") else "right"
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(
                escape(row.fqn),  # globs and names may look like rich's markup: [a-z]
                row.kind,
                "x".join(map(str, row.shape)),
                "-" if row.pattern is None else row.pattern.text,
                row.state,
                f"{row.bytes:,}",
                *(_times(row) if timed else ()),
                escape(row.reason),
            )
        return table

    def __str__(self) -> str:
        buffer = io.StringIO()
        # Wide enough for any row: a table in a log must not be cut to the terminal's width.
        Console(file=buffer, width=10_000, color_system=None).print(self)
        lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
        return "\n".join([*lines, "", *self._summary()])

    def _summary(self) -> list[str]:
        t = self.totals
        share = t["weights_sparse"] / t["weights"] if t["weights"] else 0.0
        return [
            f"{t['layers_sparse']} of {t['layers']} layers and {share:.1%} of their "
            f"{t['weights']:,} weights are N:M sparse (N:M keeps N of every M); "
            f"{t['bytes_dense']:,} bytes dense, {t['bytes']:,} as stored",
            *self._decay_lines(),
            *self.notes,
        ]

    def to_dict(self) -> dict[str, Any]:
        """{"rows": [{attribute of `Row`: plain value}], "totals": {...}, "notes": [...]}."""
        return {
            "rows": [_plain(row) for row in self.rows],
            "totals": self.totals,
            "notes": list(self.notes),
        }

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows as a table, one line per weight."""
        names = [one.name for one in dataclasses.fields(Row)] + ["ratio"]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in self.rows:
                writer.writerow({key: _cell(value) for key, value in _plain(row).items()})

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        table = self.__rich__()
        columns = [
            (str(column.header), column.justify, [str(cell) for cell in column.cells])
            for column in table.columns
        ]
        head = "".join(
            f"<th style='text-align:{side}'>{html.escape(name)}</th>" for name, side, _ in columns
        )
        body = "".join(
            "<tr>"
            + "".join(
                f"<td style='text-align:{side}'>{html.escape(str(Text.from_markup(cells[i])))}</td>"
                for _, side, cells in columns
            )
            + "</tr>"
            for i in range(len(self.rows))
        )
        text = "<br>".join(html.escape(line) for line in self._summary())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{text}</p>"

    def _decay_lines(self) -> list[str]:
        """Where the SR-STE decay acts: one line per strength and place."""
        trained = [row for row in self.rows if row.state == "sparse"]
        counts = Counter((row.lambda_w, row.attached) for row in trained)
        return [
            f"SR-STE decay of pruned weights: lambda_w={lambda_w:g}, "
            f"{'once per optimizer step' if attached else 'inside backward'} (layers: {count})"
            for (lambda_w, attached), count in counts.items()
        ]


_TIMES = ("rows", "ms dense", "ms chosen", "ratio")


def _times(row: Row) -> list[str]:
    if row.ratio is None:
        return ["-"] * len(_TIMES)
    rows = ",".join(map(str, row.rows))
    return [rows, f"{row.ms_dense:.3f}", f"{row.ms_chosen:.3f}", f"{row.ratio:.2f}x"]


def _plain(row: Row) -> dict[str, Any]:
    """A row in values that JSON has."""
    fields = {one.name: getattr(row, one.name) for one in dataclasses.fields(row)}
    fields |= {"shape": list(row.shape), "rows": list(row.rows), "ratio": row.ratio}
    fields["pattern"] = None if row.pattern is None else row.pattern.text
    return fields


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, list) else value


def report(model: nn.Module) -> Report:
    """One row per linear and conv weight of any model: pattern, state, or the reason it is dense.

    Changes nothing and runs nothing.

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
        return Row(
            candidate.name,
            candidate.kind,
            candidate.shape,
            None,
            "dense",
            "",
            None,
            False,
            dense,
            dense,
            _compiled(candidate) or reason or candidate.obstacle or "not sparsified",
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
    return _numel(candidate.shape) * _itemsize(candidate)


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


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() if shape else 0
