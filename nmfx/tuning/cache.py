"""Timings that survive the process: one small file per key in the user's cache folder.

Nothing depends on it. A file that is missing, broken, foreign or unwritable counts as no file, and
`NMFX_CACHE=0` turns reading and writing off. Files are replaced as a whole, so a reader never sees
half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

VERSION = 2  # of the files; raise it when their meaning changes

Key = Mapping[str, object]  # values that JSON holds


def folder() -> Path | None:
    """Where timings are kept, or None if caching is off or there is no home."""
    if _unused or os.environ.get("NMFX_CACHE", "1") == "0":
        return None
    chosen = os.environ.get("NMFX_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "nmfx"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "nmfx"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "nmfx"


_unused = 0


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Neither reads nor writes files within the block: for benchmarks, in the whole process."""
    global _unused
    _unused += 1
    try:
        yield
    finally:
        _unused -= 1


def load(key: Key) -> dict[str, float] | None:
    """The milliseconds stored under a key, or None."""
    file = _file(key)
    if file is None:
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return None
    ms = content.get("ms")
    # The key in full, for two that share a hash and for files that somebody copied.
    if content.get("key") != _plain(key) or not isinstance(ms, dict) or not ms:
        return None
    if not all(_is_time(value) for value in ms.values()):
        return None
    return dict(ms)


def store(key: Key, ms: Mapping[str, float]) -> None:
    """Stores milliseconds under a key; does nothing where that is not possible."""
    file = _file(key)
    if file is None:
        return
    text = json.dumps(
        {"version": VERSION, "key": _plain(key), "ms": {k: float(v) for k, v in ms.items()}},
        indent=1,
    )
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, file)
        temporary = None
    except OSError:
        pass
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _file(key: Key) -> Path | None:
    base = folder()
    if base is None:
        return None
    digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()
    return base / f"tuning-v{VERSION}" / f"{digest[:32]}.json"


def _plain(key: Key) -> object:
    """The key as it comes back from a file: tuples are lists there."""
    return json.loads(json.dumps(dict(key)))


def _is_time(value: object) -> bool:
    # Integers are no times of ours, and may be too large for a float.
    return isinstance(value, float) and math.isfinite(value) and value > 0
