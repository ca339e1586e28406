"""What nmfx.Monitor costs while a model trains on the CPU.

    python benchmarks/bench_monitor.py --threads 2

Each model trains for some time with a monitor of default settings (as many measurements as fit in
2 % of the time). "share" is the time inside `monitor.step()` over all of it, "ms each" what a
measurement takes, "steps between" how often there is one, "MB" the masks that it keeps.
"""

from __future__ import annotations

import argparse
import time

import records
import torch
from harness import header, write_result
from train_models import CPU_MODELS

import nmfx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(CPU_MODELS), choices=CPU_MODELS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="tiny models: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models:
        rows.append([name, *measure(name, args)])
        print(rows[-1], flush=True)
    head = ["model", "steps", "ms a step", "measured", "ms each", "steps between", "share", "MB"]
    lines = [header("Monitor"), __doc__.split("\n\n", 2)[2], records.table(head, rows)]
    print("\n\n".join(lines[2:]))
    if not args.quick:
        print(write_result("monitor", "\n\n".join(lines) + "\n"))


def measure(name: str, args: argparse.Namespace) -> list[str]:
    torch.manual_seed(0)
    model, inputs, loss_of, optimizer_of = CPU_MODELS[name](args.quick)
    nmfx.sparsify(model, "2:4")
    optimizer = optimizer_of(model.parameters())
    monitor = nmfx.Monitor(model)
    steps, measured, inside = 0, [], 0.0
    begin = time.perf_counter()
    while time.perf_counter() - begin < args.seconds or not measured:
        optimizer.zero_grad()
        loss_of(model(*inputs)).backward()
        optimizer.step()
        steps += 1
        before = time.perf_counter()
        found = monitor.step()
        took = time.perf_counter() - before
        inside += took
        if found:
            measured.append(took)
    whole = time.perf_counter() - begin
    state = monitor.state_dict()
    masks = {id(t): t.nbytes for key in ("start", "latest") for t in state[key].values()}
    return [
        str(steps),
        f"{1000 * (whole - inside) / steps:.1f}",
        str(len(measured)),
        f"{1000 * sum(measured) / len(measured):.1f}",
        f"{steps / len(measured):.1f}",
        f"{inside / whole:.2%}",
        f"{sum(masks.values()) / 1e6:.1f}",
    ]


if __name__ == "__main__":
    main()
