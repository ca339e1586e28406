"""What the lm task draws: bits per byte and mask flips over training."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ..drawing import Line, label_of, two_panels
from ..rows import Row
from .study import Plan, Study
from .table import title
from .training import Result

# Colour tells the pattern, the line tells lambda_W (Okabe and Ito's colours).
DENSE = "#444444"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
STE = "--"
SR_STE = ("-", "-.", ":")


def draw(study: Study, path: Path) -> None:
    """Writes the picture to `path`; the suffix chooses the format (png, svg, pdf)."""
    make_figure(study).savefig(path, dpi=150)


def make_figure(study: Study) -> Figure:
    """Two panels: bits per byte, and flips on a log scale; one line per method."""
    return two_panels(
        [_line(row, study.plan) for row in study.rows],
        f"{title(study.plan)}; band: ± 1 standard deviation",
        "Held-out text",
        "bits per byte",
    )


def _line(row: Row[Result], plan: Plan) -> Line:
    colour, style = DENSE, "-"
    if row.pattern:
        colour = COLOURS[plan.patterns.index(row.pattern) % len(COLOURS)]
        place = plan.lambdas.index(row.lambda_w) if row.lambda_w else None
        style = STE if place is None else SR_STE[place % len(SR_STE)]
    curves = [result.curve for result in row.results]
    flips = [result.flips for result in row.results] if row.pattern else []
    return Line(label_of(row), colour, style, curves, flips)
