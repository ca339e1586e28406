"""Inference of whole models on one GPU, bf16: nmfx.lower against the folded dense model.

    python benchmarks/bench_gpu_model.py --models llama-decode-1 vit-l-64 --budget-s 200

A line compares one mode with the same mode: "ratio" is dense over lowered, more than 1 is faster.
"eager" runs the model as it is, "cuda-graph" replays a capture of that, "compiled" compiles the
blocks of the model (torch's regional compilation, default settings; embeddings and head run eager),
"compiled-graph" replays a capture of the compiled model, "reduce-overhead" is torch.compile of the
whole model in that mode. Both models take turns, each from an idle GPU, in stretches of about 20 ms
of back-to-back calls between two events; ms is the median, and nothing empties caches in between.
Weights are random, masked by magnitude; the embedding and the output layer stay dense in both
models (nmfx's default policy). "bytes" is of the N:M layers, as lowered over dense. "error" is the
relative norm of the difference from the dense model run eager, of dense and of lowered in the mode.
Llama has Llama-3.2-1B's shapes with 8192 tokens of vocabulary: a prompt of 2048 tokens, or one
token against a static key-value cache of 512 tokens, and the logits of the last token.

Where nmfx.lower finds the whole model slower, run eager, and so keeps it dense, the lines have a *
and show what nmfx.lower(cuda_graph=True) gives instead: of these only the modes with graphs count.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import os
import shutil
import statistics
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import records
import torch
from gpu_timing import gpu
from harness import hardware, header, write_result
from resnet import ResNet50, fuse
from static_llama import TINY, Size, StaticLlama
from torch import Tensor, nn

import nmfx
from nmfx.calls import TOLERANCE, relative_error
from nmfx.tuning import cache

Call = Callable[[], Tensor]
Made = tuple[nn.Module, tuple[Tensor, ...]]

STARTED = time.perf_counter()
MODES = ("eager", "cuda-graph", "compiled", "compiled-graph", "reduce-overhead")
HEAD = ["model", "input", "pattern", "mode", "dense ms", "lowered ms", "ratio"]
HEAD += ["error (dense, lowered)", "bytes", "packed / semi-structured / dense layers"]
BEST_HEAD = ["model", "input", "pattern", "best dense", "best lowered", "ratio"]
_STRETCH_MS = 20.0
_KEPT_DENSE = "slower than dense, so it stays dense"


def vit(batch: int, quick: bool) -> Made:
    """ViT-L/16 with a classifier."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit import modeling_vit

    without_mask(modeling_vit)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    side = 32 if quick else 224
    config = ViTConfig(
        num_hidden_layers=2 if quick else 24,
        image_size=side,
        num_labels=1000,
        **(small if quick else large),
    )
    model = _Output(ViTForImageClassification(config), ("logits",))
    return model, (torch.randn(min(batch, 2) if quick else batch, 3, side, side).bfloat16(),)


def bert(batch: int, quick: bool) -> Made:
    """BERT-large with the head for questions and answers."""
    from transformers import BertConfig, BertForQuestionAnswering
    from transformers.models.bert import modeling_bert

    without_mask(modeling_bert)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    config = BertConfig(num_hidden_layers=2 if quick else 24, **(small if quick else large))
    model = _Output(BertForQuestionAnswering(config), ("start_logits", "end_logits"))
    shape = (min(batch, 2), 16) if quick else (batch, 384)
    return model, (torch.randint(config.vocab_size, shape),)


def without_mask(modeling: types.ModuleType) -> None:
    """Makes no attention mask: without padding transformers makes none, but within a capture."""
    assert callable(modeling.create_bidirectional_mask)
    modeling.create_bidirectional_mask = lambda *args, **kwargs: None


def llama(batch: int, tokens: int, cached: int, quick: bool) -> Made:
    """The last `tokens` of the `cached` tokens that fill its cache."""
    size, cached = (TINY, 16) if quick else (Size(), cached)
    tokens = min(tokens, cached)
    positions = torch.arange(cached - tokens, cached)
    return StaticLlama(size, batch, cached), (torch.randint(size.vocab, (batch, tokens)), positions)


