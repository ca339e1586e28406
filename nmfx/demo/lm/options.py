"""The options of `--task lm`, and the study that they ask for."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import Any

import nmfx

from .. import arguments
from .study import Plan
from .text import load
from .training import BACKWARD, STEP, Setup

# What an option is where it is not given: in a study, and with --quick.
# lambda_W: at 1:4, seed 3, 500 steps, 2e-2 gave 3.459 bits per byte (flips 1.9e-3 per step), 2e-3
# 3.466 (2.5e-3), STE 3.456 (4.9e-3), all on the held-out text of that one seed.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "width": (128, 64),
    "layers": (3, 1),
    "heads": (4, 4),
    "context": (128, 64),
    "batch": (4, 4),
    "rate": (4e-3, 4e-3),
    "patterns": (["2:4", "1:4"], ["2:4", "1:4"]),
    "lambdas": ([2e-2], [2e-2]),
    "decay": (STEP, STEP),
    "no_compile": (False, False),
}
SEEDS, STEPS = (3, 2), (600, 40)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds them; all are None if not given, so that `given` can tell."""
    group = parser.add_argument_group("--task lm only")
    for name, what in (
        ("width", "features of the model"),
        ("layers", "transformer blocks"),
        ("heads", "attention heads"),
        ("context", "bytes of text per window"),
        ("batch", "windows per step"),
    ):
        help = f"{what} (default: {DEFAULTS[name][0]})"
        group.add_argument(f"--{name}", type=arguments.positive, metavar="N", help=help)
    group.add_argument(
        "--rate", type=arguments.above_zero, help=f"learning rate (default: {DEFAULTS['rate'][0]})"
    )
    group.add_argument(
        "--patterns",
        type=arguments.pattern,
        nargs="+",
        metavar="N:M",
        help=f"each is trained by STE and SR-STE (default: {' '.join(DEFAULTS['patterns'][0])})",
    )
    group.add_argument(
        "--lambdas",
        type=arguments.above_zero,
        nargs="+",
        metavar="X",
        help="lambda_W of SR-STE, all are shown (default: 2e-2)",
    )
    group.add_argument(
        "--decay",
        choices=[STEP, BACKWARD],
        help="where lambda_W acts: at the optimizer step by nmfx.attach, where clipping does not"
        " shrink it (default), or inside backward",
    )
    group.add_argument(
        "--no-compile", action="store_true", default=None, help="train in eager mode"
    )


def given(options: argparse.Namespace) -> list[str]:
    """Which of them the command line holds."""
    names = (name for name in DEFAULTS if getattr(options, name) is not None)
    return [f"--{name.replace('_', '-')}" for name in names]


def make_plan(options: argparse.Namespace) -> Plan:
    """The study that the options ask for; explicit ones win over `--quick`.

    Raises:
        NMError: heads that do not divide the width, or no C++ compiler for `torch.compile`.
        FileNotFoundError: this Python has no source to train on.
    """
    quick = int(options.quick)
    value = {
        name: default[quick] if getattr(options, name) is None else getattr(options, name)
        for name, default in DEFAULTS.items()
    }
    if value["width"] % value["heads"]:
        raise nmfx.NMError(
            f"--width {value['width']} is not a multiple of --heads {value['heads']}"
        )
    if not value["no_compile"]:
        check_compiler()
    for split in ("train", "held out"):
        load(split)  # a Python without source is found out now, not in a worker
    setup = Setup(
        steps=options.steps or STEPS[quick],
        batch=value["batch"],
        context=value["context"],
        width=value["width"],
        layers=value["layers"],
        heads=value["heads"],
        learning_rate=value["rate"],
        decay=value["decay"],
        compiled=not value["no_compile"],
    )
    return Plan(
        seeds=options.seeds or SEEDS[quick],
        seed_base=options.seed_base,
        patterns=tuple(dict.fromkeys(value["patterns"])),
        lambdas=tuple(dict.fromkeys(value["lambdas"])),
        setup=setup,
        workers=options.workers,
    )


def check_compiler() -> None:
    """Looks for the compiler that `torch.compile` would call; without this it fails mid-way.

    Raises:
        NMError: there is none.
    """
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or usual  # as torch._inductor.config.cpp.cxx
    if shutil.which(compiler) is None:
        raise nmfx.NMError(
            f"torch.compile needs a C++ compiler and {compiler} was not found: install one, name "
            f"yours in CXX, or train in eager mode with --no-compile"
        )
