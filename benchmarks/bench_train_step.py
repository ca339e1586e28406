"""Whole training steps on the CPU: a model that nmfx.sparsify made 2:4 against the dense one.

    python benchmarks/bench_train_step.py --threads 2

A step is zero_grad, forward, backward and the optimizer's step. The two models of a line start from
the same weights and take turns in one process. Peak memory is that of a process of its own for each
(resident, after three steps); "net" leaves out what the process had before it built the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import records
import torch
from harness import header, write_result
from timing import interleave
from torch import Tensor, nn
from train_models import CPU_MODELS

import nmfx

Step = Callable[[], object]
WAYS = ("dense", "nmfx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=list(CPU_MODELS), choices=CPU_MODELS)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="tiny models: does it run?")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(peak(*args.memory_of, args)))
        return
    lines = [header("Training steps"), __doc__.split("\n\n", 2)[2], steps(args), "", sparsifying()]
    print("\n\n".join(lines[2:]))
    if not args.quick:
        print(write_result("train_step", "\n\n".join(lines) + "\n"))


def steps(args: argparse.Namespace) -> str:
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.models:
            for mode in args.modes:
                calls = {way: step_of(name, mode, way, args.quick) for way in WAYS}
                times = interleave(calls, args.rounds, 0.0)
                del calls
                gc.collect()
                torch.compiler.reset()
                dense, ours = (times[way].median for way in WAYS)
                row = [name, mode, str(threads), f"{dense:.1f}", f"{ours:.1f}"]
                fastest = times["nmfx"].min / times["dense"].min
                row += [f"{ours / dense:.3f}", f"{fastest:.3f}"]
                row += memory(name, mode, threads, args)
                print(row, flush=True)
                rows.append(row)
    head = [
        "model",
        "mode",
        "threads",
        "dense ms",
        "nmfx ms",
        "nmfx / dense",
        "of the fastest steps",
    ]
    head += ["dense peak MB", "nmfx peak MB", "nmfx / dense, all", "nmfx / dense, net"]
    return records.table(head, rows)


def step_of(name: str, mode: str, way: str, quick: bool) -> Step:
    """A training step of a new model."""
    torch.manual_seed(0)
    model, inputs, loss_of, optimizer_of = CPU_MODELS[name](quick)
    if way == "nmfx":
        nmfx.sparsify(model, "2:4")
    optimizer = optimizer_of(model.parameters())
    run: Callable[..., Tensor] = torch.compile(model) if mode == "compiled" else model

    def step() -> None:
        optimizer.zero_grad()
        loss_of(run(*inputs)).backward()
        optimizer.step()

    return step


def memory(name: str, mode: str, threads: int, args: argparse.Namespace) -> list[str]:
    """Peak MB of both ways, each in a process of its own, and the ratios."""
    found = []
    for way in WAYS:
        command = [sys.executable, str(Path(__file__)), "--memory-of", name, mode, way]
        command += ["--threads", str(threads), *(["--quick"] if args.quick else [])]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
    (base, dense), (base_ours, ours) = found
    net = (ours - base_ours) / (dense - base)
    return [f"{dense:.0f}", f"{ours:.0f}", f"{ours / dense:.3f}", f"{net:.3f}"]


def peak(name: str, mode: str, way: str, args: argparse.Namespace) -> tuple[float, float]:
    """MB resident before the model is built, and at the peak of three steps.

    Compiling is not counted: the compiled code is made, kept on disk, and run in steps afterwards.
    """
    torch.set_num_threads(args.threads[0])
    step = step_of(name, mode, way, args.quick)
    if mode == "compiled":
        step()
    del step
    gc.collect()
    torch.compiler.reset()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    step = step_of(name, mode, way, args.quick)
    for _ in range(3):
        step()
    return before, resident("VmHWM")


def resident(what: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sparsifying() -> str:
    """How long `sparsify` takes for a Llama of 1.2 billion parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    rows = []
    for device in ("meta", "cpu"):
        with torch.device("meta"):
            model: nn.Module = LlamaForCausalLM(config)
        if device == "cpu":
            model = model.to_empty(device="cpu")
            for parameter in model.parameters():
                parameter.detach().fill_(1.0)  # memory that is really there
        start = time.perf_counter()
        nmfx.sparsify(model, "2:4")
        seconds = time.perf_counter() - start
        count = sum(parameter.numel() for parameter in model.parameters())
        rows.append([device, f"{count / 1e9:.2f}", f"{seconds:.2f}"])
        del model
        gc.collect()
    head = ["sparsify() of a Llama on", "billion parameters", "s"]
    return records.table(head, rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
