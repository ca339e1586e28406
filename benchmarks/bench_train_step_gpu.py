"""Training steps on one GPU, bf16 autocast: a model that nmfx.sparsify made N:M and the dense one.

    python benchmarks/bench_train_step_gpu.py --models llama-1b vit-l

A step is forward, loss and backward under autocast, and AdamW (fused). Both models start from the
same weights and take turns in one process; time is between events on the GPU. "eager" runs as it
is, "layers" compiles each block of the model by itself (torch's regional compilation), "whole"
compiles the model. Memory is the peak that a step allocates beyond what the two models hold.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable

import records
import torch
from gpu_timing import gpu
from harness import header, write_result
from torch import Tensor, nn
from train_models import GPU_MODELS

import nmfx
from nmfx.ops import compiled as compiled_ops

Step = Callable[[], None]
MODES = ("eager", "layers", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(GPU_MODELS), choices=GPU_MODELS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--kernels-from-m", type=int, nargs="+", help="see nmfx/ops/compiled.py")
    parser.add_argument("--profile", action="store_true", help="also which kernels take the time")
    parser.add_argument("--device", default="cuda", help="another: tiny models, does it run?")
    args = parser.parse_args()
    lines = [header("Training steps on a GPU", gpu() if args.device == "cuda" else "none")]
    lines += [__doc__.split("\n\n", 2)[2], steps(args)]
    print("\n\n".join(lines))
    if args.device == "cuda":
        print(write_result("train_step", "\n\n".join(lines) + "\n", gpu()))


def steps(args: argparse.Namespace) -> str:
    rows = []
    for name in args.models:
        for mode in args.modes:
            # The dense model is compiled once; each candidate is named by how it differs.
            begun = time.perf_counter()
            calls = {"dense": step_of(name, mode, None, args.device)}
            calls["dense"]()
            for pattern in args.patterns:
                for least in args.kernels_from_m or [compiled_ops.GPU_KERNELS_FROM_M]:
                    compiled_ops.GPU_KERNELS_FROM_M = least
                    label = f"{pattern} (kernels from M={least})"
                    calls[label] = step_of(name, mode, pattern, args.device)
                    calls[label]()
            ready = time.perf_counter() - begun
            found = measure(calls, args.rounds, args.device)
            dense, held = found["dense"]
            for label, (ms, memory) in found.items():
                row = [name, mode, label, f"{ms:.2f}", f"{ms / dense:.3f}", f"{memory:.0f}"]
                rows.append([*row, f"{memory / held:.3f}" if held else "-"])
                print(row, f"{ready:.0f} s to compile all", flush=True)
            if args.profile:
                for label, call in calls.items():
                    print(f"{name}, {mode}, {label}\n{kernels(call)}", flush=True)
            del calls
            gc.collect()
            torch.compiler.reset()
    head = ["model", "mode", "", "ms", "/ dense", "step's peak MB", "/ dense"]
    return records.table(head, rows)


def step_of(name: str, mode: str, pattern: str | None, device: str) -> Step:
    """A training step of a new model."""
    torch.manual_seed(0)
    with torch.device(device):
        model, inputs, loss_of, optimizer_of = GPU_MODELS[name](device != "cuda")
    if pattern is not None:
        nmfx.sparsify(model, pattern)
    optimizer = optimizer_of(model.parameters())
    run: Callable[..., Tensor] = model
    if mode == "layers":
        for block in blocks(model):
            block.compile()
    elif mode == "whole":
        run = torch.compile(model)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(run(*inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def kernels(call: Step, most: int = 16) -> str:
    """The GPU's time in one step by kernel, the longest first, and the host's time."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    lines = [f"GPU busy {total / 1e3:.2f} ms; host queued the step in {queued * 1e3:.2f} ms"]
    for event in events[:most]:
        ms = event.self_device_time_total / 1e3
        lines.append(f"{ms:9.3f} ms {event.count:5} x {event.key[:90]}")
    return "\n".join(lines)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules: the blocks of a transformer."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def measure(calls: dict[str, Step], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step and MB of its peak, by candidate."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, float] = {}
    names = list(calls)
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if device != "cuda":
                start = time.perf_counter()
                calls[name]()
                times[name].append((time.perf_counter() - start) * 1e3)
                peaks[name] = 0.0
                continue
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            calls[name]()
            end.record()
            end.synchronize()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
            times[name].append(begin.elapsed_time(end))
    # The first round warms up.
    return {name: (statistics.median(times[name][1:]), peaks[name]) for name in names}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
