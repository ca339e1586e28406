"""Pictures: masks, how they calm down, and what lowering bought. Needs matplotlib.

    from nmfx import plot
    plot.masks(model.fc1.weight, "2:4").savefig("masks.png")
    plot.sad(monitor.history).savefig("sad.png")
    plot.speedup(nmfx.report(fast)).savefig("speedup.png")

Each returns a `matplotlib.figure.Figure` that no global state knows: notebooks show it, scripts
save it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import NMError
from .mask import nm_mask
from .pattern import Pattern, PatternLike
from .report_table import Report, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 64  # rows and columns of a weight that one can still tell apart
_KEPT, _GAIN, _LOSS, _GREY = "#0072b2", "#009e73", "#d55e00", "#888888"


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NMError("nmfx.plot needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def masks(weight: Tensor, pattern: PatternLike | None = None, *, dim: int = 1) -> Figure:
    """The upper left corner of a weight: what is kept, group by group, and how large it is.

    Args:
        weight: float of shape (out, in) or (out, in / groups, *kernel), of which the first kernel
            position is drawn.
        pattern: None for a weight that is masked already: what is not zero is kept.
        dim: the grouped dimension, 0 or 1.

    Returns:
        Two panels: the kept weights in blue with lines between groups, and all magnitudes.

    Raises:
        NMError: a tensor without two dimensions, or a pattern that does not fit.
    """
    if not isinstance(weight, Tensor) or weight.ndim < 2 or dim not in (0, 1):
        raise NMError("plot.masks takes a weight with at least two dimensions, and dim 0 or 1")
    if not weight.numel() or weight.is_meta:
        raise NMError("plot.masks takes a weight that has elements")
    weight = weight.detach()
    kept = weight != 0 if pattern is None else nm_mask(weight, pattern, dim)
    kept, size = _corner(kept), _corner(weight).abs().double()
    figure = _figure(10, 5)
    left, right = figure.subplots(1, 2)
    from matplotlib.colors import ListedColormap

    left.imshow(kept.numpy(), cmap=ListedColormap(["white", _KEPT]), vmin=0, vmax=1)
    left.set_title(_title(kept, pattern))
    image = right.imshow(size.numpy(), cmap="viridis")
    right.set_title("magnitude, pruned weights included")
    figure.colorbar(image, ax=right, shrink=0.8)
    for axes in (left, right):
        axes.set_xlabel("dimension 1 (inputs)")
        axes.set_ylabel("dimension 0 (outputs)")
    if pattern is not None:
        m = Pattern.parse(pattern).m
        line = left.axvline if dim == 1 else left.axhline
        for edge in range(m, kept.shape[dim], m):
            line(edge - 0.5, color=_LOSS, linewidth=0.5, alpha=0.6)
    shape = "x".join(map(str, weight.shape))
    figure.suptitle(f"weight {shape}, its first {kept.shape[0]} x {kept.shape[1]}")
    return figure


def _corner(tensor: Tensor) -> Tensor:
    """The first rows and columns, of a convolution at its first kernel position."""
    return (
        tensor.flatten(2)[..., 0][:_MOST, :_MOST].cpu()
        if tensor.ndim > 2
        else (tensor[:_MOST, :_MOST].cpu())
    )


def _title(kept: Tensor, pattern: PatternLike | None) -> str:
    share = f"{float(kept.double().mean()):.1%} kept"
    return share if pattern is None else f"{Pattern.parse(pattern)}: {share}"


def sad(history: Iterable[Mapping[str, float]]) -> Figure:
    """How the masks move: flips per step, and their distance from where they began.

    Args:
        history: of a `nmfx.Monitor`.

    Returns:
        Two panels over steps; a thin line for each layer, a thick one for all together.

    Raises:
        NMError: no measurement, or something else than a monitor's.
    """
    points = list(history)
    if not points or any("nmfx/step" not in point for point in points):
        raise NMError("plot.sad takes the history of a nmfx.Monitor with at least one measurement")
    figure = _figure(10, 4)
    panels = (
        ("nmfx/flips_per_step", "mask flips per weight and step", "log"),
        ("nmfx/sad_since_start", "SAD since the start, per weight", "linear"),
    )
    for axes, (name, title, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        layers = dict.fromkeys(k for point in points for k in point if k.startswith(f"{name}/"))
        for i, key in enumerate(layers):
            _curve(
                axes,
                points,
                key,
                color=_GREY,
                linewidth=0.7,
                alpha=0.6,
                label="one layer" if i == 0 else None,
            )
        _curve(
            axes,
            points,
            name,
            color=_KEPT,
            linewidth=2,
            label="all layers",
            marker="o" if len(points) == 1 else None,
        )
        axes.set_title(title)
        axes.set_xlabel("step")
        positive = any(point.get(name, 0) > 0 for point in points)
        axes.set_yscale(scale if positive else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _curve(axes: Any, points: list[Mapping[str, float]], key: str, **style: Any) -> None:
    found = [(point["nmfx/step"], point[key]) for point in points if key in point]
    axes.plot(*zip(*found, strict=True), **style)


def speedup(report: Report) -> Figure:
    """How many times as fast as dense each layer of a lowered or previewed model is.

    Args:
        report: `nmfx.report` of a model that was lowered with `tune=True`, or `nmfx.preview`'s.

    Returns:
        One bar per layer that was timed; green where it is faster than dense.

    Raises:
        NMError: no layer of it was timed.
    """
    timed = [row for row in report if row.ratio is not None]
    if not timed:
        raise NMError("no layer of this report was timed; plot.speedup takes that of nmfx.lower")
    figure = _figure(9, 1.2 + 0.28 * len(timed))
    axes = figure.subplots()
    ratios = [row.ratio or 0.0 for row in timed]
    colours = [_GAIN if r > 1.005 else _LOSS if r < 0.995 else _GREY for r in ratios]
    places = range(len(timed))
    axes.barh(places, ratios, color=colours)
    axes.axvline(1.0, color="black", linewidth=1)
    for place, row, ratio in zip(places, timed, ratios, strict=True):
        axes.annotate(f" {ratio:.2f}x {row.state}", (ratio, place), va="center", fontsize=8)
    axes.set_yticks(places, [_name(row) for row in timed], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(ratios))
    axes.set_xlabel("times as fast as dense, over the measured rows")
    before = sum(row.ms_dense or 0.0 for row in timed)
    after = sum(row.ms_chosen or 0.0 for row in timed)
    axes.set_title(
        f"timed layers together: {before:.2f} ms dense, {after:.2f} ms as chosen "
        f"({before / after:.2f}x)"
        if after
        else "timed layers"
    )
    return figure


def _name(row: Row) -> str:
    pattern = "" if row.pattern is None else f"  {row.pattern.text}"
    return f"{row.fqn}  {'x'.join(map(str, row.shape))}{pattern}"
