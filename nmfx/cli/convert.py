"""`python -m nmfx convert`: a checkpoint made N:M, shard by shard, without its model."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NMError
from ..mask import nm_project
from ..pattern import Pattern
from ..storage.content import read_spec
from ..storage.digests import stored_as
from ..storage.place import SUFFIX, Place, place_of
from ..storage.reading import Source, open_model
from ..storage.spec import Layer, Spec, Stored
from ..storage.writing import Writer
from ..tuning.progress import progress
from ..version import NMFX
from . import output
from .check import does_not_fit, first_offence
from .weights import Weight, add_globs, check_globs, in_order, judge

# What lies beside the weights in a folder of Hugging Face and belongs to the model.
_BESIDE = (".json", ".txt", ".model", ".py", ".jinja", ".md")


def add_command(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command and `run`."""
    parser.add_argument("source", metavar="in", type=Path, help="a safetensors file or a folder")
    parser.add_argument("target", metavar="out", type=Path, help="a file, or a folder like the one")
    parser.add_argument("--pattern", required=True, help='"2:4" keeps 2 of every 4 weights')
    parser.add_argument(
        "--one-shot",
        choices=["magnitude"],
        help="prune weights that break the pattern: keep the largest (costs accuracy)",
    )
    add_globs(parser)
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Writes the model with exact zeros at N:M places.

    Raises:
        NMError: a weight breaks the pattern and nothing was said about pruning; a file with packed
            layers; nothing to convert. Nothing is written then.
    """
    pattern = Pattern.parse(options.pattern)
    source = open_model(options.source)
    spec = _plain_spec(source, options.source)
    place = _target(source, options.target)
    files = list(dict.fromkeys(source.files.values()))
    stored: dict[str, Stored] = {}
    rows: list[_Row] = []
    with _made(place.folder), Writer(place, len(files)) as writer:
        for path in progress(files, "converting", "file"):
            tensors = {}
            for name, tensor in source.read_file(path, None if spec is None else spec.tensors):
                layer = None if spec is None else spec.layers.get(name)
                weight = judge(name, tensor, layer, options)
                if weight is not None:
                    rows.append(_convert(weight, pattern, options.one_shot is not None))
                    tensor = rows[-1].tensor
                    rows[-1].tensor = tensor[:0]  # it is written here, and not needed later
                tensors[name] = tensor.contiguous()
                stored[name] = stored_as(tensors[name])
            writer.add(tensors, stored)
        check_globs([row.name for row in rows], options)
        rows.sort(key=lambda row: in_order(row.name))
        layers = {row.name: row.layer for row in rows if row.layer is not None}
        if not layers:
            raise NMError(f"{options.source}: it has no weight that {pattern} fits")
        old = Spec(NMFX, str(torch.__version__), "", stored) if spec is None else spec
        new = replace(old, tensors=stored, layers={**old.layers, **layers})
        written = writer.finish(new.to_json())
    _copy_beside(source, place)
    _show(rows, pattern, written, options.json)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder, and takes it back if the block fails."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@dataclass
class _Row:
    """What became of one weight."""

    name: str
    tensor: Tensor
    layer: Layer | None
    done: str
    kept_energy: float


def _convert(weight: Weight, pattern: Pattern, prune: bool) -> _Row:
    name, tensor, dim = weight.name, weight.tensor, weight.dim
    reason = weight.reason or does_not_fit(weight, pattern)
    if reason:
        return _Row(name, tensor, None, f"dense: {reason}", 1.0)
    kind = "conv" if tensor.ndim > 2 else "linear" if dim == 1 else "addmm"
    layer = Layer(pattern, "folded", kind, "", tuple(tensor.shape), dim)
    if weight.layer is not None:
        layer = replace(layer, kind=weight.layer.kind, groups=weight.layer.groups)
    broken = first_offence(weight, pattern)
    if broken is None:
        return _Row(name, tensor, layer, f"{pattern.text} already", 1.0)
    if not prune:
        raise NMError(
            f"{name}: {broken}; --one-shot magnitude prunes it, training (nmfx.sparsify) loses less"
        )
    pruned = nm_project(tensor, pattern, dim)
    before, after = (one.double().square().sum() for one in (tensor, pruned))
    kept = float(after / before) if before else 1.0
    return _Row(name, pruned, layer, f"pruned to {pattern.text}", kept)


def _show(rows: list[_Row], pattern: Pattern, written: list[Path], as_json: bool) -> None:
    if as_json:
        weights = [
            {"name": row.name, "done": row.done, "kept_energy": row.kept_energy} for row in rows
        ]
        output.show_json({"files": [str(path) for path in written], "weights": weights})
        return
    output.show_table(
        ("parameter", "what was done"),
        ("kept energy",),
        ((row.name, row.done, f"{row.kept_energy:.1%}") for row in rows),
    )
    count = sum(row.layer is not None for row in rows)
    output.say()
    output.say(f"{count} of {len(rows)} weights satisfy {pattern}; written: {written[-1]}")


def _plain_spec(source: Source, path: Path) -> Spec | None:
    """The specification of a file that holds dense weights only."""
    spec = read_spec(source)
    for name, layer in () if spec is None else spec.layers.items():
        if layer.state not in ("sparse", "folded"):
            raise NMError(f"{path}: {name} is {layer.state}; convert takes dense weights")
    return spec


def _target(source: Source, target: Path) -> Place:
    """Where to: a file, or a folder, which is made when the first file is written."""
    if target.name.endswith(SUFFIX):
        place = place_of(target)
        if not place.folder.is_dir():
            raise FileNotFoundError(f"{place.folder}: no such folder")
    elif target.suffix and not target.is_dir():
        raise NMError(f"{target}: name a file *{SUFFIX}, or a folder")
    else:
        place = Place(target, "model" + SUFFIX)
    own = (source.place.folder.resolve(), source.place.name)
    if (place.folder.resolve(), place.name) == own:
        raise NMError(f"{target}: it is the model to convert; write somewhere else")
    return place


def _copy_beside(source: Source, place: Place) -> None:
    """Configuration and tokenizer of a folder, so that from_pretrained takes the new one."""
    if source.place.folder.resolve() == place.folder.resolve():
        return
    if not (source.place.folder / "config.json").exists():
        return
    for path in sorted(source.place.folder.iterdir()):
        taken = path.is_file() and path.suffix in _BESIDE and not path.name.endswith(".index.json")
        if taken and not (place.folder / path.name).exists():
            shutil.copyfile(path, place.folder / path.name)