def resnet(batch: int, quick: bool) -> Made:
    """ResNet-50, its batch norms folded, channels-last."""
    model = fuse(ResNet50().eval()).to(memory_format=torch.channels_last)
    side = 64 if quick else 224
    x = torch.randn(min(batch, 2) if quick else batch, 3, side, side).bfloat16()
    return model, (x.contiguous(memory_format=torch.channels_last),)


# In the order in which they run: what matters most comes first.
MODELS: dict[str, tuple[str, Callable[[bool], Made]]] = {
    "llama-decode-1": ("1 token, 512 cached", functools.partial(llama, 1, 1, 512)),
    "vit-l-64": ("64 images", functools.partial(vit, 64)),
    "bert-large-32": ("32 x 384 tokens", functools.partial(bert, 32)),
    "llama-prefill": ("1 x 2048 tokens", functools.partial(llama, 1, 2048, 2048)),
    "bert-large-1": ("1 x 384 tokens", functools.partial(bert, 1)),
    "vit-l-1": ("1 image", functools.partial(vit, 1)),
    "resnet50-64": ("64 images", functools.partial(resnet, 64)),
    "resnet50-1": ("1 image", functools.partial(resnet, 1)),
    "llama-decode-8": ("8 x 1 token, 512 cached", functools.partial(llama, 8, 1, 512)),
}


class _Output(nn.Module):
    """A Hugging Face model with one tensor as its output."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(x)
        return torch.stack([found[name] for name in self.names])


@dataclass
class Result:
    """What was found so far, as the sections of the result file."""

    rows: list[list[str]] = field(default_factory=list)
    best: list[list[str]] = field(default_factory=list)
    roofline: list[str] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: list[str] = field(default_factory=list)

    def text(self) -> str:
        lists = {
            "Memory": self.memory,
            "Bytes of weights per decoded token": self.roofline,
            "Failed": self.failed,
            "Left out, as the time was used up": self.left_out,
            "Seconds": self.seconds,
        }
        sections = [records.table(HEAD, self.rows)]
        sections += ["## The best mode of each", records.table(BEST_HEAD, self.best)]
        for title, lines in lists.items():
            if lines:
                sections += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
        return "\n\n".join([*sections, "## What nmfx.report says", *self.notes])


@torch.no_grad()
def main() -> None:
    args = parse()
    # Blocks that were lowered differently are compiled one by one, and never run eager unseen.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 4096
    result = Result()
    with part("bandwidth", result):
        args.bandwidth = bandwidth(args)
        result.roofline.append(
            f"a copy of {_copied(args) / 2**30:.2g} GiB moves {args.bandwidth / 1e12:.3f} TB/s, "
            f"read and written"
        )
    for name, pattern in parts(args):
        label = f"{name}, {pattern}"
        if over(args):
            result.left_out.append(label)
            continue
        with part(label, result):
            if name == "memory":
                memory(args, pattern, result)
            else:
                measure(args, name, pattern, result)
        clean(args)
        write(args, result)
    print(write(args, result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [*MODELS, "memory"]
    parser.add_argument("--models", nargs="+", default=choices, choices=choices)
    parser.add_argument("--modes", nargs="+", default=list(MODES[:4]), choices=MODES)
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--decode-patterns", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget-s", type=float, default=200, help="start nothing new after that")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny: does it work? Not a timing")
    args = parser.parse_args()
    args.bandwidth = None
    args.machine = gpu() if args.device == "cuda" else hardware()
    if args.device != "cuda":
        args.modes = [mode for mode in args.modes if "graph" not in mode]
    args.modes.sort(key=MODES.index)  # compiled blocks are made once, and captured after that
    return args


def parts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(model, pattern) in the order in which they run."""
    found = []
    for name in MODELS:
        patterns = args.decode_patterns if "decode" in name else args.patterns
        found += [(name, pattern) for pattern in patterns if name in args.models]
        if name == "llama-decode-1" and "memory" in args.models:
            found.append(("memory", args.decode_patterns[0]))
    return found


@contextlib.contextmanager
def part(label: str, result: Result) -> Iterator[None]:
    """Notes how long the block took, and that it failed, which ends the block alone."""
    begun = time.perf_counter()
    print(f"{begun - STARTED:6.1f} s: {label}", flush=True)
    try:
        yield
    except Exception as error:  # noqa: BLE001  # what was found before it is written all the same
        traceback.print_exc()
        result.failed.append(f"{label}: {reason(error)}")
    result.seconds.append(f"{label}: {time.perf_counter() - begun:.1f}")


