"""Which tensors of a file are weights of linear and conv layers, judged without the model.

A file of nmfx says it. In files of others names and shapes must do: weights have two dimensions or
more and names that end in "weight"; embeddings, norms and output layers are told by their names, as
the default policy of `nmfx.sparsify` leaves them dense. Globs overrule that.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..capture.forms import form_names, forms_of, packed_names
from ..capture.packed import unpack_weight
from ..errors import NMError
from ..mask import DTYPES
from ..storage.content import check_content, read_spec
from ..storage.reading import Source
from ..storage.spec import Layer, Spec
from ..storage.tensors import BUFFER, MASK

_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|word_embeddings?|pos_?emb\w*)([._]|$)")
_OUTPUT = re.compile(r"(^|\.)(lm_head|head|heads|classifier|score|output_layer|embed_out)(\.|$)")
_NORM = re.compile(r"(^|[._])(\w*norm\w*|ln_\w+|bn\d*)([._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Weight:
    """One tensor of a file that could be a layer's weight.

    Attributes:
        name: of the parameter.
        tensor: the dense weight; of a packed layer, unpacked.
        dim: the grouped dimension.
        layer: what a file of nmfx says about it, or None.
        bytes: as it is stored.
        reason: why it is left dense, or "".
        named: False if --only or --skip leave it out.
    """

    name: str
    tensor: Tensor
    dim: int
    layer: Layer | None
    bytes: int
    reason: str
    named: bool = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the file and the options that say which tensors count."""
    parser.add_argument("file", type=Path, help="a safetensors file, an index, or a folder")
    add_globs(parser)


def add_globs(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which tensors count."""
    parser.add_argument(
        "--only", metavar="GLOB", action="append", default=[], help="layers that count, by name"
    )
    parser.add_argument(
        "--skip", metavar="GLOB", action="append", default=[], help="layers that stay dense"
    )
    parser.add_argument(
        "--transposed",
        metavar="GLOB",
        action="append",
        default=[],
        help="layers stored as (in, out), as GPT-2's Conv1D are: groups run along dimension 0",
    )


def weights(source: Source, options: argparse.Namespace) -> Iterator[Weight]:
    """Every tensor that could be a weight; what is surely none is left out.

    Raises:
        NMError: a damaged file.
    """
    spec = read_spec(source)
    layers = {} if spec is None else stored_layers(spec)
    for name, layer in layers.items():
        if "semi_structured" in forms_of(layer.state):
            raise NMError(f"{name}: it is {layer.format}, which only its model on that GPU reads")
    waiting: dict[str, dict[str, Tensor]] = {}
    parts = {
        name: [key for form in forms_of(layer.state) for key in form_names(name, form)]
        for name, layer in layers.items()
        if "packed" in forms_of(layer.state)
    }
    owners = {key: name for name, keys in parts.items() for key in keys}
    for name, tensor in source.read(None if spec is None else spec.tensors):
        if name not in owners:
            weight = judge(name, tensor, layers.get(name), options)
            if weight is not None:
                yield weight
            continue
        owner = owners[name]
        waiting.setdefault(owner, {})[name] = tensor
        if len(waiting[owner]) < len(parts[owner]):
            continue
        found = waiting.pop(owner)
        values, index = (found[key] for key in packed_names(owner))
        layer = layers[owner]
        assert spec is not None
        _check_packed(spec, owner, found)
        dense = unpack_weight(values, index, layer.shape, layer.dim, layer.groups, layer.pattern)
        reason = _chosen(owner, options)
        stored = sum(tensor.nbytes for tensor in found.values())
        yield Weight(owner, dense, layer.dim, layer, stored, reason, not reason)
    if waiting:
        raise NMError(f"{next(iter(waiting))}: the file has half of it")


def stored_layers(spec: Spec) -> dict[str, Layer]:
    """The N:M layers of a file by the names of their tensors: a tied weight has others too."""
    return {
        name if "packed" in forms_of(layer.state) else spec.aliases.get(name, name): layer
        for name, layer in spec.layers.items()
    }


def _check_packed(spec: Spec, name: str, found: dict[str, Tensor]) -> None:
    """What unpacking trusts."""
    only = Spec(
        spec.nmfx,
        spec.torch,
        spec.made_on,
        {key: spec.tensors[key] for key in found},
        layers={name: spec.layers[name]},
    )
    check_content(only, found)


def judge(
    name: str, tensor: Tensor, layer: Layer | None, options: argparse.Namespace
) -> Weight | None:
    """Judges one tensor by its name, shape and dtype; None if it is no weight at all."""
    if layer is None and (tensor.ndim < 2 or not name.endswith("weight")):
        return None
    if name.startswith((MASK, BUFFER)):
        return None
    if layer is not None and tuple(tensor.shape) != layer.shape:
        raise NMError(f"{name}: its shape is {tuple(tensor.shape)}, the file says {layer.shape}")
    module = _module(name)
    dim = 1 if layer is None else layer.dim
    if _any(module, options.transposed):
        dim = 0
    reason = _chosen(name, options)
    named = not reason
    if named and tensor.dtype not in DTYPES:
        reason = f"{tensor.dtype} has no N:M order here (integer or quantized)"
    elif named and layer is None and not _any(module, options.only):
        for pattern, what in (
            (_EMBEDDING, "an embedding"),
            (_NORM, "a norm"),
            (_OUTPUT, "an output layer"),
        ):
            if pattern.search(module):
                reason = f"{what}, by its name; --only overrules that"
                break
    return Weight(name, tensor, dim, layer, tensor.nbytes, reason, named)


def _chosen(name: str, options: argparse.Namespace) -> str:
    module = _module(name)
    if options.only and not _any(module, options.only):
        return "no --only matches it"
    return "--skip matches it" if _any(module, options.skip) else ""


def in_order(name: str) -> list[object]:
    """A key to sort names by, in which layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _module(name: str) -> str:
    """The layer that a weight belongs to: what globs match."""
    return name.removesuffix("weight").rstrip(".")


def _any(module: str, globs: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(module, glob) for glob in globs)


def check_globs(found: list[str], options: argparse.Namespace) -> None:
    """Refuses globs that match nothing: a typing error would silently leave layers out.

    Args:
        found: names of all weights.

    Raises:
        NMError: the first such glob.
    """
    modules = [_module(name) for name in found]
    for option in ("only", "skip", "transposed"):
        for glob in getattr(options, option):
            if not any(fnmatch.fnmatchcase(module, glob) for module in modules):
                raise NMError(f"--{option} {glob} matches no weight of the file")
