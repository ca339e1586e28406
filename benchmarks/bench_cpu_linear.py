"""Packed linear layers on the CPU against dense ones and other engines, weights cold.

    python benchmarks/bench_cpu_linear.py --threads 1 --dtypes fp32 --jsonl fp32_1.jsonl
    python benchmarks/bench_cpu_linear.py --from-jsonl fp32_1.jsonl --chart speedup.png

Each candidate is a list of copies of one layer with different weights; one call is one pass over
all of them, and the times are per layer. Each candidate, dense or packed, has as many copies as
fill 160 MB, or four last-level caches if `--cold-mb` allows that: so no weight is in a cache when
its turn comes. Where the system reports a cache larger than that (its share of a large machine is
not known), the list at the end says how fast so many bytes are read, and ten times as many. All
patterns and peers of a cell are interleaved. Weights are masked by magnitude; the peers that cannot
see zeros are timed once, with the mask of the first pattern, DeepSparse once per pattern.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linear_tables
import records
import torch
from peers import DENSE, Call, Unavailable, build, check, packed_linear
from timing import interleave, last_level_cache
from torch import Tensor, nn

import nmfx
from nmfx.packing import packed_bytes

SHAPES = ("4096x4096", "11008x4096", "4096x11008", "3072x768", "1024x1024")  # out x in
PEERS = (*DENSE, "onnxruntime", "openvino", "deepsparse")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MB = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128, 512])
    parser.add_argument(
        "--patterns", nargs="+", default=["2:4", "4:8", "1:4", "2:8", "1:8", "1:16"]
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--cold-mb", type=int, default=160, help="most MB that a candidate cycles")
    parser.add_argument("--chart", type=Path, help="write the speed-ups as a figure")
    records.add_options(parser)
    args = parser.parse_args()
    found = records.read(args.from_jsonl) if args.from_jsonl else measure(args)
    body = "\n\n".join([linear_tables.tables(found), linear_tables.summary(found)])
    records.write("cpu_linear", "Packed linear layers on the CPU", body, found, __doc__)
    if args.chart:
        linear_tables.chart(found, args.chart)


def measure(args: argparse.Namespace) -> list[records.Record]:
    if args.quick:
        args.shapes, args.rows, args.rounds, args.min_time = ["256x512"], [1, 8], 3, 0.002
    writer = records.Writer(args.jsonl)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtypes:
            for shape in args.shapes:
                for rows in args.rows:
                    cell = {"dtype": dtype, "threads": threads, "shape": shape, "rows": rows}
                    cell |= records.quick_mark(args)
                    if not writer.has(cell):
                        print(cell, flush=True)
                        writer.add(cell, **measure_cell(cell, args))
                        gc.collect()
    return writer.records


def measure_cell(cell: records.Record, args: argparse.Namespace) -> records.Record:
    out, columns = map(int, cell["shape"].split("x"))
    dtype, threads = DTYPES[cell["dtype"]], cell["threads"]
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    x = torch.randn(cell["rows"], columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = {p: masked(weight, p).to(dtype) for p in args.patterns}
    bias = torch.linspace(-1, 1, out).to(dtype)
    cold = min(max(160, 4 * last_level_cache() / MB), args.cold_mb) * MB
    copies = 2 if args.quick else math.ceil(cold / (weight.numel() * dtype.itemsize))
    calls: dict[str, Call] = {}
    counts, na, notes = {}, {}, {} if args.quick else dict(cold_reads(cold, threads))

    def add(name: str, count: int, make: Callable[[int], tuple[Call, str]], at: Tensor) -> None:
        try:
            built = [make(number) for number in range(count)]
            check(built[0][0], nn.functional.linear(x, at, bias), dtype)
            calls[name], counts[name] = one_pass([call for call, _ in built]), count
            if built[0][1]:
                notes[name] = built[0][1]
        except Unavailable as reason:
            na[name] = str(reason)

    def layer(pattern: str, number: int) -> nn.Module:
        return linear(weights[pattern] * scale(number), bias)

    first = args.patterns[0]
    dense = [layer(first, number) for number in range(copies)]
    for peer in args.peers:
        for pattern in args.patterns if peer == "deepsparse" else [first]:
            name = f"{peer} {pattern}" if peer == "deepsparse" else peer
            modules = dense if pattern == first else [layer(pattern, i) for i in range(copies)]
            add(name, copies, lambda i, p=peer, m=modules: build(p, m[i], (x,), threads),
                weights[pattern])  # fmt: skip
    for pattern in args.patterns:
        size = packed_bytes(out, columns, nmfx.Pattern.parse(pattern), dtype.itemsize)
        count = 3 if args.quick else math.ceil(cold / size)
        at, scales = weights[pattern], [scale(number) for number in range(count)]
        try:
            layers = packed_linear(at, bias, pattern, scales)
        except (NotImplementedError, nmfx.NMError) as error:
            na[f"nmfx {pattern}"] = str(error)
            continue
        add(f"nmfx {pattern}", count, lambda i, m=layers: (lambda: m[i](x), ""), at)
    with torch.no_grad():
        timed = interleave(calls, args.rounds, args.min_time)
    times = {
        name: {"median": t.median / counts[name], "min": t.min / counts[name], "rounds": t.rounds}
        for name, t in timed.items()
    }
    return {"times": times, "copies": counts, "na": na, "notes": notes}


def masked(weight: Tensor, pattern: str) -> Tensor:
    return torch.where(nmfx.nm_mask(weight, pattern), weight, 0.0)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta").eval()
    layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return layer


def scale(number: int) -> float:
    """Of the weights of a copy: engines may share equal weights, so no two copies are equal."""
    return 1 + number / 64


@functools.cache
def cold_reads(size: float, threads: int) -> dict[str, str]:
    """A note on whether `size` bytes are read as slowly as ten times as many; once per process."""
    if size >= 4 * last_level_cache():
        return {}

    def speed(count: float) -> float:
        data = torch.ones(int(count) // 4)
        return count / 1e6 / interleave({"": data.sum}, 5, 0.1)[""].min

    text = f"{speed(size):.0f} GB/s, {10 * size / MB:.0f} MB: {speed(10 * size):.0f} GB/s"
    name = f"reading {size / MB:.0f} MB with {threads} threads"
    return {name: f"{text}; cache reported: {last_level_cache() / MB:.0f} MB"}


def one_pass(calls: list[Call]) -> Callable[[], Any]:
    def run() -> None:
        for call in calls:
            call()

    return run


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # exporters and Inductor warn about themselves
    main()
