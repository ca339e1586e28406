"""Coverage: what becomes of every model that runs here (transformers, torchvision, timm, torch.nn).

    python benchmarks/coverage.py --work FOLDER --jobs 2          # hours; resumes where it was
    python benchmarks/coverage.py --work FOLDER --only 'timm/vit*' --stage main
    python benchmarks/coverage.py --work FOLDER --render
    python benchmarks/coverage.py --work FOLDER --rows benchmarks/results/coverage_<yyyymm>.jsonl

Each model is built with random weights and small sizes, in a process of its own with limits on CPU
time and memory, and taken through every step (see `sweep/checks.py`); nothing is downloaded. A
stage is a set of steps: main, compile, and tune for a sample (lower with timings).
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forks must start from one thread
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ.setdefault("NMFX_CACHE", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from sweep import workspace
from sweep.runner import Limits, Row, run_all
from sweep.stages import STAGES
from sweep.table import outcome, write
from sweep.torchvision_ops import load_operators
from sweep.zoo import LIBRARIES, library

AGAIN = ("all", "not dense", "nmerror", "fail", "silent", "bad")


def main() -> None:
    args = _arguments()
    workspace.choose_folder(args.work)
    rows = args.work / "rows.jsonl"
    if args.rows and not rows.exists():
        rows.write_bytes(args.rows.read_bytes())
    needed = set(args.library) != {"torch"}
    operators = load_operators(args.work.resolve() / "operators") if needed else "no torchvision"
    if not args.render:
        torch.set_num_threads(1)
        _preload(args.library, args.stage)
        for stage in args.stage:
            _run(args, stage)
    write(workspace.rows(rows), operators, args.result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=Path("sweep_work"), help="folder to resume from"
    )
    parser.add_argument("--library", choices=LIBRARIES, nargs="+", default=list(LIBRARIES))
    parser.add_argument("--only", default="*", help="glob over library/name")
    parser.add_argument("--stage", choices=list(STAGES), nargs="+", default=list(STAGES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", choices=AGAIN, help="also those that have a row of this outcome")
    parser.add_argument("--rows", type=Path, help="go on from the .jsonl beside a result")
    parser.add_argument("--result", type=Path, help="instead of results/coverage_<yyyymm>.md")
    parser.add_argument("--render", action="store_true", help="only write the table")
    parser.add_argument("--seconds", type=int, default=150, help="of CPU, per model and stage")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of memory, per model")
    return parser.parse_args()


def _preload(libraries: list[str], stages: list[str]) -> None:
    """Imports once what every child needs; nothing here may start a thread."""
    if "compile" in stages:
        import torch._dynamo.testing
        import torch._inductor.pattern_matcher
        import torch.export._trace  # noqa: F401
    if "torchvision" in libraries or "timm" in libraries:
        import torchvision  # noqa: F401
    if "timm" in libraries:
        import timm  # noqa: F401
    if "transformers" in libraries:
        import transformers
        from transformers import generation, modeling_utils  # noqa: F401
        from transformers.models.auto import modeling_auto  # noqa: F401

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise SystemExit(f"{threads} threads run before the first fork: a child could hang")


def _run(args: argparse.Namespace, stage: str) -> None:
    path = args.work / "rows.jsonl"
    rows = workspace.rows(path)
    jobs = {}
    for lib in args.library:
        names = library(lib).names()
        workspace.note_total(lib, len(names))
        for name in names:
            key = f"{lib}/{name}"
            row = rows.get(key, {})
            if fnmatch.fnmatchcase(key, args.only) and _wanted(row, stage, key, args.again):
                jobs[key] = partial(STAGES[stage], key, row.get("recipe", ""))
    start, total = time.monotonic(), len(jobs)
    counted = 0

    def done(key: str, row: Row) -> None:
        nonlocal counted
        counted += 1
        workspace.append(path, {"key": key, f"{stage}_done": True, **_staged(row, stage)})
        bad = [f"{k}: {v}" for k, v in row.items() if str(v).startswith(("fail", "nmerror"))]
        text = row.get("dense") or "; ".join(bad) or "ok"
        print(
            f"{stage} {counted}/{total} {time.monotonic() - start:.0f}s {key}: {text[:230]}",
            flush=True,
        )

    gc.collect()
    gc.freeze()  # a collection in a child would copy every page of what the parent imported
    run_all(jobs, args.work / "running", args.jobs, Limits(args.seconds, args.gigabytes), done)


def _staged(row: Row, stage: str) -> Row:
    return {
        k if k not in ("cpu", "end", "killed", "error") else f"{stage}_{k}": v
        for k, v in row.items()
    }


def _wanted(row: Row, stage: str, key: str, again: str | None) -> bool:
    if row.get(f"{stage}_done"):
        found = outcome(row)
        bad = again == "bad" and found in ("nmerror", "fail", "silent")
        if not bad and again not in ("all", found):
            return False
    if stage == "main":
        return True
    return row.get("sparsify") == "pass" and (stage != "tune" or sum(key.encode()) % 10 == 0)


if __name__ == "__main__":
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 3000))
    main()
