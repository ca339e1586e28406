"""`python -m nmfx bench`: what N:M gains on this machine, at common layer shapes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NMError
from ..pattern import Pattern
from ..preview import preview
from ..tuning import cache
from ..tuning.hardware import cache_bytes, machine
from ..tuning.progress import progress
from . import output

# (out, in): of Llama-2-7B, of BERT-base, and a square one.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (3072, 768), (1024, 1024))
ROWS = (1, 8, 128)
PATTERNS = ("2:4", "1:4", "1:16")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Colour-blind safe; one per pattern.
_COLOURS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9")


def add_command(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command and `run`."""
    parser.add_argument("--pattern", action="append", help=f"default: {', '.join(PATTERNS)}")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--dtype", choices=list(_DTYPES), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="only the two small shapes")
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument(
        "--out", type=Path, help="picture (default: nmfx_bench.png, and none with --json)"
    )
    picture.add_argument("--no-plot", action="store_true", help="no picture: only the table")
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Times every shape with every pattern and number of rows, prints a table, draws it.

    Raises:
        NMError: an option that does not hold.
    """
    patterns = [Pattern.parse(text) for text in options.pattern or PATTERNS]
    if any(rows < 1 for rows in options.rows):
        raise NMError(f"--rows {min(options.rows)}: at least 1")
    default = None if options.json or options.no_plot else Path("nmfx_bench.png")
    out = options.out or default
    _check(out, options.device)  # now, not after minutes
    shapes = SHAPES[-2:] if options.quick else SHAPES
    work = [(s, p, r) for s in shapes for p in patterns for r in options.rows]
    device = torch.device(options.device)
    if not options.json:
        output.say(f"linear layers in {options.dtype} on {machine(device)}")
        output.say("each alone, its weight from memory; run it on an idle machine")
        output.say("dense is torch in eager mode; dense prepacked by oneDNN is a candidate too")
        output.say()
    results = list(_measured(work, options))
    if options.json:
        output.show_json({"machine": machine(device), "dtype": options.dtype, "layers": results})
    else:
        output.show_table(
            ("out x in", "pattern", "fastest"),
            ("rows", "dense ms", "fastest ms", "ratio"),
            (
                (
                    f"{one['out']} x {one['in']}",
                    one["pattern"],
                    _FORMS.get(one["state"], one["state"]),
                    one["rows"],
                    f"{one['ms_dense']:.3f}" if one["ms_dense"] else "-",
                    f"{one['ms']:.3f}" if one["ms"] else "-",
                    f"{one['ratio']:.2f}x" if one["ratio"] else "-",
                )
                for one in results
            ),
        )
        output.say()
    if out is not None:
        _draw(results, options, machine(device), out)
        if not options.json:
            output.say(f"picture: {out.resolve()} (--no-plot: none)")


# The states of `nmfx.preview`, where nothing is a promise.
_FORMS = {
    "would pack": "packed",
    "would prepack": "prepacked",
    "would be semi_structured": "semi_structured",
}


def _check(out: Path | None, device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise NMError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if out is None:
        return
    if find_spec("matplotlib") is None:
        raise NMError("the picture needs matplotlib: pip install matplotlib; or --no-plot")
    from ..demo.drawing import check_path

    problem = check_path(out)
    if problem:
        raise NMError(f"--out {out}: {problem}")


def _measured(
    work: list[tuple[tuple[int, int], Pattern, int]], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The results, one by one; where no bar is seen, a line per shape says that it runs."""
    told = options.json or (sys.stderr is not None and sys.stderr.isatty())
    shape = None
    for done, one in enumerate(progress(work, "measuring", "layer")):
        if not told and one[0] != shape:
            shape = one[0]
            output.say(f"measuring {shape[0]} x {shape[1]} ({done} of {len(work)} done)")
        yield _time(*one, options)
    if not told:
        output.say()


def _time(
    shape: tuple[int, int], pattern: Pattern, rows: int, options: argparse.Namespace
) -> dict[str, Any]:
    dtype = _DTYPES[options.dtype]
    device = torch.device(options.device)
    x = torch.randn(rows, shape[1], device=device, dtype=dtype)
    with cache.unused():
        row = preview(_Many(shape, device, dtype), {"layers.0": pattern}, (x,)).rows[0]
    return {
        "out": shape[0],
        "in": shape[1],
        "pattern": pattern.text,
        "rows": rows,
        "state": row.state,
        "ms_dense": row.ms_dense,
        "ms": row.ms_chosen,
        "ratio": row.ratio,
        "reason": row.reason,
    }


class _Many(nn.Module):
    """So many layers that none finds its weight in the cache, as in a large model; one is run."""

    def __init__(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        size = shape[0] * shape[1] * dtype.itemsize
        self.layers = nn.ModuleList(
            nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype)
            for _ in range(cache_bytes(device) // size + 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def _draw(
    results: list[dict[str, Any]], options: argparse.Namespace, where: str, out: Path
) -> None:
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((one["out"], one["in"]) for one in results))
    patterns = list(dict.fromkeys(one["pattern"] for one in results))
    figure = Figure(figsize=(3.2 * len(shapes) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        for number, pattern in enumerate(patterns):
            points = [
                (one["rows"], one["ratio"])
                for one in results
                if (one["out"], one["in"]) == shape and one["pattern"] == pattern and one["ratio"]
            ]
            if points:
                colour = _COLOURS[number % len(_COLOURS)]
                axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=pattern)
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(options.rows, [str(rows) for rows in options.rows])
        axes.minorticks_off()
        axes.set_title(f"{shape[0]} x {shape[1]}")
        axes.set_xlabel("rows of activations")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("times as fast as dense")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(title="pattern")
    figure.suptitle(f"nmfx, linear layers in {options.dtype}: {where}", fontsize=9)
    figure.savefig(out, dpi=150)
