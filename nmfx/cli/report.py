"""`python -m nmfx report`: which layers of a file satisfy which N:M."""

from __future__ import annotations

import argparse
from typing import Any

from ..capture.packed import packed_weight_bytes
from ..mask import DTYPES, is_nm
from ..metrics import density
from ..packing import detect_pattern
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
        ("parameter", "shape", "dtype", "state", "pattern"),
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
    satisfied = [row for row in rows if row["satisfied"]]
    saved = sum(row["bytes"] - (row["packed_bytes"] or row["bytes"]) for row in satisfied)
    total = sum(row["bytes"] for row in rows)
    output.say()
    output.say(
        f"{len(satisfied)} of {len(rows)} weights satisfy an N:M pattern (N:M keeps N of every M); "
        f"{output.size(total)} as stored, {output.size(total - saved)} with these packed"
    )
    unmasked = sum(row["pattern"] is not None and not row["satisfied"] for row in rows)
    if unmasked:
        output.say(
            f"{unmasked} are of a model in training, which masks them at every forward and keeps "
            f"their pruned values: nmfx.save(nmfx.fold(model), path) writes the zeros"
        )


def _row(weight: Weight) -> dict[str, Any]:
    tensor, layer = weight.tensor, weight.layer
    pattern, satisfied, packed = None, False, None
    if tensor.dtype in DTYPES:
        pattern = detect_pattern(tensor, weight.dim) if layer is None else layer.pattern
    if pattern is not None:
        unmasked = layer is not None and layer.unmasked
        satisfied = not unmasked or is_nm(tensor, pattern, weight.dim)
        groups = 1 if layer is None else layer.groups
        size = packed_weight_bytes(
            tuple(tensor.shape), weight.dim, groups, pattern, tensor.dtype.itemsize
        )
        packed = size if size < tensor.nbytes else None
    return {
        "name": weight.name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "state": "dense" if layer is None else layer.state,
        "pattern": None if pattern is None else pattern.text,
        "satisfied": satisfied,
        "trained_as": None if layer is None else layer.pattern.text,
        "density": density(tensor) if tensor.dtype in DTYPES else None,
        "bytes": weight.bytes,
        "packed_bytes": packed,
    }
