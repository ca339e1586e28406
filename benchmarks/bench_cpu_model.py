"""Whole models on the CPU: nmfx.lower against the folded dense model in torch and other engines.

    python benchmarks/bench_cpu_model.py --threads 1 --models gpt2-8-rows --jsonl gpt2.jsonl

Weights are random, masked by magnitude (nmfx.sparsify, nmfx.fold). All candidates of a line are
interleaved; they share no weights but eager and the compiled model before freezing. llama-1-token
is one token without a key-value cache: its linear layers, not its attention.
"""

from __future__ import annotations

import argparse
import gc
import re
import warnings

import records
import torch
from models import MODELS, prepare
from peers import Call, Unavailable, build, check
from timing import interleave
from torch import nn

import nmfx

TORCH = ("eager", "compile", "max-autotune")
ENGINES = ("onnxruntime", "openvino", "deepsparse")
OURS = ("nmfx eager", "nmfx compile", "nmfx max-autotune")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--peers", nargs="+", default=[*TORCH, *ENGINES])
    records.add_options(parser)
    args = parser.parse_args()
    found = records.read(args.from_jsonl) if args.from_jsonl else measure(args)
    body = tables(found)
    records.write("cpu_model", "Whole models on the CPU", body, found, __doc__)


def measure(args: argparse.Namespace) -> list[records.Record]:
    if args.quick:
        args.rounds, args.min_time = 3, 0.002
    writer = records.Writer(args.jsonl)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.models:
            for dtype in MODELS[name][1]:
                for pattern in args.patterns:
                    cell = {"dtype": dtype, "threads": threads, "model": name, "pattern": pattern}
                    cell |= records.quick_mark(args)
                    if not writer.has(cell):
                        print(cell, flush=True)
                        writer.add(cell, **measure_cell(cell, args))
                        gc.collect()
    return writer.records


def measure_cell(cell: records.Record, args: argparse.Namespace) -> records.Record:
    model, x = prepare(cell["model"], cell["dtype"], args.quick)
    dense = nmfx.fold(nmfx.sparsify(model, cell["pattern"]), inplace=True)
    calls: dict[str, Call] = {}
    na, notes, share = {}, {}, None

    def add(name: str, peer: str, module: nn.Module) -> None:
        try:
            call, note = build(peer, module, (x,), cell["threads"])
            check(call, expected, x.dtype)
            calls[name] = call
            if note:
                notes[name] = note
        except Unavailable as reason:
            na[name] = str(reason)

    with torch.no_grad():
        expected = dense(x)
        for peer in args.peers:
            add(peer, peer, dense)
        try:
            ours = nmfx.lower(dense, (x,))
            share = packed_share(ours)
            for peer in [peer for peer in args.peers if peer in TORCH]:
                add(f"nmfx {peer}", peer, ours)
        except nmfx.NMError as error:
            na["nmfx"] = str(error)
        timed = interleave(calls, args.rounds, args.min_time)
    times = {name: t._asdict() for name, t in timed.items()}
    return {"times": times, "na": na, "notes": notes, "share": share}


def packed_share(model: nn.Module) -> str | None:
    """Of the multiply-adds of the N:M layers, as the report says it: "93%"."""
    for note in nmfx.report(model).notes:
        found = re.match(r"packed kernels carry (\d+%) of the multiply-adds", note)
        if found:
            return found[1]
    return None


def tables(found: list[records.Record]) -> str:
    names = [*TORCH, *ENGINES, *OURS]
    lines = []
    for record in found:
        times = {name: t["median"] for name, t in record["times"].items()}
        cell = record["cell"]
        line = [cell["model"], cell["dtype"], str(cell["threads"]), cell["pattern"]]
        line += [f"{times[name]:.2f}" if name in times else "n/a" for name in names]
        ours = min((times[name] for name in OURS if name in times), default=None)
        for group in (TORCH, (*TORCH, *ENGINES)):
            best = min((times[name] for name in group if name in times), default=None)
            line.append("n/a" if ours is None or best is None else f"{best / ours:.2f}")
        for name in TORCH:
            both = name in times and f"nmfx {name}" in times
            line.append(f"{times[name] / times[f'nmfx {name}']:.2f}" if both else "n/a")
        lines.append([*line, record.get("share") or "n/a"])
    head = ["model", "dtype", "threads", "pattern", *names]
    head += ["best nmfx x best torch", "x best of all", *(f"{name} x {name}" for name in TORCH)]
    head.append("packed")
    text = (
        "Milliseconds per forward, median. The three columns before the last compare like with "
        "like: torch eager with nmfx eager, and so on. Packed: the share of the multiply-adds of "
        "the N:M layers, counted dense, that packed kernels carry."
    )
    why = "## Not available, and what the compiled code calls"
    return "\n\n".join([text, records.table(head, lines), why, records.reasons(found)])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
