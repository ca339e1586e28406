"""Tables, targets and the chart of `bench_cpu_linear.py`."""

from __future__ import annotations

import math
from pathlib import Path

from peers import DENSE
from records import Record, reasons, table

BANDS = {"rows 1": (1, 1), "rows 2-32": (2, 32), "rows 128": (128, 128), "rows 512+": (512, 1e9)}
# Ratio to the best dense peer, geomean per band; for 2:4 also the least of the shapes, rows 2-32.
TARGETS = {
    ("2:4", "fp32"): (1.7, 1.75, 1.25, 1.15),
    ("2:4", "bf16"): (1.65, 1.8, 1.45, 1.3),
    ("1:4", "fp32"): (3.4, 3.1, 2.1, 1.9),
    ("1:4", "bf16"): (2.8, 2.9, 2.2, 2.0),
    ("2:8", "fp32"): (3.4, 3.1, 2.1, 1.9),
    ("2:8", "bf16"): (2.8, 2.9, 2.2, 2.0),
    ("1:16", "fp32"): (12, 9, 5.5, 5),
    ("1:16", "bf16"): (8, 8, 6.5, 5.5),
}
LEAST = {("2:4", "fp32"): 1.35, ("2:4", "bf16"): 1.4}


def best_dense(record: Record) -> tuple[str, float]:
    times = {name: record["times"][name]["median"] for name in DENSE if name in record["times"]}
    name = min(times, key=times.__getitem__)
    return name, times[name]


def ms(record: Record, name: str) -> float | None:
    return record["times"][name]["median"] if name in record["times"] else None


def patterns_of(record: Record) -> list[str]:
    return [name.split()[1] for name in record["times"] if name.startswith("nmfx ")]


def tables(found: list[Record]) -> str:
    parts = []
    for dtype, threads in sorted({(r["cell"]["dtype"], r["cell"]["threads"]) for r in found}):
        lines = []
        for r in found:
            if (r["cell"]["dtype"], r["cell"]["threads"]) == (dtype, threads):
                lines += [_line(r, pattern) for pattern in patterns_of(r)]
        head = ["out x in", "rows", "pattern", "best dense ms", "peer", "nmfx ms", "x best dense",
                "OpenVINO ms", "nmfx is x faster", "DeepSparse ms", "nmfx is x faster"]  # fmt: skip
        parts += [f"## {dtype}, {threads} thread{'s' * (threads > 1)}", table(head, lines)]
    parts += ["## Not available, and what the compiled code calls", reasons(found)]
    return "\n\n".join(parts)


def _line(record: Record, pattern: str) -> list[str]:
    peer, dense = best_dense(record)
    ours = ms(record, f"nmfx {pattern}")
    assert ours is not None
    cells = [record["cell"]["shape"], str(record["cell"]["rows"]), pattern]
    cells += [f"{dense:.3f}", peer, f"{ours:.3f}", f"{dense / ours:.2f}"]
    for other in (ms(record, "openvino"), ms(record, f"deepsparse {pattern}")):
        cells += ["n/a", "n/a"] if other is None else [f"{other:.3f}", f"{other / ours:.2f}"]
    return cells


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(found: list[Record]) -> str:
    """Per band: geomean over shapes and rows, the least shape's geomean, and the target."""
    lines = []
    groups = {
        (r["cell"]["dtype"], r["cell"]["threads"], p): None for r in found for p in patterns_of(r)
    }
    for dtype, threads, pattern in groups:
        cells = []
        for number, (low, high) in enumerate(BANDS.values()):
            by_shape: dict[str, list[float]] = {}
            for r in found:
                c, ours = r["cell"], ms(r, f"nmfx {pattern}")
                inside = (c["dtype"], c["threads"]) == (dtype, threads) and low <= c["rows"] <= high
                if inside and ours is not None:
                    by_shape.setdefault(c["shape"], []).append(best_dense(r)[1] / ours)
            least = LEAST.get((pattern, dtype)) if number == 1 else None
            target = TARGETS.get((pattern, dtype), (None,) * 4)[number]
            cells.append(_band(by_shape, target, least))
        lines.append([dtype, str(threads), pattern, *cells])
    head = ["dtype", "threads", "pattern", *BANDS]
    text = "x best dense: geomean over shapes (least shape), target, whether it is met."
    return "\n\n".join(["## Summary", text, table(head, lines)])


def _band(by_shape: dict[str, list[float]], target: float | None, least: float | None) -> str:
    if not by_shape:
        return "-"
    shapes = [geomean(ratios) for ratios in by_shape.values()]
    whole, worst = geomean([v for ratios in by_shape.values() for v in ratios]), min(shapes)
    text = f"{whole:.2f} ({worst:.2f})"
    if target is None:
        return text
    met = whole >= target and (least is None or worst >= least)
    wanted = f"{target:g}" + (f" ({least:g})" if least else "")
    return f"{text}, {wanted}: {'met' if met else '**missed**'}"


def chart(found: list[Record], path: Path) -> None:
    """Speed-up over the best dense peer by rows; one panel per dtype, the fewest threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = min(r["cell"]["threads"] for r in found)
    found = [r for r in found if r["cell"]["threads"] == threads]
    dtypes = sorted({r["cell"]["dtype"] for r in found}, reverse=True)  # fp32 first
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(4.5 * len(dtypes), 3.6), sharey=True, squeeze=False
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        here = [r for r in found if r["cell"]["dtype"] == dtype]
        for pattern in dict.fromkeys(p for r in here for p in patterns_of(r)):
            points: dict[int, list[float]] = {}
            for r in here:
                if (ours := ms(r, f"nmfx {pattern}")) is not None:
                    points.setdefault(r["cell"]["rows"], []).append(best_dense(r)[1] / ours)
            rows = sorted(points)
            panel.plot(rows, [geomean(points[n]) for n in rows], marker="o", ms=4, label=pattern)
        panel.axhline(1, color="0.5", lw=1, ls="--")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_major_formatter("{x:g}x")
        panel.set_title(f"{dtype}, {threads} thread{'s' * (threads > 1)}")
        panel.set_xlabel("rows of activations")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("speed-up over best dense")
    panels[0][-1].legend(title="keep N:M", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
