"""The digits task: handwritten digits of 8x8 pixels, made hard by endless augmentation.

Every image is shifted, scaled in brightness and buried in noise, afresh each time it is drawn, so
that a small model can neither memorise the 1,000 training images nor reach a perfect score: what a
sparsity method costs stays visible.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The split is the same for every seed, so that no test image is ever used to choose anything.
SPLITS = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, None)}
SPLIT_SEED = 0

SHIFT = 2  # pixels, each way
GAIN = (0.6, 1.4)
NOISE = 0.35  # standard deviation; the pixels are 0..1

HELD_OUT_DRAWS = 8  # augmented copies of each held-out image, the same for every run


@cache
def load(split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 8, 8) float32 in 0..1 and labels (n,) int64 of "train", "validation" or "test"."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SPLIT_SEED))
    chosen = order[SPLITS[split]]
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 8, 8)
    return images[chosen], torch.tensor(digits)[chosen]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts, scales and blurs images with noise: (n, 8, 8) in 0..1 -> (n, 64), about unit scale.

    Each image gets a shift of up to `SHIFT` pixels both ways (zeros move in), one gain from `GAIN`
    and noise of its own per pixel.
    """
    count = len(images)
    shift = torch.randint(0, 2 * SHIFT + 1, (count, 2, 1), generator=generator)
    rows, columns = (shift + torch.arange(8)).unbind(1)
    image = torch.arange(count)[:, None, None]
    shifted = F.pad(images, (SHIFT,) * 4)[image, rows[:, :, None], columns[:, None, :]]
    low, high = GAIN
    gain = low + (high - low) * torch.rand(count, 1, 1, generator=generator)
    noise = NOISE * torch.randn(count, 8, 8, generator=generator)
    return ((shifted * gain + noise - 0.3) / 0.45).flatten(1)


@cache
def held_out(split: str) -> tuple[Tensor, Tensor]:
    """Augmented inputs (n, 64) and labels (n,) of a held-out split, the same in every call."""
    images, digits = load(split)
    draws = images.repeat(HELD_OUT_DRAWS, 1, 1), digits.repeat(HELD_OUT_DRAWS)
    return augment(draws[0], torch.Generator().manual_seed(SPLIT_SEED)), draws[1]


def make_model(seed: int) -> nn.Sequential:
    """A dense MLP 64-128-128-10 with batch norm; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widen, mix, head = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10)
        nn.init.kaiming_normal_(widen.weight)
        nn.init.kaiming_normal_(mix.weight)
    return nn.Sequential(
        widen, nn.BatchNorm1d(128), nn.ReLU(), mix, nn.BatchNorm1d(128), nn.ReLU(), head
    )
