"""Where a model is kept in files, and under which names.

model.safetensors                              one file, its specification in the metadata
model.safetensors.index.json                   above a size: which tensor is in which shard,
model-00001-of-00002-<digest>.safetensors      as Hugging Face has it, and the specification
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import NMError

SUFFIX = ".safetensors"
INDEX = ".index.json"
KEY, KEY_DIGEST = "nmfx", "nmfx_sha256"  # of the specification, in a file's metadata


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