def reason(error: BaseException) -> str:
    """In one line, without what would break a table; what came first tells more."""
    while error.__context__ is not None:
        error = error.__context__
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}".replace("|", "/")[:200]


def over(args: argparse.Namespace) -> bool:
    return time.perf_counter() - STARTED > args.budget_s


def clean(args: argparse.Namespace) -> None:
    """Frees what a part leaves behind."""
    torch.compiler.reset()
    gc.collect()
    if args.device == "cuda":
        with contextlib.suppress(RuntimeError):  # after an error that the GPU does not forget
            torch.cuda.empty_cache()


def write(args: argparse.Namespace, result: Result) -> str:
    """Writes all that was found so far; its text."""
    method = __doc__.split("\n\n", 2)[2]
    head = header("Whole models on a GPU", args.machine)
    text = "\n\n".join([head, method.strip(), result.text(), ""])
    out = os.environ.get("OUT")
    if args.quick or args.device != "cuda":
        if out:
            Path(out, "gpu_model_quick.md").write_text(text, encoding="utf-8")
        return f"{text}\nquick run: nothing in results/"
    path = write_result("gpu_model", text, args.machine)
    if out:
        shutil.copy(path, out)
    return f"{text}\nwritten: {path.name}"


# --- one model, one pattern ---------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The two models that are compared, and what is said about them.

    Attributes:
        models: "dense" and "lowered".
        inputs: of a call.
        cells: the first cells of their lines in the tables.
        tail: the last ones.
        bytes: of all linear and conv weights, by model.
    """

    models: dict[str, nn.Module]
    inputs: tuple[Tensor, ...]
    cells: list[str]
    tail: list[str]
    bytes: dict[str, int]


def measure(args: argparse.Namespace, name: str, pattern: str, result: Result) -> None:
    pair = make_pair(args, name, pattern, result)
    expected = pair.models["dense"](*pair.inputs).clone()
    best: dict[str, tuple[float, str]] = {}
    for mode in args.modes:
        label = f"{name}, {pattern}, {mode}"
        if over(args):
            result.left_out.append(label)
            continue
        try:
            begun = time.perf_counter()
            calls = {key: call_of(mode, m, pair.inputs) for key, m in pair.models.items()}
            errors = {key: relative_error(expected, call()) for key, call in calls.items()}
            ready = time.perf_counter() - begun
            times = interleave(calls, args)
            texts = [f"{times[key]:.3f}" for key in calls]
            ratio = times["dense"] / times["lowered"]
            row = [*texts, f"{ratio:.2f}", ", ".join(map(_error, errors.values()))]
            seconds = f"{ready:.1f} to make it, {time.perf_counter() - begun - ready:.1f} to time"
            result.seconds.append(f"{label}: {seconds}")
            print(label, *row, f"({seconds})", flush=True)
            for key, ms in times.items():
                if errors[key] <= TOLERANCE[torch.bfloat16]:
                    best[key] = min(best.get(key, (ms, mode)), (ms, mode))
        except Exception as error:  # noqa: BLE001  # the other modes go on
            traceback.print_exc()
            row = ["", "", "", f"failed: {reason(error)}"]
            result.failed.append(f"{label}: {reason(error)}")
        result.rows.append([*pair.cells, mode, *row, *pair.tail])
    if len(best) == 2:
        texts = [f"{best[key][0]:.3f} ({best[key][1]})" for key in ("dense", "lowered")]
        ratio = best["dense"][0] / best["lowered"][0]
        result.best.append([*pair.cells, *texts, f"{ratio:.2f}"])
        if "decode" in name and args.bandwidth:
            result.roofline += [roof(args, pair, key, best[key]) for key in pair.models]


def _error(error: float) -> str:
    return f"{error:.0e}" if error <= TOLERANCE[torch.bfloat16] else f"**differs: {error:.0e}**"


def make_pair(args: argparse.Namespace, name: str, pattern: str, result: Result) -> Pair:
    begun = time.perf_counter()
    dense, inputs, sparse = make_dense(args, name, pattern)
    made = time.perf_counter()
    fast, notes = nmfx.lower(dense, inputs), []
    starred = kept_dense(fast)
    if starred:
        notes += [f"nmfx.lower: {note}" for note in nmfx.report(fast).notes]
        notes.append("what follows, and the tables, are of nmfx.lower(cuda_graph=True)")
        fast = lower_layers(dense, inputs)
    report = nmfx.report(fast)
    seconds = f"{made - begun:.1f} to make it, {time.perf_counter() - made:.1f} to lower it"
    result.seconds.append(f"{name}, {pattern}: {seconds}")
    rows = [row for row in report if row.fqn in sparse]
    states = [row.state for row in rows]
    counts = [states.count(state) for state in ("packed", "semi_structured")]
    counts.append(len(states) - sum(counts))
    stored, full = sum(row.bytes for row in rows), sum(row.bytes_dense for row in rows)
    share = sum(torch.Size(row.shape).numel() for row in rows) / parameters(dense)
    about = f"{len(rows)} N:M layers hold {share:.1%} of the {parameters(dense):,} weights"
    lines = [about, *notes, *report.notes, *layer_lines(rows)]
    lines = [f"### {name}, {pattern}", "\n".join(f"- {line}" for line in lines)]
    result.notes += lines
    print("\n".join(lines), f"\n({seconds})", flush=True)
    return Pair(
        {"dense": dense, "lowered": fast},
        inputs,
        [name, MODELS[name][0], pattern + "*" * starred],
        [f"{stored / full:.3f}", " / ".join(map(str, counts))],
        {"dense": nmfx.report(dense).totals["bytes"], "lowered": report.totals["bytes"]},
    )


def make_dense(
    args: argparse.Namespace, name: str, pattern: str
) -> tuple[nn.Module, tuple[Tensor, ...], set[str]]:
    """The folded model, its inputs, and the names of its N:M weights."""
    torch.manual_seed(0)
    with torch.device(args.device):
        model, inputs = MODELS[name][1](args.quick)
    model = model.eval().requires_grad_(False).bfloat16()
    nmfx.sparsify(model, pattern)
    sparse = {row.fqn for row in nmfx.report(model) if row.pattern is not None}
    return nmfx.fold(model, inplace=True), inputs, sparse


def lower_layers(dense: nn.Module, inputs: tuple[Tensor, ...], inplace: bool = False) -> nn.Module:
    """nmfx.lower for CUDA graphs: asks in one whether the whole model is faster."""
    graph = next(dense.parameters()).is_cuda
    return nmfx.lower(dense, inputs, inplace=inplace, cuda_graph=graph)


def kept_dense(model: nn.Module) -> bool:
    """Whether nmfx.lower answered that question with no."""
    return any(_KEPT_DENSE in note for note in nmfx.report(model).notes)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def layer_lines(rows: list[Any]) -> list[str]:
    """What became of the layers, those that are alike in one line."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault((row.shape, row.rows, row.state, row.reason), []).append(row)
    lines = []
    for (shape, count, state, why), alike in groups.items():
        text = f"{len(alike)} x {'x'.join(map(str, shape))}, {state}: {why}"
        row = alike[0]
        if row.ms_dense is not None and row.ms_chosen is not None:
            text += f" ({', '.join(map(str, count))} rows; dense {row.ms_dense * 1e3:.1f} us, "
            text += f"chosen {row.ms_chosen * 1e3:.1f} us)"
        lines.append(text)
    return lines


