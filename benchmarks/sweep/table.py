"""The result file: a summary, one row per model, and what did not run dense here."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from harness import RESULTS, cpu_name, versions

from sweep import workspace
from sweep.steps import SILENT

Row = dict[str, Any]
STEPS = (
    "sparsify",
    "report",
    "verify",
    "eval",
    "train",
    "no_grad",
    "steps",
    "fold",
    "lower",
    "save",
    "compile",
    "tune",
)
WORDS = {
    "sparsify": "state_dict keys, parameter identity and training flags are kept",
    "report": "every linear and conv weight is listed, dense ones with a reason; masks are right",
    "verify": "no weight is read around its mask",
    "eval": "outputs and gradients equal the masked reference in eval mode",
    "train": "the same in train mode, with the same random numbers",
    "no_grad": "outputs equal the masked reference without gradients (torch's fused paths)",
    "steps": "three optimizer steps, all values finite",
    "fold": "keys, classes and outputs are those of the dense class with masked weights",
    "lower": "packed without timing (tune=False), outputs equal the folded ones",
    "save": "trained and lowered model saved and loaded into a fresh dense one, outputs equal",
    "compile": "torch.compile (aot_eager, graph breaks allowed), outputs and gradients equal eager",
    "tune": "lower with timings, for one model in ten",
}


def outcome(row: Row) -> str:
    """Of one model: "not dense", "pass", "nmerror", "silent", "fail" or "unfinished"."""
    if "dense" in row or "sparsify" not in row:
        return "not dense"
    texts = [str(row[step]) for step in STEPS if step in row]
    if any(SILENT in text for text in texts):
        return "silent"
    if any(text.startswith("fail") for text in texts) or "main_error" in row:
        return "fail"
    if any(text.startswith("nmerror") for text in texts):
        return "nmerror"
    return "pass"


def passed(row: Row) -> str:
    """Steps that hold, of those that apply."""
    ran = [str(row[step]) for step in STEPS if step in row and not row[step].startswith("n/a")]
    good = sum(text == "pass" or text.startswith("explained") for text in ran)
    return f"{good}/{len(ran)}"


def reasons(row: Row) -> str:
    """Everything but "pass", with the step it belongs to."""
    found = [
        f"{step}: {row[step]}"
        for step in STEPS
        if step in row and row[step] != "pass" and not row[step].startswith("n/a")
    ]
    if row.get("main_error"):
        found.append(str(row["main_error"]))
    if row.get("unlisted"):
        found.append(f"not listed by report: {row['unlisted'][0]}")
    return "; ".join(found)


def summary(rows: Iterable[Row]) -> str:
    """Counts by library and in all."""
    rows = list(rows)
    totals = workspace.totals()
    libraries = sorted({row["key"].partition("/")[0] for row in rows})
    head = ["", "tried", "run dense", "pass every step", "NMError", "other failure", "silent"]
    lines = [head, ["---"] * len(head)]
    for name in [*libraries, "all"]:
        chosen = [r for r in rows if name == "all" or r["key"].startswith(f"{name}/")]
        count = Counter(map(outcome, chosen))
        dense = len(chosen) - count["not dense"]
        share = f" ({count['pass'] / dense:.1%})" if dense else ""
        lines.append(
            [
                name,
                f"{len(chosen)} of {totals[name]}" if name in totals else str(len(chosen)),
                str(dense),
                f"{count['pass']}{share}",
                str(count["nmerror"]),
                str(count["fail"]),
                str(count["silent"]),
            ]
        )
    return _table(lines)


def by_kind(rows: Iterable[Row], start: str) -> str:
    """How often each kind of failure comes, names and numbers left out."""
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    for row in rows:
        for step in STEPS:
            text = str(row.get(step, ""))
            if text.startswith(start):
                kind = f"{step}: {re.sub(r'[0-9]+', 'N', _general(text))[:160]}"
                kinds[kind] += 1
                example.setdefault(kind, row["key"])
    return "\n".join(f"- {n} x {kind} (first: {example[kind]})" for kind, n in kinds.most_common())


def _general(text: str) -> str:
    return re.sub(r"\b[\w]+(\.[\w]+)+\b", "NAME", text)


def _table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _model_row(row: Row) -> list[str]:
    library, _, name = row["key"].partition("/")
    return [
        library,
        name,
        f"{row.get('parameters', 0):,}",
        f"{row['share']:.0%}" if "share" in row else "",
        str(row.get("reached", "")),
        passed(row),
        reasons(row)[:400],
    ]


def render(rows: dict[str, Row], operators: str) -> str:
    """The whole text."""
    every = [rows[key] for key in sorted(rows)]
    ran = [row for row in every if outcome(row) != "not dense"]
    broken = [row for row in every if outcome(row) == "not dense"]
    order = {"silent": 0, "fail": 1, "nmerror": 2, "pass": 3}
    ran.sort(key=lambda row: (order[outcome(row)], row["key"]))
    head = ["library", "model", "parameters", "sparse", "reached", "steps", "reasons"]
    table = [head, ["---"] * len(head)]
    counted = Counter(step for row in ran for step in STEPS if step in row)
    exact = sum(row.get("exact") is True for row in ran)
    used = {**versions(), **_versions("torchvision", "timm")}
    return "\n".join(
        [
            "# Coverage: what becomes of every model that runs here",
            "",
            f"- {datetime.date.today():%Y-%m-%d}, {cpu_name()}",
            "- " + ", ".join(f"{name} {version}" for name, version in used.items()),
            f"- {operators}",
            "- `python benchmarks/coverage.py --work FOLDER`",
            "",
            _HOW,
            summary(every),
            "",
            f"Outputs and gradients in eval mode are bit for bit those of the reference in {exact} "
            f"of {len(ran)} models, within rounding in the others that pass.",
            "",
            "## Steps",
            "",
            *(f"- {step} ({counted[step]} models): {WORDS[step]}" for step in STEPS),
            "",
            "## Failures that are no NMError, by kind",
            "",
            by_kind(ran, "fail") or "None.",
            "",
            "## NMErrors, by kind",
            "",
            by_kind(ran, "nmerror") or "None.",
            "",
            "## What the audit explains, by kind",
            "",
            by_kind(ran, "explained") or "Nothing.",
            "",
            "## Models",
            "",
            _table([*table, *(_model_row(row) for row in ran)]),
            "",
            "## Not run dense here",
            "",
            "Outside of every share above.",
            "",
            *(f"- {row['key']}: {_cell(_why(row))[:220]}" for row in broken),
            "",
        ]
    )


def _why(row: Row) -> str:
    text = str(row.get("dense") or row.get("main_killed") or row.get("main_error") or "unfinished")
    return text.removeprefix("does not run dense here: ").removeprefix("fail: ")


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


_HOW = """Random weights (those that would hide a mistake are moved: constants get noise, small ones
are scaled up), small sizes, nothing downloaded. From transformers every model type: the first class
of it that runs with a config shrunk by one factor and with inputs made from its signature. From
torchvision every model; from timm the smallest of each class and variety (the words of a name
without sizes). "Sparse" is the share of all parameters that 2:4 applies to, "reached" how many of
the sparse weights get a gradient from these inputs (a text alone leaves an image tower out). The
reference is the dense model with weights masked by hand in plain torch, where every layer reads its
weight once; where `nmfx.verify` names a weight that is read elsewhere too, everything must be equal
once those are kept dense. A wrong result that verify does not name counts as silent.
"""


def write(rows: dict[str, Row], operators: str, path: Path | None = None) -> None:
    """Writes a file, results/coverage_<yyyymm>.md by default, and prints the summary.

    Beside it goes a .jsonl with all that is known of each model.
    """
    path = path or RESULTS / f"coverage_{datetime.date.today():%Y%m}.md"
    path.write_text(render(rows, operators), encoding="utf-8")
    lines = [json.dumps(rows[key]) + "\n" for key in sorted(rows)]
    path.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
    print(summary(rows.values()))
    print(f"written: {path.name}")
