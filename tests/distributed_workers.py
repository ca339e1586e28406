"""Runs checks on several gloo processes, each of which imports once.

    python tests/distributed_workers.py <rank> <world> <folder> <module:check> ...

A check is a function without arguments that every rank calls; it asserts. After one that fails the
processes end, and new ones run the rest. All checks of a launch have one process group: DTensor
keeps what it found out about a mesh, with the group's name.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

_PATIENCE = datetime.timedelta(seconds=120)


def run_checks(world: int, checks: list[str], folder: Path) -> dict[str, str]:
    """What each check said, "" if it passed on all ranks."""
    folder.mkdir(parents=True)
    said: dict[str, str] = {}
    while len(said) < len(checks):
        left = [check for check in checks if check not in said]
        said |= _launch(world, left, folder / str(len(said)))
    return said


def _launch(world: int, checks: list[str], folder: Path) -> dict[str, str]:
    """Runs checks up to the first that fails."""
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), *checks],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    printed = [worker.communicate()[0] for worker in workers]
    for rank, text in enumerate(printed):
        (folder / f"rank{rank}.txt").write_text(text)
    found = [_read(folder / f"rank{rank}.json") for rank in range(world)]
    said = {}
    for check in checks:
        outcomes = [one.get(check, f"it did not end:\n{printed[i]}") for i, one in enumerate(found)]
        said[check] = "\n".join(
            f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if outcome
        )
        if said[check]:
            break
    return said


def _read(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.exists() else {}


def _work(rank: int, world: int, folder: Path, checks: list[str]) -> None:
    import torch
    import torch.distributed as dist

    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=_PATIENCE
    )
    said = {}
    for check in checks:
        module, _, name = check.partition(":")
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            getattr(importlib.import_module(module), name)()
            dist.barrier()  # fails where another rank has ended
            said[check] = ""
        except Exception:  # noqa: BLE001  # any of them is a failed check
            said[check] = traceback.format_exc()
        print(f"{check}: {time.perf_counter() - begin:.2f} s", flush=True)
        (folder / f"rank{rank}.json").write_text(json.dumps(said))
        if said[check]:
            os._exit(1)  # at once, so that others stop waiting for it
    dist.destroy_process_group()


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
