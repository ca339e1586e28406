"""The mask op on a GPU: time over that of a copy, against Inductor's loop and other ways.

    python benchmarks/bench_mask_gpu.py

All of a table is interleaved in one process, each call from cold caches. Bandwidth counts what has
to be read and written once; "of copy" is its share of the bandwidth that torch's copy_ reached on
the same bytes. "eager" is the op, with its result from torch's caching allocator; "formula" is what
Inductor makes of the pointwise formula; "compiled" is the op called from a compiled graph.
"""

from __future__ import annotations

import argparse
import time
import types
import warnings
from collections.abc import Callable

import records
import torch
from gpu_timing import gpu, interleave
from harness import header, write_result
from mask_peers import PEERS
from torch import Tensor
from torch._inductor.utils import fresh_cache

from nmfx.kernels import triton
from nmfx.ops import compiled as compiled_ops
from nmfx.ops import sr_ste as op

Call = Callable[[], object]
PATTERNS = ((2, 4), (1, 4), (4, 8), (8, 16), (1, 16), (8, 32), (32, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=8192, help="of the square weight")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    assert triton.why_not(torch.empty(4, 4), 4) is None, triton.why_not(torch.empty(4, 4), 4)
    lines = [header("The mask op on a GPU", gpu()), __doc__.split("\n\n", 2)[2]]
    for part in (forward, backward, convolution, inductor, peers, launches):
        lines += [f"## {part.__doc__.splitlines()[0]}", part(args)]
        print("\n".join(lines[-2:]), flush=True)
    print(write_result("mask", "\n\n".join(lines) + "\n", gpu()))


def measured(args: argparse.Namespace, calls: dict[str, tuple[Call, int]]) -> str:
    """A table. Of the calls, each with the bytes it moves, the first is the copy."""
    with torch.no_grad():
        times = interleave({name: call for name, (call, _) in calls.items()}, args.rounds)
    speed = {name: calls[name][1] / times[name].median / 1e9 for name in calls}  # TB/s
    base = speed[next(iter(calls))]
    rows = [
        [name, f"{times[name].median:.3f}", f"{speed[name]:.2f}", f"{speed[name] / base:.0%}"]
        for name in calls
    ]
    return records.table(["", "ms", "TB/s", "of copy"], rows)


def projecting(
    weight: Tensor, n: int, m: int, dim: int = 1, dtype: torch.dtype | None = None
) -> Call:
    control = op.make_control(2e-4, n, "cuda")
    return lambda: op.project(weight, control, m, dim, dtype)


def forward(args: argparse.Namespace) -> str:
    """Forward, groups along the rows unless it says otherwise."""
    found = []
    for dtype, result in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ):
        weight = torch.randn(args.size, args.size).to(dtype)
        buffer = torch.empty_like(weight, dtype=result)
        moved = weight.nbytes + buffer.nbytes
        name = f"{dtype} to {result}".replace("torch.", "")
        calls = {f"copy, {name}": (lambda b=buffer, w=weight: b.copy_(w), moved)}
        for n, m in PATTERNS:
            calls[f"{n}:{m}"] = (projecting(weight, n, m, 1, result), moved)
        for m in (4, 16):
            calls[f"{m // 2}:{m} along dim 0"] = (projecting(weight, m // 2, m, 0, result), moved)
        found.append(measured(args, calls))
    return "\n\n".join(found)


def backward(args: argparse.Namespace) -> str:
    """Backward: g + lambda * (1 - mask) * w. The copy of the first line is torch.add of g and w."""
    found = []
    weight = torch.randn(args.size, args.size)
    for dtype in (torch.float32, torch.bfloat16):
        grad = torch.randn(args.size, args.size).to(dtype)
        out = torch.empty_like(weight)
        moved = grad.nbytes + 2 * weight.nbytes
        calls = {
            f"g in {dtype}, torch.add": (
                lambda g=grad, o=out: torch.add(weight, g, alpha=2e-4, out=o),
                moved,
            )
        }
        for n, m in PATTERNS:
            control = op.make_control(1e-9, n, "cuda")
            calls[f"{n}:{m}"] = (
                lambda g=grad, c=control, m=m: torch.ops.nmfx.sr_ste_backward(
                    g, weight, c, m, 1, op.ABI
                ),
                moved,
            )
            if dtype == torch.float32:
                calls[f"{n}:{m} in place"] = (
                    lambda g=grad, c=control, m=m: op.add_decay_(g, weight, c, m, 1),
                    moved,
                )
        found.append(measured(args, calls))
    return "\n\n".join(found)


def convolution(args: argparse.Namespace) -> str:
    """Weights of convolutions, 2048 x 2048 x 3 x 3, 2:4 along the channels."""
    found = []
    for format in (torch.contiguous_format, torch.channels_last):
        weight = torch.randn(2048, 2048, 3, 3).contiguous(memory_format=format)
        buffer = weight.clone()
        name = str(format).removeprefix("torch.")
        calls = {
            f"copy, {name}": (lambda b=buffer, w=weight: b.copy_(w), 2 * weight.nbytes),
            "2:4": (projecting(weight, 2, 4), 2 * weight.nbytes),
        }
        found.append(measured(args, calls))
    return "\n\n".join(found)


def inductor(args: argparse.Namespace) -> str:
    """Under torch.compile: Inductor's loop from the formula, against the kernels called from it."""
    weight = torch.randn(args.size, args.size)
    grad = torch.randn(args.size, args.size, dtype=torch.bfloat16)
    buffer = torch.empty_like(grad)
    moved = weight.nbytes + buffer.nbytes
    forwards = {"copy, float32 to bfloat16": (lambda: buffer.copy_(weight), moved)}
    out = torch.empty_like(weight)
    read = grad.nbytes + 2 * weight.nbytes
    backwards = {"torch.add, g in bfloat16": (lambda: torch.add(weight, grad, out=out), read)}
    chosen = compiled_ops.GPU_KERNELS_FROM_M
    for n, m in ((2, 4), (4, 8), (1, 16)):
        control = op.make_control(2e-4, n, "cuda")

        def forward(m: int = m, control: Tensor = control) -> Tensor:
            return torch.ops.nmfx.sr_ste(weight, control, m, 1, op.ABI, torch.bfloat16)

        def backward(m: int = m, control: Tensor = control) -> Tensor:
            return torch.ops.nmfx.sr_ste_backward(grad, weight, control, m, 1, op.ABI)

        for name, least in (("formula", 65), ("compiled", 2)):
            for calls, function, size in ((forwards, forward, moved), (backwards, backward, read)):
                compiled_ops.GPU_KERNELS_FROM_M = least
                call = torch.compile(own_code(function, f"{name}_{m}"), fullgraph=True)
                with fresh_cache(), torch.no_grad():
                    call()
                calls[f"{n}:{m} {function.__name__}, {name}"] = (call, size)
    compiled_ops.GPU_KERNELS_FROM_M = chosen
    return "\n\n".join([measured(args, forwards), measured(args, backwards)])


def own_code(function: Call, name: str) -> Call:
    """The same function with a code object of its own: what is compiled for one is not shared."""
    code = function.__code__.replace(co_name=name)
    parts = (function.__globals__, name, function.__defaults__, function.__closure__)
    return types.FunctionType(code, *parts)


def peers(args: argparse.Namespace) -> str:
    """Other ways to find the mask, 4096 x 4096 float32, 2:4."""
    weight = torch.randn(4096, 4096)
    buffer = torch.empty_like(weight)
    moved = 2 * weight.nbytes
    calls = {
        "copy": (lambda: buffer.copy_(weight), moved),
        "nmfx": (projecting(weight, 2, 4), moved),
    }
    for name, make in PEERS.items():
        call = make(weight.clone(), 2, 4)
        if call is not None:
            calls[name] = (call, moved)
    return measured(argparse.Namespace(rounds=5), calls)


def launches(args: argparse.Namespace) -> str:
    """What a call costs the host, 64 x 64: microseconds without waiting for the GPU."""
    weight = torch.randn(64, 64)
    buffer = torch.empty_like(weight)
    control = op.make_control(2e-4, 2, "cuda")
    calls: dict[str, Call] = {
        "copy_": lambda: buffer.copy_(weight),
        "torch.clone": weight.clone,
        "nmfx": lambda: op.project(weight, control, 4, 1),
        "nmfx backward in place": lambda: op.add_decay_(buffer, weight, control, 4, 1),
    }
    rows = []
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            call()
        rows.append([name, f"{(time.perf_counter() - start) / 500 * 1e6:.1f}"])
        torch.cuda.synchronize()
    return records.table(["", "us"], rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
