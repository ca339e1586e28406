"""Tensors in files: safetensors, whole or in shards, written so that nothing is lost.

    model.safetensors                              one file, its specification in the metadata
    model.safetensors.index.json                   above a size: which tensor is in which shard,
    model-00001-of-00002-<digest>.safetensors      as Hugging Face has it, and the specification

Everything is written beside its place under a temporary name, synced to the disk, and renamed.
Shards are named by their content, so a new model never overwrites the shards of the old one; the
index (or the single file) comes last. Whatever kills the process, a reader finds the old model or
the new one, whole. What is left over is swept by the next save.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NMError
from .spec import Stored, digest

try:
    import fcntl
except ImportError:  # not on Windows: there two saves into one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".safetensors"
INDEX = ".index.json"
_KEY, _KEY_DIGEST = "nmfx", "nmfx_sha256"
_TEMPORARY = ".nmfx-tmp"
_MOST_JSON = 256 * 2**20  # bytes of an index


@dataclass(frozen=True)
class Place:
    """Where a model is, or goes: a folder and the name of its single file."""

    folder: Path
    name: str

    @property
    def single(self) -> Path:
        """The file of a model that is not in shards."""
        return self.folder / self.name

    @property
    def index(self) -> Path:
        """The index of a model in shards."""
        return self.folder / (self.name + INDEX)

    @property
    def stem(self) -> str:
        """The name without its suffix, which shards begin with."""
        return self.name.removesuffix(SUFFIX)

    def is_shard(self, name: str) -> bool:
        """Whether `name` is that of a shard of this model, written by nmfx."""
        return bool(
            re.fullmatch(
                rf"{re.escape(self.stem)}-\d{{5,}}-of-\d{{5,}}-[0-9a-f]{{16}}{re.escape(SUFFIX)}",
                name,
                re.ASCII,
            )
        )


def place_of(path: str | os.PathLike[str]) -> Place:
    """Reads a path: a folder, "x.safetensors" or "x.safetensors.index.json".

    Raises:
        NMError: another kind of name.
    """
    path = Path(path)
    if path.is_dir():
        return Place(path, "model" + SUFFIX)
    name = path.name.removesuffix(INDEX)
    if not name.endswith(SUFFIX) or name == SUFFIX:
        raise NMError(f"{path}: files of nmfx are named *{SUFFIX}, or give a folder that exists")
    if name.startswith(".") or "\\" in name or not is_text(name):
        raise NMError(f"{str(path)!r}: a name with a dot in front, a backslash or no UTF-8")
    return Place(path.parent, name)


def is_text(name: str) -> bool:
    """Whether a name is UTF-8, as everything in these files is."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- writing ------------------------------------------------------------------------------------


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 of such a tensor's bytes, in hex."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def stored_as(tensor: Tensor) -> Stored:
    """What such a tensor is in a file."""
    return Stored(tensor.dtype, tuple(tensor.shape), sha256_of(tensor))


