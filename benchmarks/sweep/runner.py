"""Each model in a process of its own: forked from one that has imported everything.

The parent starts no thread, so a fork is a whole copy. A child writes what it finds line by line,
so that a crash or a limit leaves everything up to it, and the step that it happened in.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Work = Callable[["Notes"], None]


@dataclass
class Limits:
    """Of one child: seconds of CPU, gigabytes beyond what the parent has mapped."""

    seconds: int = 150
    gigabytes: float = 6.0


class Notes:
    """What a child reports: key by key, at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._seen: Row = {}

    def __call__(self, key: str, value: Any) -> Any:
        """Notes a value; the key "get" returns an earlier one."""
        if key == "get":
            return self._seen.get(value)
        self._seen[key] = value
        self._file.write(json.dumps([key, value]) + "\n")
        self._file.flush()
        return None


@dataclass
class _Child:
    key: str
    path: Path
    started: float


def run_all(
    jobs: dict[str, Work],
    folder: Path,
    workers: int,
    limits: Limits,
    done: Callable[[str, Row], None],
) -> None:
    """Runs every job in a forked child; `done(key, row)` is called as each ends."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = list(jobs)
    running: dict[int, _Child] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            key = waiting.pop(0)
            path = folder / f"{key.replace('/', '_')}.notes"
            path.unlink(missing_ok=True)
            running[_fork(jobs[key], path, limits)] = _Child(key, path, time.monotonic())
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid:
            child = running.pop(pid)
            done(child.key, _collect(child, status, usage.ru_utime + usage.ru_stime))
            continue
        _end_late(running, limits)
        time.sleep(0.02)


def _end_late(running: dict[int, _Child], limits: Limits) -> None:
    """A child that sleeps uses no CPU: 20 times the limit of wall time is for those alone."""
    for pid, child in running.items():
        if time.monotonic() - child.started > 20 * limits.seconds:
            os.kill(pid, signal.SIGKILL)


def _fork(work: Work, path: Path, limits: Limits) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _prepare(path, limits)
        notes = Notes(path)
        try:
            work(notes)
            notes("end", "done")
            code = 0
        except BaseException as error:  # noqa: BLE001 (it is the row)
            traceback.print_exc()
            notes("error", f"{type(error).__name__}: {error}"[:400])
    finally:
        os._exit(code)  # no handler of the parent runs here
    return 0


def _prepare(path: Path, limits: Limits) -> None:
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    most = mapped + int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _collect(child: _Child, status: int, cpu: float) -> Row:
    row: Row = {}
    if child.path.exists():
        for line in child.path.read_text(encoding="utf-8").splitlines():
            key, value = json.loads(line)
            row[key] = value
    begun = row.pop("begin", None)
    row["cpu"] = round(cpu, 1)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        text = "over the CPU-time limit" if name in ("SIGXCPU", "SIGKILL") else f"killed by {name}"
        row["killed"] = text
        if begun is not None and begun not in row:
            row[begun] = f"fail: {text}"
    child.path.unlink(missing_ok=True)
    return row
