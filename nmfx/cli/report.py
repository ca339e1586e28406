"""`python -m nmfx report`: which layers of a file satisfy which N:M."""

from __future__ import annotations

import argparse
from typing import Any

from ..capture.packed import packed_weight_bytes
from ..mask import DTYPES
from ..metrics import density
from ..packing import detect_pattern, makes_smaller
from ..storage.reading import open_model
from ..tuning.progress import progress_of
from . import output
from .weights import Weight, add_options, check_globs, in_order, weights


def add_command(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command and `run`."""
    add_options(parser)
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints one row per weight."""
    source = open_model(options.file)
    names, rows = [], []
    for weight in progress_of(weights(source, options), "reading"):
        names.append(weight.name)
        if weight.named:
            rows.append(_row(weight))
    check_globs(names, options)
    rows.sort(key=lambda row: in_order(row["name"]))
    if options.json:
        output.show_json(rows)
        return
    output.show_table(
        ("parameter", "shape", "dtype", "state", "satisfies"),
        ("nonzero", "bytes", "packed"),
        (
            (
                row["name"],
                "x".join(map(str, row["shape"])),
                row["dtype"],
                row["state"],
                row["pattern"] or "-",
                "-" if row["density"] is None else f"{row['density']:.1%}",
                f"{row['bytes']:,}",
                "-" if row["packed_bytes"] is None else f"{row['packed_bytes']:,}",
            )
            for row in rows
        ),
    )
    sparse = [row for row in rows if row["pattern"] is not None]
    saved = sum(row["bytes"] - (row["packed_bytes"] or row["bytes"]) for row in sparse)
    total = sum(row["bytes"] for row in rows)
    output.say()
    output.say(
        f"{len(sparse)} of {len(rows)} weights satisfy an N:M pattern that makes them smaller "
        f"(N:M keeps N of every M); {output.size(total)} as stored, "
        f"{output.size(total - saved)} with these packed"
    )


def _row(weight: Weight) -> dict[str, Any]:
    tensor, layer = weight.tensor, weight.layer
    if tensor.dtype not in DTYPES:
        pattern = None
    elif layer is None or layer.state in ("sparse", "frozen"):  # its pruned values are there
        pattern = detect_pattern(tensor, weight.dim)
    else:
        pattern = layer.pattern
    packed, columns = None, tensor[:1].numel() if weight.dim else tensor[:, :1].numel()
    if pattern is not None and not makes_smaller(columns, pattern, tensor.dtype.itemsize):
        pattern = None
    if pattern is not None:
        groups = 1 if layer is None else layer.groups
        packed = packed_weight_bytes(
            tuple(tensor.shape), weight.dim, groups, pattern, tensor.dtype.itemsize
        )
    return {
        "name": weight.name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "state": "dense" if layer is None else layer.state,
        "pattern": None if pattern is None else pattern.text,
        "trained_as": None if layer is None else layer.pattern.text,
        "density": density(tensor) if tensor.dtype in DTYPES else None,
        "bytes": weight.bytes,
        "packed_bytes": packed,
    }
