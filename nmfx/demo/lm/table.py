"""What the lm task prints: one table, and in words what each number is and what came out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from ..meter import FLIPS_EVERY
from ..numbers import flips_of, numbers_of, sad_of, spread_of
from ..rows import Row, seeds_text, spread
from .model import make_model
from .study import Plan, Study
from .text import FINAL_WINDOWS, HELD_OUT_OF, load
from .training import STEP, Result


def print_study(study: Study, console: Console) -> None:
    """Prints the table, what its columns are, the differences, and the packed models."""
    console.print(make_table(study))
    for lines in (legend(study.plan), difference_lines(study), packed_lines(study)):
        console.print("\n".join(lines), end="\n\n", soft_wrap=True)


def title(plan: Plan) -> str:
    """The model and the training, in one line."""
    setup = plan.setup
    model = make_model(setup.width, setup.layers, setup.heads, setup.context, 0)
    count = sum(parameter.numel() for parameter in model.parameters())
    seeds = f"{plan.seeds} seeds" if plan.seeds > 1 else "1 seed"
    return (
        f"byte GPT {setup.layers} x {setup.width}, {count / 1e6:.2f} M parameters; "
        f"{setup.steps} steps of {setup.batch * setup.context} bytes; {seeds}"
    )


def make_table(study: Study) -> Table:
    """One row per method."""
    plan = study.plan
    table = Table(title=title(plan))
    table.add_column("\nmethod", no_wrap=True)
    for head in ("\nlambda_W", "held-out\nbits per byte", "\nflips", "\nSAD", "ms per\nstep",
                 "steps\nper s"):  # fmt: skip
        table.add_column(head, justify="right", no_wrap=True)
    for row in study.rows:
        last = not row.pattern or row.lambda_w == plan.lambdas[-1]
        table.add_row(*_cells(row), end_section=last)
    return table


def _cells(row: Row[Result]) -> list[str]:
    bits = spread([result.bits for result in row.results], ".3f")
    time, flips, sad = _time(row), flips_of(row), sad_of(row)
    speed = [f"{time:.1f}", f"{1e3 / time:.1f}"]
    if flips is None or sad is None:
        return [row.name, "-", bits, "-", "-", *speed]
    return [row.name, f"{row.lambda_w:g}", bits, f"{flips:.2e}", f"{sad:.3f}", *speed]


def _time(row: Row[Result]) -> float:
    return median(result.milliseconds for result in row.results)


def legend(plan: Plan) -> list[str]:
    """What the columns are."""
    setup = plan.setup
    trained, held = (f"{len(load(split)) / 1e6:.2f} MB" for split in ("train", "held out"))
    way = "torch.compile" if setup.compiled else "eager"
    decay = "at the optimizer step (nmfx.attach)" if setup.decay == STEP else "inside backward"
    return [
        f"bits   on {FINAL_WINDOWS} windows of {setup.context} bytes of held-out text; "
        f"mean +- standard deviation over {seeds_text(plan.shown)}.",
        "       Guessing is 8. The text is the source of Python's standard library; by hash, about",
        f"       one top-level module of {HELD_OUT_OF} is held out: {held}, {trained} to train on.",
        f"flips  share of mask entries changed by one step, mean over each {FLIPS_EVERY}th step",
        "SAD    share of mask entries that differ between the first and the last step",
        f"ms     median training step: {way}, one thread, up to {plan.workers} runs side by side",
        f"decay  lambda_W acts {decay};",
        "       AdamW then divides it, like all of the gradient, by the gradient's usual size",
    ]


def difference_lines(study: Study) -> list[str]:
    """SR-STE minus STE, and STE minus dense, seed by seed; below zero is better."""
    lines = ["Bits per byte, same seed against same seed (below 0: the first is better):"]
    for name, other, gaps in _gaps(study):
        lines.append(
            f"  {f'{name} minus {other}':32} {spread(gaps, '+.4f')}, "
            f"better on {sum(gap < 0 for gap in gaps)} of {len(gaps)} seeds"
        )
    return lines


def _gaps(study: Study) -> Iterator[tuple[str, str, list[float]]]:
    """(a method, another, bits of the first minus those of the second, one value per seed)."""
    plan = study.plan
    dense = study.row((None, 0.0))
    for pattern in plan.patterns:
        name, ste = f"{pattern} STE", study.row((pattern, 0.0))
        yield name, "dense", _minus(ste, dense)
        for value in plan.lambdas:
            yield f"{pattern} SR-STE {value:g}", name, _minus(study.row((pattern, value)), ste)


def _minus(first: Row[Result], second: Row[Result]) -> list[float]:
    return [a.bits - b.bits for a, b in zip(first.results, second.results, strict=True)]


def packed_lines(study: Study) -> list[str]:
    """The lowered models against the folded ones, the worst over methods and seeds."""
    lines = ["Sparse models folded (dense, exact zeros) and lowered (packed):"]
    for pattern in study.plan.patterns:
        results = [one for row in study.rows if row.pattern == pattern for one in row.results]
        packed = [result.packed for result in results if result.packed]
        worst = max(one.max_difference for one in packed)
        kept = max(result.density for result in results)
        lines.append(
            f"  {pattern:5} {100 * kept:.2f} % nonzeros; outputs differ by at most {worst:.1e}; "
            f"bytes {packed[0].folded_bytes:,} -> {packed[0].lowered_bytes:,}"
        )
    return lines


def content(study: Study) -> dict[str, Any]:
    """All numbers that `print_study` prints."""
    plan = study.plan
    return {
        "task": "lm",
        "setup": asdict(plan.setup),
        "seeds": list(plan.shown),
        "workers": plan.workers,
        "rows": [
            {
                **numbers_of(row),
                "bits_per_byte": spread_of([result.bits for result in row.results]),
                "ms_per_step": _time(row),
            }
            for row in study.rows
        ],
        "differences": [
            {
                "method": name,
                "minus": other,
                "better": sum(gap < 0 for gap in gaps),
                **spread_of(gaps),
            }
            for name, other, gaps in _gaps(study)
        ],
    }
