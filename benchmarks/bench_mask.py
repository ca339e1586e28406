"""The mask op on the CPU: time over that of a copy, against other ways to find the mask.

    python benchmarks/bench_mask.py --threads 1 2

All of a table is interleaved in one process. A pass: the time over that of torch's copy_ from the
same weight into a buffer that exists. "nmfx" is the op as training calls it, with its result in
memory of its own: from the pool that the freed result of an earlier call went to.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import records
import torch
from harness import header, write_result
from mask_peers import PEERS
from timing import Timing, interleave
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import nmfx
from nmfx.ops import compiled as compiled_ops
from nmfx.ops import sr_ste as op
from nmfx.ops.keep import keep_, project_kept

Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=4096, help="of the square weight")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--min-time", type=float, default=0.1, help="seconds per round")
    parser.add_argument("--quick", action="store_true", help="small and short: does it run?")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS])
    args = parser.parse_args()
    if args.quick:
        args.size, args.rounds, args.min_time = 256, 3, 0.002
    lines = [header("The mask op"), __doc__.split("\n\n", 2)[2]]
    for part in PARTS:
        if args.parts and part.__name__ not in args.parts:
            continue
        for threads in args.threads:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            lines += [f"## {part.__doc__.splitlines()[0]} Threads: {threads}", part(args)]
            print("\n".join(lines[-2:]), flush=True)
    if not args.quick and not args.parts:
        print(write_result("mask", "\n\n".join(lines) + "\n"))


def run(args: argparse.Namespace, calls: dict[str, Call]) -> dict[str, Timing]:
    with torch.no_grad():
        return interleave(calls, args.rounds, args.min_time)


def passes(times: dict[str, Timing], unit: str) -> str:
    """A table of milliseconds and of ratios to the candidate `unit`."""
    of = times[unit].median
    rows = [[name, f"{t.median:.3f}", f"{t.median / of:.2f}"] for name, t in times.items()]
    return records.table(["", "ms", f"/ {unit}"], rows)


def blank(tables: Iterable[str]) -> str:
    return "\n\n".join(tables)


def weight_of(args: argparse.Namespace) -> Tensor:
    return torch.randn(args.size, args.size)


def native(weight: Tensor, n: int, m: int, dim: int = 1, dtype: torch.dtype | None = None) -> Call:
    control = op.make_control(2e-4, n)
    return lambda: op.project(weight, control, m, dim, dtype)


def forward(args: argparse.Namespace) -> str:
    """Forward, float32, groups along the rows."""
    weight, buffer = weight_of(args), weight_of(args)
    calls: dict[str, Call] = {"copy": lambda: buffer.copy_(weight)}
    for n, m in ((2, 4), (1, 4), (4, 8), (1, 8), (8, 16), (1, 16), (8, 32), (32, 64)):
        calls[f"nmfx {n}:{m}"] = native(weight, n, m)
    calls["nmfx 2:4 along dim 0"] = native(weight, 2, 4, 0)
    found = [passes(run(args, calls), "copy")]
    if args.skip_peers:
        return blank(found)
    args = argparse.Namespace(**vars(args) | {"rounds": min(args.rounds, 5)})
    for n, m in ((2, 4), (4, 8), (8, 16)):
        calls = {"copy": lambda: buffer.copy_(weight), f"nmfx {n}:{m}": native(weight, n, m)}
        for name, make in PEERS.items():
            call = make(weight.clone(), n, m)
            if call is not None:
                calls[name] = call
        times = run(args, calls)
        best = min(times[name].median for name in times if name in PEERS)
        ours = times[f"nmfx {n}:{m}"].median
        found += [passes(times, "copy"), f"Fastest of the others / nmfx: {best / ours:.0f}"]
    return blank(found)


def backward(args: argparse.Namespace) -> str:
    """Backward, float32: three streams are torch.add of g and w into a third buffer."""
    weight, grad, buffer = (weight_of(args) for _ in range(3))
    calls: dict[str, Call] = {
        "copy": lambda: buffer.copy_(weight),
        "three streams": lambda: torch.add(grad, weight, alpha=2e-4, out=buffer),
        "two streams in place": lambda: grad.add_(weight, alpha=1e-9),
    }
    for n, m in ((2, 4), (4, 8), (8, 16), (8, 32)):
        control = op.make_control(1e-9, n)
        calls[f"nmfx {n}:{m}"] = lambda control=control, m=m: torch.ops.nmfx.sr_ste_backward(
            grad, weight, control, m, 1, op.ABI
        )
        calls[f"nmfx {n}:{m} in place"] = lambda control=control, m=m: op.add_decay_(
            grad, weight, control, m, 1
        )
    return passes(run(args, calls), "three streams")


def dtypes(args: argparse.Namespace) -> str:
    """Other dtypes, 2:4: each over a copy in that dtype."""
    found = []
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        weight = weight_of(args).to(dtype)
        buffer = weight.clone()
        calls = {"copy": lambda b=buffer, w=weight: b.copy_(w), "nmfx": native(weight, 2, 4)}
        times = run(args, calls)
        found.append([str(dtype), *ratio(times, "nmfx", "copy")])
    weight = weight_of(args)
    narrow = weight.bfloat16()
    calls = {"copy": lambda: narrow.copy_(weight), "nmfx": native(weight, 2, 4, 1, torch.bfloat16)}
    found.append(["float32 masked and cast to bfloat16", *ratio(run(args, calls), "nmfx", "copy")])
    return records.table(["", "copy ms", "nmfx ms", "/ copy"], found)


def ratio(times: dict[str, Timing], name: str, unit: str) -> list[str]:
    ours, base = times[name].median, times[unit].median
    return [f"{base:.3f}", f"{ours:.3f}", f"{ours / base:.2f}"]


def convolution(args: argparse.Namespace) -> str:
    """Weights of convolutions, 512 x 512 x 3 x 3, 2:4 along the channels.

    One weight again and again, which stays in a cache of 32 MB; and eight in turn, as training
    meets them, which do not.
    """
    channels = 64 if args.quick else 512
    found = []
    for name, format in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        for count in (1, 8):
            weights = [
                torch.randn(channels, channels, 3, 3).contiguous(memory_format=format)
                for _ in range(count)
            ]
            buffer = weights[0].clone()
            calls = {
                "copy": in_turn([lambda b=buffer, w=w: b.copy_(w) for w in weights]),
                "nmfx": in_turn([native(w, 2, 4) for w in weights]),
            }
            found.append([name, str(count), *ratio(run(args, calls), "nmfx", "copy")])
    return records.table(["", "weights", "copy ms", "nmfx ms", "/ copy"], found)


def in_turn(calls: list[Call]) -> Call:
    """One call after the other, and again from the first."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


