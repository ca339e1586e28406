"""Cells of a benchmark as JSON lines: a long run can be split, resumed and rendered later."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import header, versions, write_result

Record = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--min-time", type=float, default=0.05, help="seconds per candidate, round")
    parser.add_argument("--quick", action="store_true", help="tiny: does it work? Not a timing")
    parser.add_argument("--jsonl", type=Path, help="append each cell here; cells in it are skipped")
    parser.add_argument("--from-jsonl", type=Path, nargs="+", help="measure nothing, render these")


def read(paths: list[Path]) -> list[Record]:
    """All records; of the same cell measured twice the last counts."""
    found = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found[json.dumps(record["cell"], sort_keys=True)] = record
    return list(found.values())


def quick_mark(args: argparse.Namespace) -> Record:
    """Part of the key of a quick cell, so that it never passes for a measurement."""
    return {"quick": True} if args.quick else {}


class Writer:
    """Collects the cells of one run, and appends each to a file at once if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records = read([path]) if path is not None and path.exists() else []

    def has(self, cell: Record) -> bool:
        return any(record["cell"] == cell for record in self.records)

    def add(self, cell: Record, **fields: Any) -> None:
        from harness import hardware  # the machine that measured, not the one that renders

        record = {"cell": cell, **fields, "hardware": hardware(), "versions": versions()}
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reasons(records: list[Record]) -> str:
    """Why a candidate is n/a, and what the compiled code calls: once each."""
    lines: dict[str, int] = {}
    for record in records:
        for name, text in [*record.get("na", {}).items(), *record.get("notes", {}).items()]:
            for_cell = f"- {record['cell'].get('dtype', '')} {name}: {text}"
            lines[for_cell] = lines.get(for_cell, 0) + 1
    return "\n".join(f"{line} ({count} cells)" for line, count in sorted(lines.items()))


def write(what: str, title: str, body: str, records: list[Record], how: str) -> None:
    """Prints the tables, and writes the result file unless the run was a quick one."""
    print(body)
    machines = {json.dumps([r["hardware"], r["versions"]]) for r in records}
    if len(machines) > 1:
        raise SystemExit("these records are from different machines or versions: render each alone")
    if any(r["cell"].get("quick") for r in records):
        print("quick run: no result file")
        return
    first = records[0]
    method = how.rpartition("\n\n")[2]  # the last paragraph of the script's own text
    head = header(title, first["hardware"], first["versions"])
    text = "\n".join([head, method, body, ""])
    print(f"written: {write_result(what, text, first['hardware']).name}")