# --- modes --------------------------------------------------------------------------------------


def call_of(mode: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """The model in a mode, ready to be timed: compiled, captured, and run once at least."""
    (compile_blocks if mode.startswith("compiled") else run_blocks_eager)(model)
    if mode == "reduce-overhead":
        return reduce_overhead(model, inputs)
    call = functools.partial(model, *inputs)
    if mode in ("eager", "compiled"):
        call()
        return call
    return captured(call)


def captured(call: Call) -> Call:
    """Replays a CUDA graph of the call."""
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    try:
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled and loaded, workspaces allocated
                call()
        here.wait_stream(side)
        # Other threads (those of compilers) may do as they please.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            out = call()
    except Exception:
        recover(here)
        raise

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def recover(stream: torch.cuda.Stream) -> None:
    """What a capture that breaks off leaves behind: its stream, and a generator that waits."""
    with contextlib.suppress(Exception):
        torch.cuda.set_stream(stream)
        state = torch.Generator("cuda").graphsafe_get_state()
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(state)
        torch.cuda.synchronize()


def reduce_overhead(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    def forward(*args: Tensor) -> Tensor:
        return model(*args)

    run = torch.compile(own_code(forward), mode="reduce-overhead", dynamic=False)

    def call() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(*inputs)

    for _ in range(3):  # compiles, records, replays
        call()
    return call


def compile_blocks(model: nn.Module) -> None:
    """All blocks call one compiled function, which is compiled once if they are alike."""
    if all("forward" in block.__dict__ for block in blocks(model)):
        return

    (kind,) = {type(block) for block in blocks(model)}
    of_block = kind.forward

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return of_block(block, *args, **kwargs)

    run = torch.compile(own_code(forward), dynamic=False)
    for block in blocks(model):
        block.forward = functools.partial(run, block)


def run_blocks_eager(model: nn.Module) -> None:
    for block in blocks(model):
        block.__dict__.pop("forward", None)


def blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The longest list of modules: the blocks of a transformer, or of a ResNet."""
    kinds = nn.ModuleList, nn.Sequential
    return max((module for module in model.modules() if isinstance(module, kinds)), key=len)


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: compiled entries and their guards hang on it."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{id(function)}")
    return types.FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )


# --- time, bytes --------------------------------------------------------------------------------


def interleave(calls: dict[str, Call], args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a call, median of stretches that take turns."""
    for call in calls.values():
        stretch(call, 2, args.device)
    shortest = min(stretch(call, 3, args.device) for call in calls.values())
    many = max(1, min(50, round(_STRETCH_MS / shortest)))
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(stretch(calls[name], many, args.device))
    return {name: statistics.median(ms) for name, ms in times.items()}


def stretch(call: Callable[[], object], many: int, device: str) -> float:
    """Milliseconds of one of so many calls, the first of which meets an idle GPU."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(many):
            call()
        return (time.perf_counter() - start) * 1e3 / many
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(many):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / many


def bandwidth(args: argparse.Namespace) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.zeros(_copied(args), dtype=torch.int8, device=args.device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    copy()
    ms = statistics.median(stretch(copy, 4, args.device) for _ in range(7))
    return 2 * source.nbytes / ms * 1e3


def _copied(args: argparse.Namespace) -> int:
    return 2 << 30 if args.device == "cuda" else 16 << 20


def roof(args: argparse.Namespace, pair: Pair, key: str, best: tuple[float, str]) -> str:
    """What reading the weights once takes at least, and what the step takes."""
    size, (ms, mode) = pair.bytes[key], best
    least = size / args.bandwidth * 1e3
    return (
        f"{', '.join(pair.cells)}, {key}: {size / 1e9:.3f} GB of weights, {least:.3f} ms at the "
        f"copy's bandwidth; measured {ms:.3f} ms ({mode}), so {least / ms:.0%} of it"
    )


def memory(args: argparse.Namespace, pattern: str, result: Result) -> None:
    """Peak memory of lowering in place, timings and all, on the small input."""
    dense, inputs, _ = make_dense(args, "llama-decode-1", pattern)
    with cache.unused():  # as the first time: timings included
        line = peak(args, nmfx.lower, dense, inputs)
        result.memory.append(f"llama-decode-1, {pattern}, nmfx.lower(inplace=True): {line}")
        if kept_dense(dense):
            line = peak(args, lower_layers, dense, inputs)
            result.memory.append(f"llama-decode-1, {pattern}, its choices layer by layer: {line}")
    print(*result.memory, sep="\n", flush=True)


def peak(
    args: argparse.Namespace,
    lower: Callable[..., nn.Module],
    model: nn.Module,
    inputs: tuple[Tensor, ...],
) -> str:
    """Lowers in place; the most memory that was in use, without what else is there."""
    size = sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))
    clean(args)
    if args.device != "cuda":
        lower(model, inputs, inplace=True)
        return "the peak is measured on a GPU only"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - size
    lower(model, inputs, inplace=True)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - others
    after = torch.cuda.memory_allocated() - others
    states = [row.state for row in nmfx.report(model)]
    lowered = sum(state in ("packed", "semi_structured") for state in states)
    return (
        f"{size / 1e6:.0f} MB dense, at most {most / 1e6:.0f} MB while it runs "
        f"({most / size:.3f}x), {after / 1e6:.0f} MB afterwards ({after / size:.3f}x); "
        f"{lowered} layers lowered"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
