"""Runs checks on several gloo processes: each process imports once, each check has its own group.

    python tests/distributed_workers.py <rank> <world> <folder> <module:check> ...

A check is a function without arguments that every rank calls; it asserts. One that fails takes no
other with it: a rank that waits for one that failed gives up after a while.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

_PATIENCE = datetime.timedelta(seconds=60)


def run_checks(world: int, checks: list[str], folder: Path) -> dict[str, str]:
    """What each check said, "" if it passed on all ranks."""
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
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
    said = {check: "" for check in checks}
    for rank in range(world):
        path = folder / f"rank{rank}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for check in checks:
            outcome = found.get(check, f"it did not run:\n{printed[rank]}")
            said[check] += f"rank {rank}: {outcome}\n" if outcome else ""
    return said


def _work(rank: int, world: int, folder: Path, checks: list[str]) -> None:
    import torch
    import torch.distributed as dist

    said = {}
    for check in checks:
        module, _, name = check.partition(":")
        store = folder / name
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=_PATIENCE
        )
        try:
            getattr(importlib.import_module(module), name)()
            said[check] = ""
        except Exception:  # noqa: BLE001  # any of them is a failed check
            said[check] = traceback.format_exc()
        finally:
            dist.destroy_process_group()
    (folder / f"rank{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
