"""What the demo draws: accuracy and mask flips over training, every method in both panels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .study import Row, Study
from .training import FLIPS_EVERY

# Colour tells the pattern, the line tells the method; the pair is readable without colour vision.
COLOURS = {None: "#444444", "2:4": "#0072b2", "1:16": "#d55e00"}
POINTS = 25  # points of a flips line, each a mean over neighbouring measurements


def check_path(path: Path) -> str | None:
    """Why a picture cannot be written to `path`, or None if it can."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        return f"the suffix is not one of {', '.join(sorted(formats))}"
    if not os.access(path.parent, os.W_OK):
        return f"the folder {path.parent} does not exist or cannot be written to"
    return f"{path} is a folder" if path.is_dir() else None


def draw(study: Study, path: Path) -> None:
    """Writes the picture to `path`; the suffix chooses the format (png, svg, pdf)."""
    make_figure(study).savefig(path, dpi=150)


def make_figure(study: Study) -> Figure:
    """Two panels: accuracy, and flips on a log scale; one line per method."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    accuracy, flips = figure.subplots(1, 2)
    for row in study.rows:
        _line(accuracy, row, [result.accuracy for result in row.results])
        if row.pattern:
            _line(flips, row, [_thin(result.flips) for result in row.results])
    plan = study.plan
    figure.suptitle(
        f"digits, MLP 64-128-128-10: mean of {plan.seeds} seeds, band: ± 1 standard deviation"
    )
    accuracy.set(title="Test accuracy", xlabel="step", ylabel="accuracy on augmented images (%)")
    flips.set(
        title=f"Mask flips (each {FLIPS_EVERY}th step, neighbours averaged)",
        xlabel="step",
        ylabel="share of weights flipped by one step",
    )
    flips.set_yscale("log", nonpositive="mask")  # at the very end no mask may flip at all
    for axes in (accuracy, flips):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _line(axes: Axes, row: Row, curves: Sequence[Sequence[tuple[int, float]]]) -> None:
    data = torch.tensor(curves, dtype=torch.float64)  # (seeds, points, 2)
    steps, values = data[0, :, 0], data[:, :, 1]
    style = "--" if row.pattern and not row.lambda_w else "-"
    label = f"{row.name} ($\\lambda_W$ = {row.lambda_w:g})" if row.lambda_w else row.name
    mean, colour = values.mean(0), COLOURS[row.pattern]
    axes.plot(steps, mean, style, color=colour, label=label)
    if len(values) > 1:
        low, high = mean - values.std(0), mean + values.std(0)
        # A log axis shows nothing at or below zero; a polygon that goes there would be torn.
        axes.fill_between(steps, low, high, where=low > 0, color=colour, alpha=0.15, linewidth=0)


def _thin(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over `POINTS` runs of neighbouring points: single steps flip few weights."""
    size = math.ceil(len(curve) / POINTS)
    return [_centre(torch.tensor(curve[i : i + size])) for i in range(0, len(curve), size)]


def _centre(points: Tensor) -> tuple[int, float]:
    step, value = points.double().mean(0).tolist()
    return int(step), value
