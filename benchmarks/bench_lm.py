"""The study of `--task lm` as a result file: dense, STE and SR-STE on a byte-level GPT.

    python benchmarks/bench_lm.py [--seeds 5]

Takes the options of `python -m nmfx demo`.
"""

from __future__ import annotations

import argparse
import io
import time

from harness import header, write_result
from rich.console import Console

from nmfx.demo.command import add_options
from nmfx.demo.lm.options import make_plan
from nmfx.demo.lm.study import reports, run_study
from nmfx.demo.lm.table import print_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    plan = make_plan(parser.parse_args())
    text = io.StringIO()
    text.write("\n\n".join([*reports(plan), ""]))
    start = time.perf_counter()
    study = run_study(plan)
    seconds = time.perf_counter() - start
    print_study(study, Console(file=text, width=100, highlight=False))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    took = f"Training took {seconds:.0f} s in {plan.workers} processes, compilation included."
    path = write_result(
        "lm",
        "\n".join(
            [header("A byte-level GPT on Python's source"), "```text", *lines, "```", "", took, ""]
        ),
    )
    print("\n".join([*lines, took, f"written: {path.name}"]))


if __name__ == "__main__":
    main()
