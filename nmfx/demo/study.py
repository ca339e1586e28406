"""Which runs the digits task makes, and how it chooses lambda_W."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from tqdm import tqdm

from .rows import Method, Row
from .training import Result, Run, train
from .workers import train_all, workers

PATTERNS = ("2:4", "1:16")

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
class Study:
    """What came out.

    Attributes:
        plan: what was asked for.
        rows: dense, then STE and SR-STE of each pattern.
        validation: (pattern, lambda_W) -> mean accuracy in % on the validation images over the
            selection seeds; what lambda_W was chosen by.
    """

    plan: Plan
    rows: list[Row[Result]]
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
    with tqdm(total=total, unit="run", desc="training") as bar, workers(plan.workers) as pool:
        done = train_all(train, runs, pool, bar)
        validation = {
            method: fmean(done[run].final_accuracy for run in plan.selection_runs(method))
            for method in candidates
        }
        methods: list[Method] = [BASELINES[0]]
        for pattern in PATTERNS:
            best = max(plan.grid, key=lambda value: validation[pattern, value])
            methods += [(pattern, 0.0), (pattern, best)]
        chosen = [method for method in methods if method not in BASELINES]
        runs = [run for method in chosen for run in plan.shown_runs(method)]
        done |= train_all(train, runs, pool, bar)
    rows = [Row(*method, [done[run] for run in plan.shown_runs(method)]) for method in methods]
    return Study(plan, rows, validation)
