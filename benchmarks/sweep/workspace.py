"""The folder of a sweep: rows that are done, recipes, what took long to find out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PLACE = "NMFX_SWEEP_WORK"


def folder() -> Path:
    """The work folder; `choose_folder` sets it."""
    return Path(os.environ.get(_PLACE, "sweep_work"))


def choose_folder(path: Path) -> None:
    """Sets the work folder for this process and its children."""
    path.mkdir(parents=True, exist_ok=True)
    os.environ[_PLACE] = str(path.resolve())


def cached(name: str, make: Callable[[], str]) -> str:
    """The text of a file in the work folder; made and written at the first call."""
    path = folder() / name
    if not path.exists():
        text = make()
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def note_total(library: str, number: int) -> None:
    """Keeps how many models a library has, for the table of a sweep that is not through."""
    path = folder() / "totals.json"
    path.write_text(json.dumps({**totals(), library: number}), encoding="utf-8")


def totals() -> dict[str, int]:
    """Library -> how many models of it a whole sweep tries."""
    path = folder() / "totals.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def rows(path: Path) -> dict[str, dict[str, Any]]:
    """All rows by key.

    Of a stage that was run twice the later row counts: its steps replace the earlier ones.
    """
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            old = found.get(row["key"], {})
            found[row["key"]] = row if row.get("main_done") else {**old, **row}
    return found


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row at once, so that an interrupted sweep goes on from there."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
