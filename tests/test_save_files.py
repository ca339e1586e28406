"""Files of nmfx.save: shards, and what a kill, a full disk or a missing right leave behind."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_save import Mlp, X, _packed, _sparse, assert_same_model
from torch import nn

import nmfx
from nmfx.storage import writing

LINUX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shards_are_named_by_content_and_an_index_lists_them(tmp_path: Path) -> None:
    model, path = _packed(), tmp_path / "net.safetensors"
    written = nmfx.save(model, path, max_shard_size="2KB")
    assert [p.name for p in written] == names(tmp_path)
    assert len(written) > 2
    assert written[-1].name == "net.safetensors.index.json"
    index = json.loads(written[-1].read_text())
    assert set(index["weight_map"].values()) == {p.name for p in written[:-1]}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values()) + (
        model.hidden.nbytes
    )
    for where in (path, written[-1], tmp_path / "net.safetensors.index.json"):
        assert_same_model(model, nmfx.load(where, into=Mlp()), X)
    assert nmfx.save(model, path, max_shard_size="2KB") == written  # the same content and names
    other = nmfx.save(_packed(), path, max_shard_size="2KB")
    assert not {p.name for p in other[:-1]} & {p.name for p in written[:-1]}
    assert names(tmp_path) == sorted(p.name for p in other)  # the old shards are gone


def test_from_one_file_to_shards_and_back(tmp_path: Path) -> None:
    keep = tmp_path / "model-2.safetensors"
    keep.write_bytes(b"somebody else's")
    for size in ("1GB", "2KB", "1GB", "3 KB", "2KB"):
        model = _sparse()
        written = nmfx.save(model, tmp_path, max_shard_size=size)
        assert names(tmp_path) == sorted([p.name for p in written] + [keep.name])
        assert_same_model(model, nmfx.load(tmp_path, into=Mlp()), X)


def test_a_file_keeps_its_permissions_and_gets_those_of_the_umask(tmp_path: Path) -> None:
    path, plain = tmp_path / "model.safetensors", tmp_path / "plain"
    plain.touch()
    nmfx.save(nn.Linear(4, 4), path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o640)
    nmfx.save(nn.Linear(4, 4), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_packed_layers_take_their_packed_size_on_the_disk(tmp_path: Path) -> None:
    model = nmfx.lower(nmfx.sparsify(nn.Linear(1024, 1024), {"": "2:4"}), tune=False)
    (path,) = nmfx.save(model, tmp_path / "model.safetensors")
    packed = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert path.stat().st_size <= 1.01 * packed


# --- interrupted at every step ------------------------------------------------------------------


class Stopped(BaseException):
    pass


def _steps(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> list[int]:
    """Counts what changes the disk, and raises instead of the `stop_at`-th."""
    count = [0]

    def wrapped(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == stop_at:
                raise Stopped
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("_write_tensors", "_sync", "_unlink"):
        wrapped(writing, name)
    wrapped(writing.os, "replace")
    wrapped(writing.Path, "unlink")
    return count


@pytest.mark.parametrize(
    ("before", "after"), [("1GB", "1GB"), ("1GB", "2KB"), ("2KB", "1GB"), ("2KB", "2KB")]
)
def test_stopped_at_any_step_the_old_or_the_new_model_is_there(
    before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = _sparse(), _packed()
    seen = set()
    for step in range(1, 200):
        folder = tmp_path / str(step)
        folder.mkdir()
        nmfx.save(old, folder, max_shard_size=before)
        with monkeypatch.context() as patch:
            _steps(patch, step)
            try:
                nmfx.save(new, folder, max_shard_size=after)
                done = True
            except Stopped:
                done = False
        found = nmfx.load(folder, into=Mlp())
        is_new = nmfx.report(found).rows[0].state == "packed"
        seen.add(is_new)
        assert_same_model(new if is_new else old, found, X)
        written = nmfx.save(new, folder, max_shard_size=after)
        assert names(folder) == sorted(p.name for p in written)  # swept
        if done:
            assert is_new
            break
    assert seen == {True, False}
    assert step > 4


# --- killed -------------------------------------------------------------------------------------


def _in_a_child(work: Callable[[], int]) -> int:
    """Runs `work` in a fork; its status."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@LINUX
