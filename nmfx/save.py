"""nmfx.save: a model in a safetensors file, with what the tensors do not tell."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .capture.install import check_classes
from .capture.sharding import refuse_parts
from .errors import NMError
from .storage.describe import describe
from .storage.digests import stored_as
from .storage.place import place_of
from .storage.spec import Spec
from .storage.writing import Writer, split
from .version import NMFX

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(|KB|MB|GB|TB)", re.ASCII)


def save(
    model: nn.Module, path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> list[Path]:
    """Writes a dense, sparsified, folded or lowered model to a safetensors file.

    The tensors are those of the state_dict under the same names, so that any reader of safetensors
    gets them. The file's metadata say what they do not: patterns, lambda, fixed masks, which form
    `nmfx.lower` chose for each layer and why, and the SHA-256 of every tensor. Above
    `max_shard_size` there are several files and an index, as Hugging Face has them.

    The file is written beside its place and renamed, so that it is the old model or the new one,
    whole, whenever the process or the machine stops. What an earlier save left over is deleted.

    Args:
        model: anything whose state_dict is its parameters and buffers. A compiled model
            (`torch.compile`) is saved as what it was made of.
        path: "x.safetensors", or a folder that exists, for its "model.safetensors".
        max_shard_size: bytes of one file, or a text like "5GB" (10^9 bytes).

    Returns:
        The files that were written; if there are several, the index is the last.

    Raises:
        NMError: a tensor that safetensors cannot hold (on the meta device, sharded, quantized), a
            state_dict with something else in it, or another name or size than described.
        OSError: no such folder, no space, no permission. An older model there is unchanged.
    """
    model = uncompiled(model, "save")
    most = _bytes(max_shard_size)
    place = place_of(path)
    if not place.folder.is_dir():
        raise FileNotFoundError(f"{place.folder}: no such folder")
    check_classes(model)
    refuse_parts(model, "save")
    description = describe(model)
    _check_dtypes(description.tensors)
    with torch.no_grad():
        places: set[int] = set()
        tensors = {name: _plain(tensor, places) for name, tensor in description.tensors.items()}
    stored = {name: stored_as(tensor) for name, tensor in tensors.items()}
    spec = Spec(
        NMFX,
        str(torch.__version__),
        tensors=stored,
        aliases=description.aliases,
        **description.fields,
    )
    shards = split(tensors, most)
    with Writer(place, len(shards)) as writer:
        for shard in shards:
            writer.add(shard, stored)
        return writer.finish(spec.to_json())


def uncompiled(model: nn.Module, verb: str) -> nn.Module:
    """What `torch.compile` was given, if `model` is its result.

    Raises:
        NMError: no module.
    """
    if not isinstance(model, nn.Module):
        raise NMError(f"nmfx.{verb} takes an nn.Module, got {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


def _plain(tensor: Tensor, places: set[int]) -> Tensor:
    """Contiguous, on the CPU, in memory that no other tensor has a part of.

    Args:
        tensor: of the model.
        places: where the memory of those before begins; that of this one is added.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    storage = plain.untyped_storage()
    if storage.nbytes() != plain.nbytes or storage.data_ptr() in places:
        return plain.clone()
    if plain.numel():
        places.add(storage.data_ptr())
    return plain


def _bytes(size: int | str) -> int:
    match = _SIZE.fullmatch(size.strip().upper()) if isinstance(size, str) else None
    if match is not None:
        size = int(float(match[1]) * _UNITS[match[2]])
    if type(size) is not int or size <= 0:
        raise NMError(f"max_shard_size={size!r} is not a number of bytes like '5GB'")
    return size


def _check_dtypes(tensors: dict[str, Tensor]) -> None:
    import safetensors.torch

    known: set[torch.dtype] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in known:
            try:
                safetensors.torch.save({"x": torch.zeros(1, dtype=tensor.dtype, device="cpu")})
            except Exception as error:
                raise NMError(f"{name}: safetensors cannot hold {tensor.dtype}") from error
            known.add(tensor.dtype)
