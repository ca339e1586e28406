"""Tensors read from safetensors files, each checked; nothing outside their folder is opened."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import NMError
from ..huge_pages import huge_copy
from .digests import sha256_of
from .place import INDEX, KEY, KEY_DIGEST, SUFFIX, Place, place_of
from .spec import Stored, digest

_MOST_JSON = 256 * 2**20  # bytes of an index


@dataclass(frozen=True)
class Source:
    """A model in files, opened: nothing but names has been read.

    Attributes:
        files: tensor name -> the file that holds it.
        spec: the specification's text, checked against its digest; None in files of others.
    """

    place: Place
    files: Mapping[str, Path]
    spec: str | None

    def read(
        self, stored: Mapping[str, Stored] | None = None, huge: Container[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """All tensors, file by file, in memory of their own.

        Args:
            stored: what each must be; None to take them as they are.
            huge: the names of those that go into huge pages.

        Raises:
            NMError: a file that is damaged, or a tensor that is not what `stored` says.
        """
        for path in dict.fromkeys(self.files.values()):
            yield from self.read_file(path, stored, huge)

    def read_file(
        self,
        path: Path,
        stored: Mapping[str, Stored] | None = None,
        huge: Container[str] = (),
    ) -> Iterator[tuple[str, Tensor]]:
        """The same for one of the files."""
        with _opened(path) as file:
            for name in [name for name, its in self.files.items() if its == path]:
                with _damaged(path):
                    tensor = file.get_tensor(name)  # mapped from the file
                    tensor = huge_copy(tensor) if name in huge else tensor.clone()
                if stored is not None:
                    _check(f"{path}: {name}", tensor, stored[name])
                yield name, tensor


def open_model(path: str | os.PathLike[str]) -> Source:
    """Opens a single file, an index with its shards, or a folder with either.

    Raises:
        NMError: something that is no such model, or is damaged.
        FileNotFoundError: nothing is there.
    """
    given = Path(path)
    if not given.exists() and not given.name.endswith((SUFFIX, INDEX)):
        raise FileNotFoundError(f"{given}: no such file or folder")
    place = place_of(path)
    # A single file wins: when a model in shards takes its place, it is deleted last.
    if place.single.exists():
        with _opened(place.single) as file, _damaged(place.single):
            metadata, names = file.metadata() or {}, list(file.keys())
        files = dict.fromkeys(names, place.single)
        return Source(place, files, _checked_spec(place.single, metadata))
    if not place.index.exists():
        raise FileNotFoundError(f"{place.single}: no such file, and no {place.index.name} either")
    metadata, files = _read_index(place)
    by_file: dict[Path, set[str]] = {}
    for name, file_path in files.items():
        by_file.setdefault(file_path, set()).add(name)
    for file_path, wanted in by_file.items():
        if not file_path.is_file():
            raise NMError(f"{place.index}: it names {file_path.name}, which is not there")
        with _opened(file_path) as file, _damaged(file_path):
            found = set(file.keys())
        if found != wanted:
            odd = sorted(found ^ wanted)[0]
            raise NMError(f"{place.index}: it and {file_path.name} disagree about {odd!r}")
    return Source(place, files, _checked_spec(place.index, metadata))


def _read_index(place: Place) -> tuple[dict[str, Any], dict[str, Path]]:
    where = place.index
    if where.stat().st_size > _MOST_JSON:
        raise NMError(f"{where}: an index of {where.stat().st_size:,} bytes is none")
    try:
        content = json.loads(where.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise NMError(f"{where}: it is not JSON ({error})") from None
    metadata = content.get("metadata", {}) if isinstance(content, dict) else None
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not isinstance(metadata, dict) or not names:
        raise NMError(f"{where}: it has no weight_map, as an index has")
    for name in names.values():
        # A name, not a path: nothing outside the folder is ever opened.
        plain = isinstance(name, str) and name.endswith(SUFFIX) and "\0" not in name
        if not plain or name != Path(name).name or "\\" in name or name.startswith("."):
            raise NMError(f"{where}: {name!r} is not the name of a {SUFFIX} file beside it")
    return metadata, {key: place.folder / name for key, name in names.items()}


def _checked_spec(path: Path, metadata: Mapping[str, Any]) -> str | None:
    spec, found = metadata.get(KEY), metadata.get(KEY_DIGEST)
    if spec is None and found is None:
        return None
    if not isinstance(spec, str) or found != digest(spec):
        raise NMError(f"{path}: its specification does not match its SHA-256; the file is damaged")
    return spec


def _check(what: str, tensor: Tensor, stored: Stored) -> None:
    if tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
        raise NMError(
            f"{what}: it is {tensor.dtype} {tuple(tensor.shape)}, its specification says "
            f"{stored.dtype} {stored.shape}; the file is damaged"
        )
    if sha256_of(tensor) != stored.sha256:
        raise NMError(f"{what}: its bytes do not match their SHA-256; the file is damaged")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    if not path.is_file():
        raise NMError(f"{path}: it is not a file")
    os.close(os.open(path, os.O_RDONLY))  # Python's own error for a file that may not be read
    with _damaged(path):
        file = safe_open(path, framework="pt", device="cpu")
    with file:
        yield file


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """What safetensors raises about content, as one kind of error."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if "Cannot allocate memory" in str(error):  # the file may be whole
            raise MemoryError(f"{path}: {error}") from error
        raise NMError(f"{path}: not a whole safetensors file ({error})") from error
