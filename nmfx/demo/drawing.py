"""The picture of a study: quality and mask flips over training, every method in both panels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .meter import FLIPS_EVERY
from .rows import Row

POINTS = 25  # points of a flips line, each a mean over neighbouring measurements

Curve = Sequence[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Line:
    """One method: how it looks, and its curves, one per seed; no flips if dense."""

    label: str
    colour: str
    style: str
    quality: Sequence[Curve]
    flips: Sequence[Curve]


def label_of(row: Row[Any]) -> str:
    """Such as "2:4 SR-STE (lambda_W = 0.001)", in matplotlib's notation."""
    return f"{row.name} ($\\lambda_W$ = {row.lambda_w:g})" if row.lambda_w else row.name


def check_path(path: Path) -> str | None:
    """Why a picture cannot be written to `path`, or None if it can."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        return f"the suffix is not one of {', '.join(sorted(formats))}"
    if not os.access(path.parent, os.W_OK):
        return f"the folder {path.parent} does not exist or cannot be written to"
    return f"{path} is a folder" if path.is_dir() else None


def two_panels(lines: Sequence[Line], title: str, quality_title: str, quality_unit: str) -> Figure:
    """Quality, and flips on a log scale; means over seeds, with a band of one deviation."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    quality, flips = figure.subplots(1, 2)
    for line in lines:
        _plot(quality, line, line.quality)
        if line.flips:
            _plot(flips, line, [_thin(curve) for curve in line.flips])
    figure.suptitle(title)
    quality.set(title=quality_title, xlabel="step", ylabel=quality_unit)
    flips.set(
        title=f"Mask flips (each {FLIPS_EVERY}th step, neighbours averaged)",
        xlabel="step",
        ylabel="share of weights flipped by one step",
    )
    if any(share > 0 for line in lines for curve in line.flips for _, share in curve):
        flips.set_yscale("log", nonpositive="mask")  # at the very end no mask may flip at all
    for axes in (quality, flips):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = quality.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _plot(axes: Axes, line: Line, curves: Sequence[Curve]) -> None:
    data = torch.tensor(curves, dtype=torch.float64)  # (seeds, points, 2)
    steps, values = data[0, :, 0], data[:, :, 1]
    mean = values.mean(0)
    axes.plot(steps, mean, line.style, color=line.colour, label=line.label)
    if len(values) > 1:
        low, high = mean - values.std(0), mean + values.std(0)
        # A log axis shows nothing at or below zero; a polygon that goes there would be torn.
        axes.fill_between(
            steps, low, high, where=low > 0, color=line.colour, alpha=0.15, linewidth=0
        )


def _thin(curve: Curve) -> list[tuple[int, float]]:
    """Means over `POINTS` runs of neighbouring points: single steps flip few weights."""
    size = math.ceil(len(curve) / POINTS)
    return [_centre(torch.tensor(curve[i : i + size])) for i in range(0, len(curve), size)]


def _centre(points: Tensor) -> tuple[int, float]:
    step, value = points.double().mean(0).tolist()
    return int(step), value
