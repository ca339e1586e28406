"""Which runs the demo makes, how it chooses lambda_W, and how it uses several cores."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch
from tqdm import tqdm

from .training import Result, Run, train

PATTERNS = ("2:4", "1:16")

# lambda_W = 0 is STE; a method is (pattern or None for dense, lambda_W).
Method = tuple[str | None, float]
BASELINES: list[Method] = [(None, 0.0), *((pattern, 0.0) for pattern in PATTERNS)]


@dataclass(frozen=True)
class Plan:
    """The size of a study. The selection seeds follow the shown seeds, so none is both.

    Attributes:
        seeds: how many seeds are shown.
        seed_base: the first of them.
        steps: optimizer steps of every run.
        grid: the lambda_W values to choose from.
        selection_seeds: how many seeds choose.
        workers: processes to train in, one thread each.
    """

    seeds: int
    seed_base: int
    steps: int
    grid: tuple[float, ...]
    selection_seeds: int
    workers: int

    @property
    def shown(self) -> range:
        return range(self.seed_base, self.seed_base + self.seeds)

    @property
    def selection(self) -> range:
        return range(self.shown.stop, self.shown.stop + self.selection_seeds)

    def shown_runs(self, method: Method) -> list[Run]:
        return [Run(*method, seed, self.steps, "test") for seed in self.shown]

    def selection_runs(self, method: Method) -> list[Run]:
        return [Run(*method, seed, self.steps, "validation") for seed in self.selection]


@dataclass(frozen=True)
class Row:
    """One method; `results[i]` belongs to the i-th shown seed."""

    pattern: str | None
    lambda_w: float
    results: list[Result]

    @property
    def name(self) -> str:
        if not self.pattern:
            return "dense"
        return f"{self.pattern} {'SR-STE' if self.lambda_w else 'STE'}"


@dataclass(frozen=True)
class Study:
    """What came out.

    Attributes:
        plan: what was asked for.
        rows: dense, then STE and SR-STE of each pattern.
        validation: (pattern, lambda_W) -> mean accuracy in % on the validation images over the
            selection seeds; what lambda_W was chosen by.
    """

    plan: Plan
    rows: list[Row]
    validation: dict[Method, float]


def run_study(plan: Plan) -> Study:
    """Chooses lambda_W for each pattern, then trains every method on the shown seeds.

    The choice is the grid value with the best mean validation accuracy over the selection seeds:
    neither the test images nor the shown seeds have a part in it.
    """
    candidates: list[Method] = [(pattern, value) for pattern in PATTERNS for value in plan.grid]
    runs = [run for method in candidates for run in plan.selection_runs(method)]
    runs += [run for method in BASELINES for run in plan.shown_runs(method)]
    total = len(runs) + len(PATTERNS) * plan.seeds
    with tqdm(total=total, unit="run", desc="training") as bar, _workers(plan.workers) as pool:
        done = _train_all(runs, pool, bar)
        validation = {
            method: fmean(done[run].final_accuracy for run in plan.selection_runs(method))
            for method in candidates
        }
        methods: list[Method] = [BASELINES[0]]
        for pattern in PATTERNS:
            best = max(plan.grid, key=lambda value: validation[pattern, value])
            methods += [(pattern, 0.0), (pattern, best)]
        chosen = [method for method in methods if method not in BASELINES]
        done |= _train_all([run for method in chosen for run in plan.shown_runs(method)], pool, bar)
    rows = [Row(*method, [done[run] for run in plan.shown_runs(method)]) for method in methods]
    return Study(plan, rows, validation)


def _train_all(runs: list[Run], pool: Executor, bar: tqdm) -> dict[Run, Result]:
    done = {}
    for future in as_completed([pool.submit(train, run) for run in runs]):
        result = future.result()
        done[result.run] = result
        bar.update()
    return done


@contextmanager
def _workers(count: int) -> Iterator[Executor]:
    """A pool of `count` fresh processes that Ctrl-C, or any error, ends at once."""
    # spawn: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)
    others = set(multiprocessing.active_children())
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
