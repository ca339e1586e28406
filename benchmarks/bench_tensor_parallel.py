"""A tensor-parallel model on the CPU, dense against lowered: two gloo processes of one thread.

    python benchmarks/bench_tensor_parallel.py

Blocks of two linear layers (4096 to 11008 by rows, back by columns), cut by `parallelize_module`.
Each rank has half of every weight; what ranks send each other is the same in all candidates. Dense
is the folded model: eager, and compiled by `torch.compile`. Each rank lowered its parts by its own
measurements; "packed" says how many it packed. All candidates are run in turn, as often on each
rank; the times are medians of rank 0, per forward of all blocks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import records
import torch
import torch.distributed as dist
import torch.multiprocessing
from harness import header, write_result
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import nmfx

RANKS = 2


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny: does it work? Not a timing")
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.width, args.inner, args.rounds = 1, 64, 128, 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, args), nprocs=RANKS)
        found = torch.load(f"{folder}/found.pt")
    head = ["rows", "pattern", "dense eager ms", "dense compiled ms", "lowered ms"]
    head += ["lowered, compiled ms", "x eager", "x compiled", "packed"]
    lines = [header("Tensor parallelism"), __doc__.split("\n\n", 2)[2], records.table(head, found)]
    print("\n\n".join(lines[2:]))
    if not args.quick:
        print(write_result("tensor_parallel", "\n\n".join(lines) + "\n"))


def work(rank: int, folder: str, args: argparse.Namespace) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    torch.set_num_threads(1)
    found = [line for rows in args.rows for line in measure(rows, args)]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def measure(rows: int, args: argparse.Namespace) -> list[list[str]]:
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    x = torch.randn(rows, args.width)
    lines = []
    for pattern in args.patterns:
        blocks = [Block(args.width, args.inner) for _ in range(args.blocks)]
        model = nmfx.sparsify(nn.Sequential(*blocks), dict.fromkeys(("*.up", "*.down"), pattern))
        for block in model:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        dense = nmfx.fold(model, inplace=True).eval()
        fast = nmfx.lower(dense, (x,))
        torch.testing.assert_close(fast(x), dense(x), rtol=1e-3, atol=1e-4)
        candidates: dict[str, Any] = {"dense": dense, "lowered": fast}
        candidates |= {f"{name} compiled": torch.compile(one) for name, one in candidates.items()}
        ms = interleaved({name: lambda one=one: one(x) for name, one in candidates.items()}, args)
        layers = [row for row in nmfx.report(fast) if row.pattern is not None]
        packed = sum(row.state == "packed" for row in layers)
        times = [ms[k] for k in ("dense", "dense compiled", "lowered", "lowered compiled")]
        ratios = [times[0] / times[2], times[1] / times[3]]
        numbers = [f"{value:.2f}" for value in (*times, *ratios)]
        lines.append([str(rows), pattern, *numbers, f"{packed} of {2 * args.blocks}"])
        if dist.get_rank() == 0:
            print(lines[-1], flush=True)
    return lines


def interleaved(candidates: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Medians in ms; every rank runs each candidate equally often."""
    for run in candidates.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(args.rounds):
        for name, run in candidates.items():
            dist.barrier()
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
