"""What the digits task draws: accuracy and mask flips over training."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .drawing import Line, label_of, two_panels
from .rows import Row
from .study import Study
from .training import Result

# Colour tells the pattern, the line tells the method; the pair is readable without colour vision.
COLOURS = {None: "#444444", "2:4": "#0072b2", "1:16": "#d55e00"}


def draw(study: Study, path: Path) -> None:
    """Writes the picture to `path`; the suffix chooses the format (png, svg, pdf)."""
    make_figure(study).savefig(path, dpi=150)


def make_figure(study: Study) -> Figure:
    """Two panels: accuracy, and flips on a log scale; one line per method."""
    seeds = study.plan.seeds
    return two_panels(
        [_line(row) for row in study.rows],
        f"digits, MLP 64-128-128-10: mean of {seeds} seeds, band: ± 1 standard deviation",
        "Test accuracy",
        "accuracy on augmented images (%)",
    )


def _line(row: Row[Result]) -> Line:
    style = "--" if row.pattern and not row.lambda_w else "-"
    accuracy = [result.accuracy for result in row.results]
    flips = [result.flips for result in row.results] if row.pattern else []
    return Line(label_of(row), COLOURS[row.pattern], style, accuracy, flips)
