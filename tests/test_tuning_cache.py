"""The cache of timings: what goes in comes out, and whatever else lies there never raises."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmfx.tuning import cache

FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)
KEYS = st.dictionaries(st.text(max_size=8), PLAIN, max_size=5)
TIMES = st.dictionaries(
    st.text(min_size=1, max_size=8), st.floats(1e-6, 1e6), min_size=1, max_size=3
)
KEY = {"cpu": "a", "input": [[8, 16], [16, 1]], "threads": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NMFX_CACHE", "1")
    monkeypatch.setenv("NMFX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


@FOLDER
@given(KEYS, TIMES)
def test_cache_round_trip(key: dict[str, Any], ms: dict[str, float]) -> None:
    cache.store(key, ms)
    assert cache.load(key) == ms
    assert cache.load({**key, "another": 1}) is None


@FOLDER
@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_cache_with_a_broken_file_counts_as_none(folder: Path, content: bytes) -> None:
    cache.store(KEY, {"dense": 1.0})
    (file,) = files(folder)
    file.write_bytes(content)
    assert cache.load(KEY) is None
    cache.store(KEY, {"dense": 2.0})
    assert cache.load(KEY) == {"dense": 2.0}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@FOLDER
@given(st.sampled_from(["version", "key", "ms"]), JSON)
def test_cache_with_a_foreign_field_counts_as_none(folder: Path, field: str, value: Any) -> None:
    cache.store(KEY, {"dense": 1.0})
    (file,) = files(folder)
    content = json.loads(file.read_text())
    content[field] = value
    file.write_text(json.dumps(content))
    found = cache.load(KEY)
    assert found is None or all(type(ms) is float and 0 < ms < 1e308 * 10 for ms in found.values())


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf"), 10**400, True, "1", None])
def test_cache_refuses_what_is_no_time(folder: Path, ms: Any) -> None:
    cache.store(KEY, {"dense": 1.0})
    (file,) = files(folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), "ms": {"dense": ms}}))
    assert cache.load(KEY) is None


def test_cache_of_another_version_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, {"dense": 1.0})
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert cache.load(KEY) is None


def test_cache_leaves_whole_files_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, {"dense": 1.0})

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    cache.store(KEY, {"dense": 2.0})
    assert cache.load(KEY) == {"dense": 1.0}
    assert len(files(folder)) == 1, "a temporary file stayed"


def test_cache_where_nothing_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file where the folder should be")
    cache.store(KEY, {"dense": 1.0})
    assert cache.load(KEY) is None


def test_cache_can_be_turned_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, {"dense": 1.0})
    monkeypatch.setenv("NMFX_CACHE", "0")
    assert cache.folder() is None
    assert cache.load(KEY) is None
    cache.store({"b": 1}, {"dense": 1.0})
    assert len(files(folder)) == 1


def test_cache_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NMFX_CACHE_DIR")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.folder() == Path("/somewhere/nmfx")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.folder() == Path.home() / ".cache" / "nmfx"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache.folder() == Path.home() / "Library" / "Caches" / "nmfx"
