"""`python -m nmfx check`: do the weights of a file satisfy a pattern?"""

from __future__ import annotations

import argparse
import sys

from ..mask import magnitude
from ..pattern import Pattern
from ..storage.files import open_model
from ..tuning.progress import progress_of
from . import output
from .weights import Weight, add_options, check_globs, weights


def add_command(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command and `run`."""
    add_options(parser)
    parser.add_argument("--pattern", required=True, help='"2:4" keeps 2 of every 4 weights')
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the first group of each weight that breaks the pattern.

    Raises:
        SystemExit: status 1 if one does, or if nothing was checked.
    """
    pattern = Pattern.parse(options.pattern)
    rows = []
    for weight in progress_of(weights(open_model(options.file), options), "checking"):
        skipped = weight.reason or does_not_fit(weight, pattern)
        broken = None if skipped else first_offence(weight, pattern)
        rows.append({"name": weight.name, "skipped": skipped or None, "broken": broken})
    check_globs([str(row["name"]) for row in rows], options)
    checked = [row for row in rows if row["skipped"] is None]
    broken_rows = [row for row in checked if row["broken"] is not None]
    ok = bool(checked) and not broken_rows
    if options.json:
        output.show_json({"pattern": pattern.text, "ok": ok, "weights": rows})
    else:
        for row in rows:
            if row["skipped"] is not None:
                output.say(f"skipped  {row['name']}: {row['skipped']}")
        for row in broken_rows:
            output.say(f"broken   {row['name']}: {row['broken']}")
        verdict = "satisfy" if ok else "do not all satisfy"
        if not checked:
            verdict = "were checked, so nothing is known about"
        output.say(
            f"{len(checked)} weights {verdict} {pattern}; skipped: {len(rows) - len(checked)}"
        )
    if not ok:
        sys.exit(1)


def does_not_fit(weight: Weight, pattern: Pattern) -> str:
    """Why a pattern does not fit the shape of a weight, or nothing."""
    length = weight.tensor.shape[weight.dim]
    return f"its {length} inputs are no multiple of {pattern.m}" if length % pattern.m else ""


def first_offence(weight: Weight, pattern: Pattern) -> str | None:
    """Where the first group with more than N nonzeros is, in words; None if there is none."""
    nonzero = (magnitude(weight.tensor) != 0).movedim(weight.dim, -1).unflatten(-1, (-1, pattern.m))
    over = nonzero.sum(-1) > pattern.n
    if not over.any():
        return None
    place = over.nonzero()[0].tolist()
    count = int(nonzero[tuple(place)].sum())
    *others, group = place
    first = group * pattern.m
    index = [str(one) for one in others]
    index.insert(weight.dim, f"{first}:{first + pattern.m}")
    return (
        f"[{', '.join(index)}] holds {count} nonzeros, {pattern.text} allows {pattern.n}; "
        f"groups like it: {int(over.sum()):,} of {over.numel():,}"
    )