def test_killed_at_50_random_moments(tmp_path: Path) -> None:
    models = [_sparse(), _packed()]
    chance, killed_while_saving = random.Random(0), 0
    nmfx.save(models[0], tmp_path)
    for _ in range(50):
        child = os.fork()
        if child == 0:
            try:
                for number in range(10_000):
                    size = ("1GB", "2KB")[number // 2 % 2]
                    nmfx.save(models[number % 2], tmp_path, max_shard_size=size)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed_while_saving += any(name.endswith(".nmfx-tmp") for name in names(tmp_path))
        found = nmfx.load(tmp_path, into=Mlp())
        packed = nmfx.report(found).rows[0].state == "packed"
        assert_same_model(models[packed], found, X)
    assert killed_while_saving  # some were in the middle of it
    written = nmfx.save(models[0], tmp_path)
    assert names(tmp_path) == [p.name for p in written]


# --- no space, no right -------------------------------------------------------------------------


@LINUX
@pytest.mark.parametrize("size", ["1GB", "2KB"])
def test_a_full_disk_is_one_clear_error_and_the_old_model_stays(size: str, tmp_path: Path) -> None:
    old, new = _sparse(), nn.Sequential(nn.Linear(64, 64))
    nmfx.save(old, tmp_path)

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        try:
            nmfx.save(new, tmp_path, max_shard_size=size)
        except OSError as error:
            return 0 if str(tmp_path) in str(error) else 2
        return 1

    assert _in_a_child(work) == 0
    assert names(tmp_path) == ["model.safetensors"]
    assert_same_model(old, nmfx.load(tmp_path, into=Mlp()), X)


def test_an_index_that_cannot_be_read_costs_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _sparse()
    *_, index = nmfx.save(model, tmp_path, max_shard_size="2KB")
    before, text = names(tmp_path), index.read_text()
    index.write_text(text[:-5])

    def full(*arguments: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write_tensors", full)
        with pytest.raises(OSError, match="no space"):
            nmfx.save(_packed(), tmp_path, max_shard_size="2KB")
    assert names(tmp_path) == before
    index.write_text(text)
    assert_same_model(model, nmfx.load(tmp_path, into=Mlp()), X)


@LINUX
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    model = _sparse()
    folder = tmp_path / "mine"
    folder.mkdir()
    nmfx.save(model, folder)
    (folder / "model.safetensors").chmod(0o600)
    folder.chmod(0o555)

    def work() -> int:
        if os.getuid() == 0:
            os.chmod(tmp_path, 0o755)
            os.setuid(65534)  # rights do not bind root
        status = 0
        try:
            nmfx.save(model, folder)
            status += 1
        except PermissionError:
            pass
        if os.getuid() == 65534:
            try:
                nmfx.load(folder, into=Mlp())
                status += 2
            except PermissionError:
                pass
        return status

    try:
        for parent in tmp_path.parents:
            if parent.stat().st_uid == os.getuid() and parent != Path("/"):
                mode = parent.stat().st_mode
                if not mode & 0o001 and os.getuid() == 0:
                    parent.chmod(mode | 0o001)
        assert _in_a_child(work) == 0
    finally:
        folder.chmod(0o755)
    assert_same_model(model, nmfx.load(folder, into=Mlp()), X)


@LINUX
def test_loading_into_a_meta_model_takes_the_memory_of_the_file() -> None:
    """At most the file and its largest layer; the pages of the file itself come and go."""
    import tempfile

    def anonymous() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
        return 0

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(12)))

    with tempfile.TemporaryDirectory() as folder:
        (path,) = nmfx.save(
            nmfx.lower(nmfx.sparsify(make(), "2:4"), tune=False), Path(folder) / "m.safetensors"
        )

        def work() -> int:
            with torch.device("meta"):
                into = make()
            start, most, stop = anonymous(), [0], threading.Event()

            def watch() -> None:
                while not stop.is_set():
                    most[0] = max(most[0], anonymous())

            thread = threading.Thread(target=watch)
            thread.start()
            nmfx.load(path, into=into)
            stop.set()
            thread.join()
            used, allowed = most[0] - start, path.stat().st_size + 4 * 1024 * 1024 + 2**21
            print(used, allowed)
            return int(used > allowed)

        assert _in_a_child(work) == 0
