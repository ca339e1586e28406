"""Tensors written to safetensors files, whole or in shards, so that nothing is lost.

Everything is written beside its place under a temporary name, synced to the disk, and renamed.
Shards are named by their content, so a new model never overwrites the shards of the old one; the
index (or the single file) comes last. Whatever kills the process, a reader finds the old model or
the new one, whole. What is left over is swept by the next save.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from .place import KEY, KEY_DIGEST, SUFFIX, Place
from .spec import Stored, digest

try:
    import fcntl
except ImportError:  # not on Windows: there two saves into one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = ".nmfx-tmp"


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
        place, about = self._place, {KEY: spec, KEY_DIGEST: digest(spec)}
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
