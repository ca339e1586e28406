"""DDP, FSDP2, tensor parallelism, both, and checkpoints: gloo processes on this machine.

The checks are in distributed_*.py. All fast ones of a world run in one launch, which the first test
that needs it starts; under xdist the other workers wait for its outcome.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import distributed_workers
import pytest
import torch.distributed as dist

WORLDS = {
    2: (
        "distributed_ddp",
        "distributed_fsdp",
        "distributed_mixed",
        "distributed_tp",
        "distributed_tp_lower",
        "distributed_tp_odd",
        "distributed_checkpoint",
    ),
    4: ("distributed_2d",),
}
# Compilers take a minute.
SLOW = {
    "distributed_tp:check_tp_compiled",
    "distributed_tp_lower:check_tp_lower_compiled",
    "distributed_fsdp:check_fsdp_compiled",
}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def _parameters() -> list[object]:
    found = []
    for world, modules in WORLDS.items():
        for module in modules:
            names = vars(importlib.import_module(module))
            for name, check in names.items():
                if name.startswith("check_") and check.__module__ == module:
                    if check.__code__.co_argcount:
                        continue
                    full = f"{module}:{name}"
                    marks = [pytest.mark.deep] if full in SLOW else []
                    label = f"{name.removeprefix('check_')}-{world}"
                    found.append(pytest.param(world, full, id=label, marks=marks))
    return found


@pytest.fixture(scope="session")
def said(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], str]:
    """What a check said, from the one launch of its world."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # all workers'
    asked = [
        (item.callspec.params["world"], item.callspec.params["check"])
        for item in request.session.items
        if item.path == Path(__file__)
    ]

    def outcome(world: int, check: str) -> str:
        path = root / f"distributed{world}.json"
        with open(root / f"distributed{world}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                checks = [other for size, other in asked if size == world]
                folder = root / f"distributed{world}"
                path.write_text(json.dumps(distributed_workers.run_checks(world, checks, folder)))
        return json.loads(path.read_text())[check]

    return outcome


@pytest.mark.parametrize(("world", "check"), _parameters())
def test_on_several_ranks(world: int, check: str, said: Callable[[int, str], str]) -> None:
    outcome = said(world, check)
    assert not outcome, outcome
