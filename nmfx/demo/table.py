"""What the demo prints: one table, and in words what each number is and what came out."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from .meter import FLIPS_EVERY
from .numbers import flips_of, numbers_of, sad_of, spread_of
from .rows import Row, seeds_text, spread
from .study import PATTERNS, Study
from .training import Result


def print_study(study: Study, console: Console) -> None:
    """Prints the table, the choice of lambda_W, SR-STE minus STE, and the packed models."""
    blocks = (legend(study), selection_lines(study), difference_lines(study), packed_lines(study))
    console.print(make_table(study))
    for lines in blocks:
        console.print("\n".join(lines), end="\n\n", soft_wrap=True)


def make_table(study: Study) -> Table:
    """One row per method."""
    plan = study.plan
    table = Table(title=f"digits, MLP 64-128-128-10, {plan.steps} steps, {plan.seeds} seeds")
    table.add_column("\nmethod", no_wrap=True)
    for head in ("\nlambda_W", "test\naccuracy %", "flips per\nweight, step", "SAD per\nweight",
                 "\ndensity"):  # fmt: skip
        table.add_column(head, justify="right", no_wrap=True)
    for row in study.rows:
        table.add_row(*_cells(row), end_section=row.name == "dense" or row.lambda_w > 0)
    return table


def _cells(row: Row[Result]) -> list[str]:
    accuracy = spread([result.final_accuracy for result in row.results])
    density = f"{100 * fmean(result.density for result in row.results):.2f} %"
    flips, sad = flips_of(row), sad_of(row)
    if flips is None or sad is None:
        return [row.name, "-", accuracy, "-", "-", density]
    return [row.name, f"{row.lambda_w:g}", accuracy, f"{flips:.2e}", f"{sad:.3f}", density]


def legend(study: Study) -> list[str]:
    """What the columns are."""
    return [
        "accuracy  on augmented test images, mean +- standard deviation over "
        + seeds_text(study.plan.shown),
        f"flips     share of mask entries changed by one step, mean over each {FLIPS_EVERY}th step",
        "SAD       share of mask entries that differ between the first and the last step",
        "          Fewer flips alone do not make a model better: compare the accuracies.",
    ]


def selection_lines(study: Study) -> list[str]:
    """How lambda_W was chosen, one line per pattern, with the accuracies it was chosen by."""
    seeds = seeds_text(study.plan.selection)
    lines = [f"lambda_W was chosen by accuracy on validation images, {seeds}, not shown above:"]
    for pattern in PATTERNS:
        tried = (
            f"{value:g} -> {study.validation[pattern, value]:.2f} %" for value in study.plan.grid
        )
        lines.append(f"  {pattern:5} {', '.join(tried)}")
    return lines


def difference_lines(study: Study) -> list[str]:
    """SR-STE minus STE, seed by seed, one line per pattern."""
    lines = ["SR-STE minus STE, points of test accuracy, same seed against same seed:"]
    for pattern, gains in _gains(study):
        wins = sum(gain > 0 for gain in gains)
        lines.append(
            f"  {pattern:5} {spread(gains, '+.2f')}, ahead on {wins} of {len(gains)} seeds"
        )
    return lines


def _gains(study: Study) -> Iterator[tuple[str, list[float]]]:
    """SR-STE minus STE of each pattern, one value per seed."""
    for pattern in PATTERNS:
        ste, sr_ste = (row.results for row in study.rows if row.pattern == pattern)
        pairs = zip(ste, sr_ste, strict=True)
        yield pattern, [b.final_accuracy - a.final_accuracy for a, b in pairs]


def packed_lines(study: Study) -> list[str]:
    """The lowered SR-STE models against the folded ones, the worst over seeds."""
    lines = ["SR-STE models folded (dense, exact zeros) and lowered (packed):"]
    for row in study.rows:
        packed = [result.packed for result in row.results if result.packed]
        if packed and row.lambda_w:
            worst = max(one.max_difference for one in packed)
            folded, lowered = packed[0].folded_bytes, packed[0].lowered_bytes
            lines.append(
                f"  {row.pattern:5} outputs differ by at most {worst:.1e}; "
                f"bytes of the state dict {folded:,} -> {lowered:,}"
            )
    return lines


def content(study: Study) -> dict[str, Any]:
    """All numbers that `print_study` prints."""
    plan = study.plan
    return {
        "task": "digits",
        "steps": plan.steps,
        "seeds": list(plan.shown),
        "rows": [
            {
                **numbers_of(row),
                "accuracy": spread_of([result.final_accuracy for result in row.results]),
            }
            for row in study.rows
        ],
        "selection": {
            "seeds": list(plan.selection),
            "tried": [
                {"pattern": pattern, "lambda_w": value, "accuracy": accuracy}
                for (pattern, value), accuracy in study.validation.items()
            ],
        },
        "sr_ste_minus_ste": [
            {"pattern": pattern, "ahead": sum(gain > 0 for gain in gains), **spread_of(gains)}
            for pattern, gains in _gains(study)
        ],
    }
