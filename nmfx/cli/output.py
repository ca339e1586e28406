"""What commands print: a table when a person looks, plain text or JSON for programs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option that all commands share."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def show_json(content: Any) -> None:
    """Prints one JSON value."""
    sys.stdout.write(json.dumps(_finite(content), indent=1) + "\n")


def _finite(content: Any) -> Any:
    """NaN and infinities as null: JSON has no others."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def show_table(left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; into a pipe or file as plain text that nothing cuts.

    Args:
        left, right: titles of the columns, those of words and then those of numbers.
        rows: cells.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in left:
        table.add_column(title, overflow="fold")
    for title in right:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    _console().print(table)


def say(text: str = "") -> None:
    """Prints a line."""
    _console().print(escape(text), soft_wrap=True)


def _console() -> Console:
    terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if terminal else 10_000, soft_wrap=not terminal)


def size(count: int) -> str:
    """Bytes for people: "1.2 MB"."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError
