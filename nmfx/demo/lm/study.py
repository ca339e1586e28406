"""Which runs the lm task makes: dense, then STE and SR-STE of every pattern, on every seed."""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

import nmfx

from ..rows import Method, Row
from ..workers import train_all, workers
from .training import Result, Run, Setup, prepare, train


@dataclass(frozen=True)
class Plan:
    """The size of a study.

    Attributes:
        seeds: how many seeds.
        seed_base: the first of them.
        patterns: such as ("2:4", "1:4").
        lambdas: the lambda_W of SR-STE; all are shown, none is chosen.
        setup: what all runs have in common.
        workers: processes to train in, one thread each.
    """

    seeds: int
    seed_base: int
    patterns: tuple[str, ...]
    lambdas: tuple[float, ...]
    setup: Setup
    workers: int

    @property
    def shown(self) -> range:
        return range(self.seed_base, self.seed_base + self.seeds)

    @property
    def methods(self) -> list[Method]:
        sparse = [(pattern, value) for pattern in self.patterns for value in (0.0, *self.lambdas)]
        return [(None, 0.0), *sparse]

    def runs(self, method: Method) -> list[Run]:
        return [Run(*method, seed, self.setup) for seed in self.shown]


@dataclass(frozen=True)
class Study:
    """What came out: a row per method, in the order of `plan.methods`."""

    plan: Plan
    rows: list[Row[Result]]

    def row(self, method: Method) -> Row[Result]:
        return self.rows[self.plan.methods.index(method)]


def reports(plan: Plan) -> list[str]:
    """What `nmfx.report` says of an untrained model, pattern by pattern: what is made sparse.

    Raises:
        NMError: a pattern fits no layer of a model of this width.
    """
    value = plan.lambdas[0]
    # The optimizers are kept until the reports are made: without them the decay moves back.
    pairs = [prepare(Run(pattern, value, 0, plan.setup)) for pattern in plan.patterns]
    return [str(nmfx.report(model)) for model, _ in pairs]


def run_study(plan: Plan) -> Study:
    """Trains every method on every seed."""
    # Seed by seed: what is compiled for the first seed is read from torch's cache for the others.
    runs = [run for each in zip(*map(plan.runs, plan.methods), strict=True) for run in each]
    with tqdm(total=len(runs), unit="run", desc="training") as bar, workers(plan.workers) as pool:
        done = train_all(train, runs, pool, bar)
    rows = [Row(*method, [done[run] for run in plan.runs(method)]) for method in plan.methods]
    return Study(plan, rows)
