"""`python -m nmfx demo`: its options, and what it does in order."""

from __future__ import annotations

import argparse
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..cli import output
from .arguments import natural, positive, steps
from .lm import options as lm_options
from .lm.study import reports as lm_reports
from .lm.study import run_study as run_lm_study
from .lm.table import content as lm_content
from .lm.table import print_study as print_lm_study
from .study import Plan, run_study
from .table import content, print_study

# Import name -> distribution, of what the extra `nmfx-torch[demo]` adds to nmfx.
EXTRA = {
    "digits": {"sklearn": "scikit-learn", "matplotlib": "matplotlib"},
    "lm": {"matplotlib": "matplotlib"},
}

# Mean validation accuracy in %, seeds 3 and 4; beyond the grid both patterns get worse:
#             3e-4   1e-3   3e-3   1e-2   3e-2
#     2:4     64.7   65.5   66.1   65.7   64.6
#     1:16    48.2   51.5   51.8   52.4   50.7
GRID = (1e-3, 3e-3, 1e-2)
MAX_WORKERS = 8  # the 15 runs before the tuned ones keep 8 busy for two rounds; each imports torch


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command and `run`, the function to call with what was parsed."""
    parser.add_argument("--task", choices=list(EXTRA), default="digits", help="what to train on")
    parser.add_argument("--seeds", type=positive, help="how many seeds to show (default: 3)")
    parser.add_argument("--seed-base", type=natural, default=0, help="the first one (default: 0)")
    parser.add_argument(
        "--steps",
        type=steps,
        help=f"steps of each run (default: 3000; lm: {lm_options.STEPS[0]})",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("nmfx_demo.png"), help="picture (default: nmfx_demo.png)"
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=min(MAX_WORKERS, torch.get_num_threads()),
        help=f"processes to train in (default: one per core, at most {MAX_WORKERS})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="seconds, not minutes; the numbers mean nothing then"
    )
    output.add_json(parser)
    lm_options.add_options(parser)
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Trains, prints the table (or its numbers as JSON), draws the picture.

    Raises:
        SystemExit: status 2 and one line on stderr, if something that it needs is missing.
    """
    missing = [name for module, name in EXTRA[options.task].items() if find_spec(module) is None]
    if missing:
        parser.error(f"needs {' and '.join(missing)}: install the extra nmfx-torch[demo]")

    from .drawing import check_path  # imports matplotlib

    problem = check_path(options.out)  # now, not after two minutes
    if problem:
        parser.error(f"--out {options.out}: {problem}")
    misplaced = lm_options.given(options)
    if misplaced and options.task != "lm":
        parser.error(f"{misplaced[0]} is for --task lm")
    console = Console(highlight=False, quiet=options.json)  # progress goes to stderr
    numbers = {"digits": _digits, "lm": _lm}[options.task](options, console)
    console.print(f"picture: {options.out}", soft_wrap=True)
    if options.json:
        output.show_json({**numbers, "picture": str(options.out)})


def _digits(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .figure import draw

    study = run_study(make_plan(options))
    print_study(study, console)
    draw(study, options.out)
    return content(study)


def _lm(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .lm.figure import draw

    plan = lm_options.make_plan(options)
    reports = lm_reports(plan)  # refuses patterns that fit nothing, whatever is printed
    console.print(*reports, sep="\n\n", end="\n\n", soft_wrap=True, markup=False)
    study = run_lm_study(plan)
    print_lm_study(study, console)
    draw(study, options.out)
    return lm_content(study)


def make_plan(options: argparse.Namespace) -> Plan:
    """The digits study that the options ask for; explicit numbers win over `--quick`."""
    quick = options.quick
    return Plan(
        seeds=options.seeds or (2 if quick else 3),
        seed_base=options.seed_base,
        steps=options.steps or (40 if quick else 3000),
        grid=GRID[:2] if quick else GRID,
        selection_seeds=1,
        workers=options.workers,
    )