def allocation(args: argparse.Namespace) -> str:
    """One op with allocation: results are freed before the next call."""
    weight, control = weight_of(args), op.make_control(2e-4, 2)
    buffer = torch.empty_like(weight)
    leaf = weight.clone().requires_grad_()
    calls: dict[str, Call] = {
        "copy into a buffer": lambda: buffer.copy_(weight),
        "torch.clone": lambda: weight.clone(),
        "nmfx": lambda: op.project(weight, control, 4, 1),
        "nmfx.sr_ste with autograd": with_grad(lambda: op.sr_ste(leaf, control, 4, 1)),
    }
    times = run(args, calls)
    rows = [[name, f"{times[name].median:.3f}", faults(call)] for name, call in calls.items()]
    return records.table(["", "ms", "page faults a call"], rows)


def fixed(args: argparse.Namespace) -> str:
    """A fixed mask (nmfx.freeze), float32: one select."""
    weight, grad, buffer = (weight_of(args) for _ in range(3))
    mask = nmfx.nm_mask(weight, "2:4")
    calls: dict[str, Call] = {
        "copy": lambda: buffer.copy_(weight),
        "nmfx": lambda: project_kept(weight, mask),
        "nmfx, gradient in place": lambda: keep_(grad, mask),
        "torch.where": lambda: torch.where(mask, weight, 0.0),
    }
    return passes(run(args, calls), "copy")


