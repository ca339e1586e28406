"""Packed convolutions on the CPU against dense ones: the layers of ResNet-50.

    python benchmarks/bench_cpu_conv.py --threads 1 --jsonl conv_1.jsonl

Every distinct convolution of ResNet-50 but the stem, alone (with bias, as after folding the batch
norm; --relu adds the ReLU), weights masked by magnitude along the input channels. One layer per
candidate: its weights stay in the cache where they fit, as do those of every other candidate.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from statistics import geometric_mean

import records
import torch
from peers import DENSE, Call, Unavailable, build, check, packed_conv
from resnet import conv_layers
from timing import interleave
from torch import nn

import nmfx

PEERS = ("eager", "compile", "max-autotune", "onednn", "onnxruntime", "openvino", "deepsparse")
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "2:8", "1:16"])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--relu", action="store_true", help="a ReLU after each convolution")
    records.add_options(parser)
    args = parser.parse_args()
    found = records.read(args.from_jsonl) if args.from_jsonl else measure(args)
    body = tables(found)
    records.write("cpu_conv", "Packed convolutions on the CPU", body, found, __doc__)


def measure(args: argparse.Namespace) -> list[records.Record]:
    torch.manual_seed(0)
    layers = conv_layers()
    if args.quick:
        layers = dict(list(layers.items())[-2:])
        args.batches, args.rounds, args.min_time = [1], 3, 0.002
    writer = records.Writer(args.jsonl)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batches:
            for form in args.formats:
                for text, (conv, side) in layers.items():
                    cell = {"dtype": "fp32", "threads": threads, "batch": batch, "format": form,
                            "layer": text, "relu": args.relu}  # fmt: skip
                    cell |= records.quick_mark(args)
                    if not writer.has(cell):
                        print(cell, flush=True)
                        writer.add(cell, **measure_cell(cell, conv, side, args))
    return writer.records


def measure_cell(
    cell: records.Record, conv: nn.Conv2d, side: int, args: argparse.Namespace
) -> records.Record:
    form, threads = FORMATS[cell["format"]], cell["threads"]
    x = torch.randn(cell["batch"], conv.in_channels, side, side).to(memory_format=form)
    calls: dict[str, Call] = {}
    na, notes = {}, {}
    modules = {p: _module(conv, p, cell["relu"]).to(memory_format=form) for p in args.patterns}
    for peer in args.peers:
        for pattern in args.patterns if peer == "deepsparse" else args.patterns[:1]:
            name = f"{peer} {pattern}" if peer == "deepsparse" else peer
            module = modules[pattern]
            try:
                call, note = build(peer, module, (x,), threads)
                check(call, module(x), x.dtype)
                calls[name] = call
                if note:
                    notes[name] = note
            except Unavailable as reason:
                na[name] = str(reason)
    for pattern, module in modules.items():
        try:
            layer = packed_conv(module[0], pattern)
            call = _with_relu(layer, x) if cell["relu"] else (lambda layer=layer: layer(x))
            check(call, module(x), x.dtype)
            calls[f"nmfx {pattern}"] = call
        except (NotImplementedError, nmfx.NMError, Unavailable) as reason:
            na[f"nmfx {pattern}"] = str(reason)
    with torch.no_grad():
        timed = interleave(calls, args.rounds, args.min_time)
    return {"times": {n: t._asdict() for n, t in timed.items()}, "na": na, "notes": notes}


def _with_relu(layer: Call, x: torch.Tensor) -> Call:
    return lambda: layer(x).relu_()


def _module(conv: nn.Conv2d, pattern: str, relu: bool) -> nn.Sequential:
    layer = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                      conv.padding)  # fmt: skip
    weight = conv.weight.detach()
    weight = torch.where(nmfx.nm_mask(weight, pattern, dim=1), weight, 0.0)
    layer.weight = nn.Parameter(copy.deepcopy(weight))
    module = nn.Sequential(layer, *([nn.ReLU()] if relu else [])).eval()
    return module.requires_grad_(False)


def tables(found: list[records.Record]) -> str:
    parts = []
    keys = {(r["cell"]["threads"], r["cell"]["batch"], r["cell"]["format"]): None for r in found}
    for key in keys:
        lines = []
        for r in found:
            c = r["cell"]
            if (c["threads"], c["batch"], c["format"]) == key:
                lines += _lines(r)
        head = ["layer", "pattern", "best dense ms", "peer", "nmfx ms", "x best dense",
                "OpenVINO ms", "DeepSparse ms"]  # fmt: skip
        parts += ["## threads {}, batch {}, {}".format(*key), records.table(head, lines)]
    parts += ["## Geometric means", summary(found)]
    parts += ["## Not available, and what the compiled code calls", records.reasons(found)]
    return "\n\n".join(parts)


def summary(found: list[records.Record]) -> str:
    """How many times as fast as each kind of peer: geometric mean over the layers (the least)."""
    ratios: dict[tuple[str, ...], list[list[float]]] = {}
    for r in found:
        c = r["cell"]
        times = {name: t["median"] for name, t in r["times"].items()}
        for name in [n for n in times if n.startswith("nmfx ")]:
            pattern = name.split()[1]
            key = (str(c["threads"]), str(c["batch"]), c["format"], pattern)
            columns = ratios.setdefault(key, [[], [], []])
            peers = [[n for n in DENSE if n in times], ["openvino"], [f"deepsparse {pattern}"]]
            for column, names in zip(columns, peers, strict=True):
                column += [min(times[n] for n in names) / times[name]] if names[0] in times else []
    head = ["threads", "batch", "format", "pattern", "x best dense", "x OpenVINO", "x DeepSparse"]
    return records.table(head, [[*key, *map(_mean, cols)] for key, cols in ratios.items()])


def _mean(values: list[float]) -> str:
    return f"{geometric_mean(values):.2f} ({min(values):.2f})" if values else "n/a"


def _lines(record: records.Record) -> list[list[str]]:
    times = {name: t["median"] for name, t in record["times"].items()}
    peer = min((n for n in DENSE if n in times), key=times.__getitem__)
    names = [*times, *record["na"]]
    lines = []
    for pattern in dict.fromkeys(n.split()[1] for n in names if n.startswith("nmfx ")):
        ours = times.get(f"nmfx {pattern}")
        others = [times.get("openvino"), times.get(f"deepsparse {pattern}")]
        lines.append([record["cell"]["layer"], pattern, f"{times[peer]:.3f}", peer, _ms(ours),
                      "n/a" if ours is None else f"{times[peer] / ours:.2f}",
                      *map(_ms, others)])  # fmt: skip
    return lines


def _ms(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
