"""masks and sad over real training steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from captures import CAPTURES, dense
from torch import Tensor, nn

import nmfx


def train(model: nn.Module, steps: int, lr: float) -> list[dict[str, Tensor]]:
    """Trains, and takes a snapshot of the masks before the first and after every step."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x, y = torch.randn(32, 16), torch.randn(32, 8)
    snapshots = [nmfx.masks(model)]
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        snapshots.append(nmfx.masks(model))
    return snapshots


def test_sad_counts_flips_over_real_training_steps() -> None:
    snapshots = train(CAPTURES["leaf"](), steps=6, lr=0.5)
    totals = []
    for before, after in itertools.pairwise(snapshots):
        sad = nmfx.sad(before, after)
        by_hand = {name: int((before[name] ^ after[name]).sum()) for name in before}
        assert sad.per_layer == by_hand, sad
        assert (sad.total, sad.weights) == (sum(by_hand.values()), 16 * 16 + 8 * 16), sad
        assert sad.per_weight == sad.total / sad.weights
        assert sad.total % 2 == 0, "at one pattern, a weight only leaves when another comes"
        totals.append(sad.total)
    assert sum(totals) > 0, "no mask moved"
    whole = nmfx.sad(snapshots[0], snapshots[-1]).total
    assert 0 < whole <= sum(totals), f"{whole} over all, {totals} step by step"


def test_sad_is_zero_while_frozen_and_small_under_a_strong_decay() -> None:
    frozen = CAPTURES["leaf"]()
    nmfx.freeze(frozen)
    snapshots = train(frozen, steps=6, lr=0.5)
    assert nmfx.sad(snapshots[0], snapshots[-1]).total == 0

    def flips(lambda_w: float) -> int:
        model = CAPTURES["leaf"]()
        nmfx.set_lambda(model, lambda_w)
        snapshots = train(model, steps=30, lr=0.2)
        pairs = itertools.pairwise(snapshots)
        return sum(nmfx.sad(before, after).total for before, after in pairs)

    assert flips(0.5) < flips(0.0), "SR-STE is there to calm the masks"


def test_sad_refuses_snapshots_of_different_models() -> None:
    one, other = nmfx.masks(CAPTURES["leaf"]()), nmfx.masks(nmfx.sparsify(dense(), {"0": "2:4"}))
    with pytest.raises(nmfx.NMError, match=r"only in one: \['2.weight'\]"):
        nmfx.sad(one, other)
