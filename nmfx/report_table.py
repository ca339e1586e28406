"""What a report is: one row per weight, as a table, in HTML, CSV or plain values."""

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

from .pattern import Pattern


@dataclass(frozen=True)
class Row:
    """One weight.

    Attributes:
        fqn: fully qualified name of the parameter.
        kind: "linear", "addmm", "conv", "conv_transpose", "recurrent", "bilinear", "experts", or
            the class of what nmfx leaves alone.
        shape: of the dense weight.
        pattern: the pattern in force, that which the zeros of a folded layer satisfy, or None for a
            dense layer.
        state: "sparse" (masked at every forward), "frozen" (fixed mask), "packed",
            "semi_structured" (2:4 on a GPU's sparse tensor cores), "prepacked" (dense, with a copy
            in oneDNN's layout), two forms like "packed+dense" (the first for few rows), "folded"
            (a dense weight without a mask whose zeros are N:M) or "dense"; from `nmfx.preview`,
            "would pack", "would be semi_structured", "would prepack" or "dense".
        capture: "leaf", "scoped" or "graph" for rewritten layers, else "".
        lambda_w: strength of the SR-STE decay; None for a dense, folded or lowered layer.
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
            "weights": sum(numel(row.shape) for row in self.rows),
            "weights_sparse": sum(numel(row.shape) for row in sparse),
            "weights_kept": sum(
                numel(row.shape) * row.pattern.n // row.pattern.m for row in sparse if row.pattern
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


def numel(shape: tuple[int, ...]) -> int:
    """Elements of a weight; 0 if there is none, with the shape ()."""
    return torch.Size(shape).numel() if shape else 0