class Writer:
    """Writes a model shard by shard; a context manager. Until `finish`, the old model stands.

    Args:
        place: where to; its folder exists.
        count: the number of shards; 1 for a single file.

    Raises:
        OSError: it could not be written; a model that was there is unchanged.
    """

    def __init__(self, place: Place, count: int) -> None:
        self._place, self._count = place, count
        self._names: list[str] = []
        self._map: dict[str, str] = {}
        self._bytes = 0
        self._only: Mapping[str, Tensor] = {}
        self._alone: _Alone | None = None

    def __enter__(self) -> Writer:
        self._alone = _Alone(self._place.folder)
        _sweep(self._place, _listed(self._place.index))
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            _sweep(self._place, _listed(self._place.index))  # shards of what did not finish
        alone, self._alone = self._alone, None
        if alone is not None:
            alone.close()

    def add(self, tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
        """Writes the next shard.

        Args:
            tensors: contiguous, on the CPU, none sharing memory.
            stored: what they are.
        """
        if self._count == 1:
            self._only = tensors  # the specification comes before them in the file
            return
        lines = "\n".join(f"{name} {stored[name].sha256}" for name in tensors)
        number = f"{len(self._names) + 1:05}-of-{self._count:05}"
        name = f"{self._place.stem}-{number}-{digest(lines)[:16]}{SUFFIX}"
        with _replacing(self._place.folder / name) as temporary:
            _write_tensors(temporary, tensors, {"format": "pt"})
        self._names.append(name)
        self._map |= dict.fromkeys(tensors, name)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self, spec: str) -> list[Path]:
        """Puts the new model in the place of the old one.

        Args:
            spec: JSON.

        Returns:
            The files that hold the model now; an index comes last.
        """
        place, about = self._place, {_KEY: spec, _KEY_DIGEST: digest(spec)}
        if self._count == 1:
            with _replacing(place.single) as temporary:
                _write_tensors(temporary, self._only, {"format": "pt", **about})
            _unlink(place.index)
            _sweep(place, set())
            return [place.single]
        index = {"metadata": {"total_size": self._bytes, **about}, "weight_map": self._map}
        with _replacing(place.index) as temporary:
            temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
        place.single.unlink(missing_ok=True)  # until here, a reader finds the old model in it
        _sync(place.folder)
        _sweep(place, set(self._names))
        return [*(place.folder / name for name in self._names), place.index]


def split(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Tensors in shards of at most `most` bytes, or of one tensor that is larger."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path.parent}: could not be written to: {error}") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, whose content replaces it when the block is through."""
    # A folder, because safetensors makes a temporary file of its own beside the one it is given.
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY))
    temporary = folder / path.name
    try:
        yield temporary
        # Whatever it was made with: what replaces a file is as open as others.
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _sync(path.parent)


def _umask() -> int:
    """The process's umask, read where Linux tells it: asking os.umask would change it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.M)
        if found:
            return int(found.group(1), 8)
    return 0o022


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


class _Alone:
    """Keeps other saves out of a folder: their temporaries must not look left over.

    An object, so that the lock goes with it wherever an interruption drops it.
    """

    def __init__(self, folder: Path) -> None:
        self._handle: int | None = None
        if fcntl is not None:
            self._handle = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(self._handle, fcntl.LOCK_EX)

    def close(self) -> None:
        """Lets others in."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_UN)  # a fork would keep it otherwise
            os.close(handle)

    __del__ = close


def _sweep(place: Place, keep: set[str] | None) -> None:
    """Deletes temporaries that a killed save left, and shards not in `keep` (None keeps all)."""
    for path in place.folder.iterdir():
        made_for = path.name[1:].removesuffix(_TEMPORARY).rpartition(".")[0]
        own = made_for in (place.single.name, place.index.name) or place.is_shard(made_for)
        if own and path.name.startswith(".") and path.name.endswith(_TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)
        elif keep is not None and place.is_shard(path.name) and path.name not in keep:
            _unlink(path)


def _listed(index: Path) -> set[str] | None:
    """The shards that an index names; None, so all may be needed, if it cannot be read."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


# ---- reading ------------------------------------------------------------------------------------


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

    def read(self, stored: Mapping[str, Stored] | None = None) -> Iterator[tuple[str, Tensor]]:
        """All tensors, file by file, in memory of their own.

        Args:
            stored: what each must be; None to take them as they are.

        Raises:
            NMError: a file that is damaged, or a tensor that is not what `stored` says.
        """
        for path in dict.fromkeys(self.files.values()):
            yield from self.read_file(path, stored)

    def read_file(
        self, path: Path, stored: Mapping[str, Stored] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The same for one of the files."""
        with _opened(path) as file:
            for name in [name for name, its in self.files.items() if its == path]:
                with _damaged(path):
                    tensor = file.get_tensor(name).clone()
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
    spec, found = metadata.get(_KEY), metadata.get(_KEY_DIGEST)
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
        raise NMError(f"{path}: not a whole safetensors file ({error})") from error
