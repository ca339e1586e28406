"""The demo's study as a result file: dense, STE and SR-STE on augmented digits.

    python benchmarks/bench_digits.py [--seeds 5]

Takes the options of `python -m nmfx demo`.
"""

from __future__ import annotations

import argparse
import io
import time

from harness import header, write_result
from rich.console import Console

from nmfx.demo.command import add_options, make_plan
from nmfx.demo.study import run_study
from nmfx.demo.table import print_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    plan = make_plan(parser.parse_args())
    start = time.perf_counter()
    study = run_study(plan)
    seconds = time.perf_counter() - start
    text = io.StringIO()
    print_study(study, Console(file=text, width=100, highlight=False))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    took = f"Training took {seconds:.0f} s in {plan.workers} processes."
    path = write_result(
        "digits",
        "\n".join(
            [header("Digits with endless augmentation"), "```text", *lines, "```", "", took, ""]
        ),
    )
    print("\n".join([*lines, took, f"written: {path.name}"]))


if __name__ == "__main__":
    main()
