"""`train` is the loop to copy from for a language model: nmfx adds two lines to it.

Everything else about nmfx in this file measures. All numbers of the lm task come from here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmfx

from ..meter import Meter, Packed, rate
from .model import GPT, make_model
from .text import CURVE_WINDOWS, FINAL_WINDOWS, draw, held_out

# Share of the steps. Bits per byte of a dense run, seed 3, 500 steps, by learning rate:
#             1e-3    2e-3    4e-3
#     1/20    3.481   3.596   3.784
#     1/5             3.457   3.453
WARM_UP = 1 / 5
WEIGHT_DECAY = 0.1  # of the blocks' matrices, as in GPT-3; norms, biases, embeddings, head: none
BETAS = (0.9, 0.95)  # as in GPT-3
CLIP = 1.0  # gradient norm, as in GPT-3
EVALUATION_BATCH = 64  # windows

STEP, BACKWARD = "step", "backward"  # where the SR-STE decay is added


@dataclass(frozen=True)
class Setup:
    """What all runs of a study have in common.

    Attributes:
        steps: optimizer steps.
        batch: windows of text per step.
        context: bytes per window.
        width, layers, heads: of the model.
        learning_rate: the highest one, at the end of the warm-up.
        decay: "step" (`nmfx.attach`, after clipping) or "backward" (the paper's form).
        compiled: whether the model runs under `torch.compile`.
    """

    steps: int
    batch: int
    context: int
    width: int
    layers: int
    heads: int
    learning_rate: float
    decay: str
    compiled: bool


@dataclass(frozen=True)
class Run:
    """One training run: `pattern` is None for a dense one, `lambda_w` = 0 is STE."""

    pattern: str | None
    lambda_w: float
    seed: int
    setup: Setup


@dataclass(frozen=True)
class Result:
    """What one run measured.

    Attributes:
        run: the run.
        bits: bits per byte on the held-out text after the last step; 8 is guessing.
        curve: (step, bits per byte on a part of the held-out text).
        flips: (step, share of mask entries that this one step changed), every 20th step.
        sad: share of mask entries that differ between the first and the last step.
        density: share of nonzeros in the sparsified weights after folding; 1.0 if dense.
        packed: the lowered model against the folded one; None for a dense run.
        milliseconds: median time of a training step, from drawing the batch to the update.
    """

    run: Run
    bits: float
    curve: list[tuple[int, float]]
    flips: list[tuple[int, float]]
    sad: float
    density: float
    packed: Packed | None
    milliseconds: float


def train(run: Run) -> Result:
    """Trains one model and measures it; all but the time is the same on the same machine."""
    setup = run.setup
    model, optimizer = prepare(run)
    forward = _compile(model) if setup.compiled else model
    warm_up = round(WARM_UP * setup.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(step, setup.steps, warm_up)
    )
    generator = torch.Generator().manual_seed(run.seed)
    meter = Meter(
        model, bool(run.pattern), setup.steps, lambda: evaluate(model, CURVE_WINDOWS, setup.context)
    )
    times = []
    for step in range(1, setup.steps + 1):
        start = time.perf_counter()
        text, following = draw(setup.batch, setup.context, generator)
        loss = F.cross_entropy(forward(text).flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        before = time.perf_counter()
        meter.before_update(step)
        after = time.perf_counter()
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - after + before - start)
        meter.after_update(step)
    bits, sad = evaluate(model, FINAL_WINDOWS, setup.context), meter.moved()
    density, packed = meter.density_and_packing(held_out(1, setup.context)[0])
    return Result(
        run, bits, meter.curve, meter.flips, sad, density, packed, 1e3 * median(times)
    )  # the median leaves out the first steps, which compile


def prepare(run: Run) -> tuple[GPT, torch.optim.Optimizer]:
    """The model of a run, sparsified if it has a pattern, and its optimizer."""
    setup = run.setup
    model = make_model(setup.width, setup.layers, setup.heads, setup.context, run.seed)
    if run.pattern:
        nmfx.sparsify(model, run.pattern, lambda_w=run.lambda_w)  # the head stays dense
    optimizer = _adamw(model, setup.learning_rate)
    if run.pattern and setup.decay == STEP:
        nmfx.attach(model, optimizer)  # clipping would shrink a decay that came in backward
    return model, optimizer


def _adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    parameters = dict(model.named_parameters())
    matrices = [n for n, p in parameters.items() if n.startswith("blocks.") and p.dim() == 2]
    others = [n for n in parameters if n not in matrices]
    groups = [
        {"params": [parameters[name] for name in names], "weight_decay": weight_decay}
        for names, weight_decay in ((matrices, WEIGHT_DECAY), (others, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


def _compile(model: nn.Module) -> Callable[[Tensor], Tensor]:
    # Many runs share a process: without it the models before would count as recompilations.
    torch.compiler.reset()
    # A run has one core; by default each would start a pool of compilers as large as the machine.
    return torch.compile(model, options={"compile_threads": 1})


@torch.no_grad()
def evaluate(model: nn.Module, windows: int, context: int) -> float:
    """Bits per byte on held-out windows, given the bytes before in the window; eager."""
    model.eval()
    pairs = zip(*(one.split(EVALUATION_BATCH) for one in held_out(windows, context)), strict=True)
    nats = sum(_summed_loss(model, text, following) for text, following in pairs)
    model.train()
    return nats / (windows * context) / math.log(2)


def _summed_loss(model: nn.Module, text: Tensor, following: Tensor) -> float:
    logits = model(text).flatten(0, 1)
    return F.cross_entropy(logits, following.flatten(), reduction="sum").item()
