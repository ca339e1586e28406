"""`python -m nmfx check`: do the weights of a safetensors or ONNX file satisfy a pattern?"""

from __future__ import annotations

import argparse
import sys

from ..check_onnx import check_onnx
from ..errors import NMError
from ..mask import magnitude
from ..offence import find_offence
from ..pattern import Pattern
from ..storage.content import read_spec
from ..storage.reading import open_model
from ..storage.spec import Spec
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
    if options.file.suffix == ".onnx":
        return _run_onnx(options)
    pattern = Pattern.parse(options.pattern)
    source = open_model(options.file)
    spec = read_spec(source)
    rows, unmasked = [], 0
    for weight in progress_of(weights(source, options), "checking"):
        skipped = weight.reason or does_not_fit(weight, pattern)
        if not skipped and not options.only:
            skipped = left_dense(weight, spec)
        broken = None if skipped else first_offence(weight, pattern)
        if broken is not None and weight.layer is not None and weight.layer.unmasked:
            layer, unmasked = weight.layer, unmasked + 1
            trained = f"{layer.state}, {layer.pattern.text}"
            broken = f"unmasked, of a model in training ({trained}): {broken}"
        rows.append({"name": weight.name, "skipped": skipped or None, "broken": broken})
    check_globs([str(row["name"]) for row in rows], options)
    checked = [row for row in rows if row["skipped"] is None]
    broken_rows = [row for row in checked if row["broken"] is not None]
    ok = bool(checked) and not broken_rows
    advice = _FOLD.format(unmasked) if unmasked else None
    if options.json:
        output.show_json({"pattern": pattern.text, "ok": ok, "advice": advice, "weights": rows})
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
        if advice is not None:
            output.say(advice)
    if not ok:
        sys.exit(1)
    return None


_FOLD = (
    "unmasked weights of a model in training, which masks them at every forward: {}; fold first: "
    "nmfx.save(nmfx.fold(model), path)"
)


def left_dense(weight: Weight, spec: Spec | None) -> str:
    """Why a file that knows its N:M layers does not count a weight to them, or nothing.

    A file of a dense model knows none, so it says nothing about any.
    """
    if spec is None or not spec.layers or weight.layer is not None:
        return ""
    reason = spec.reasons.get(weight.name, "it was dense when nmfx wrote the file")
    return f"{reason}; --only checks it all the same"


def does_not_fit(weight: Weight, pattern: Pattern) -> str:
    """Why a pattern does not fit the shape of a weight, or nothing."""
    length = weight.tensor.shape[weight.dim]
    return f"its {length} inputs are no multiple of {pattern.m}" if length % pattern.m else ""


def first_offence(weight: Weight, pattern: Pattern) -> str | None:
    """Where the first group with more than N nonzeros is, in words; None if there is none."""
    return find_offence(magnitude(weight.tensor) != 0, weight.dim, pattern)


def _run_onnx(options: argparse.Namespace) -> None:
    if options.transposed:
        raise NMError("--transposed is for safetensors; an ONNX file says how its weights lie")
    found = check_onnx(options.file, options.pattern, only=options.only, skip=options.skip)
    if options.json:
        output.show_json(found.to_dict())
    else:
        for state, word in (("not checked", "skipped"), ("broken", "broken")):
            for layer in found:
                if layer.state == state:
                    name = f"{layer.name} ({layer.operator} {layer.weight}".rstrip() + ")"
                    output.say(f"{word:8} {name}: {layer.reason}")
        output.say(found.summary())
    if not found.ok:
        sys.exit(1)