def with_grad(call: Call) -> Call:
    def run() -> object:
        with torch.enable_grad():
            return call()

    return run


def faults(call: Call) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        call()
    return f"{(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10:.0f}"


def small(args: argparse.Namespace) -> str:
    """Small weights, and what a sparse layer's call costs over a dense one's (microseconds)."""
    weight, x = torch.randn(64, 64), torch.randn(8, 64)
    dense = nn.Linear(64, 64)
    sparse = nmfx.sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), {"0": "2:4"})[0]
    control = op.make_control(2e-4, 2)
    # Without what `apply` does for torch.func, as nmfx/ops/masked.py calls its own.
    nothing, saving = (super(torch.autograd.Function, f).apply for f in (Nothing, Saving))
    calls: dict[str, Call] = {
        "op, 64 x 64": lambda: op.project(weight, control, 4, 1),
        "a torch.autograd.Function that does nothing": with_grad(
            lambda: nothing(x, dense.weight, control)
        ),
        "the same, which saves three tensors": with_grad(lambda: saving(x, dense.weight, control)),
        "dense layer, no_grad": lambda: dense(x),
        "sparse layer, no_grad": lambda: sparse(x),
        "dense layer": with_grad(lambda: dense(x)),
        "sparse layer": with_grad(lambda: sparse(x)),
        "dense, forward and backward": with_grad(lambda: dense(x).backward(x)),
        "sparse, forward and backward": with_grad(lambda: sparse(x).backward(x)),
    }
    times = run(args, calls)
    rows = [[name, f"{t.median * 1e3:.1f}"] for name, t in times.items()]
    return records.table(["", "us"], rows)


class Nothing(torch.autograd.Function):
    """What a node of autograd in Python costs at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, control: Tensor) -> Tensor:
        return x.detach()


class Saving(torch.autograd.Function):
    """The same for one that needs its inputs in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, control: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, control)
        return x.detach()


def inductor(args: argparse.Namespace) -> str:
    """Under torch.compile: the formula that Inductor fuses, against the kernels it may call.

    A gradient is made by the graph (here by an addition into fresh memory), as in training.
    """
    weight, grad, buffer = (weight_of(args) for _ in range(3))
    copy: dict[str, Call] = {"copy": lambda: buffer.copy_(weight)}
    add: dict[str, Call] = {"g = add": torch.compile(lambda: grad + weight)}
    chosen = compiled_ops._outruns_inductor
    for n, m in ((2, 4), (4, 8), (1, 16)):
        control = op.make_control(2e-4, n)

        def forward(m: int = m, control: Tensor = control) -> Tensor:
            return op.sr_ste(weight, control, m, 1)

        def backward(m: int = m, control: Tensor = control) -> Tensor:
            return torch.ops.nmfx.sr_ste_backward(grad + weight, weight, control, m, 1, op.ABI)

        for name, choice in (("formula", lambda weight, m: False), ("kernels", chosen)):
            for calls, function in ((copy, forward), (add, backward)):
                compiled_ops._outruns_inductor = choice
                # Two of a code object would share what was compiled first.
                call = torch.compile(own_code(function, f"{name}_{m}"), fullgraph=True)
                with fresh_cache(), torch.no_grad():
                    call()
                calls[f"{n}:{m} {function.__name__}, {name}"] = call
    compiled_ops._outruns_inductor = chosen
    return blank([passes(run(args, copy), "copy"), passes(run(args, add), "g = add")])


def own_code(function: Call, name: str) -> Call:
    """The same function with a code object of its own."""
    code = function.__code__.replace(co_name=name)
    parts = (function.__globals__, name, function.__defaults__, function.__closure__)
    return types.FunctionType(code, *parts)


PARTS = (forward, backward, dtypes, convolution, allocation, fixed, small, inductor)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
