"""Rounding in order: the mask stays that of the wide weight, kept values are rounded as ever."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmfx.mask import magnitude, nm_mask
from nmfx.ops.ordered import round_in_order
from nmfx.ops.sr_ste import make_control
from nmfx.pattern import Pattern

PATTERNS = ["2:4", "1:4", "3:4", "1:2", "4:8", "2:16"]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1.0001, -1.0002, 0.9999, 1e-40, -1e-42, 3.4e38, -3.39e38]
SPECIAL = [float("inf"), float("-inf"), float("nan")]


def check(weight: Tensor, pattern: str, dim: int, dtype: torch.dtype) -> None:
    p = Pattern.parse(pattern)
    rounded = round_in_order(weight, make_control(0.0, p.n), p.m, dim, dtype)
    plain, mask = weight.to(dtype), nm_mask(weight, pattern, dim)
    assert rounded.dtype == dtype
    bits, others = rounded.view(torch.int16), plain.view(torch.int16)
    assert torch.equal(bits[mask], others[mask]), "a kept value was not rounded as ever"
    moved = bits != others
    assert torch.equal(bits[moved] + 1, others[moved]), "a pruned value moved by more than one unit"
    kept = nm_mask(rounded, pattern, dim)
    # Where masks differ, nothing is kept that is not zero either way.
    differ = kept != mask
    assert not magnitude(rounded)[differ].any(), (weight, rounded)


@given(
    st.lists(st.sampled_from(FLOATS + SPECIAL), min_size=32, max_size=32),
    st.sampled_from(PATTERNS),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_order_survives_special_values(
    values: list[float], pattern: str, dtype: torch.dtype
) -> None:
    check(torch.tensor(values).view(2, 16), pattern, 1, dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_ties_are_broken_as_before_rounding(pattern: str, dim: int, wide: torch.dtype) -> None:
    few = torch.tensor([-0.25, 0.125, 0.25], dtype=wide)[torch.randint(3, (48, 32))]
    weight = few * (1 + 2**-11 * torch.randn(48, 32, dtype=wide))
    check(weight, pattern, dim, torch.bfloat16)
    naive = nm_mask(weight.to(torch.bfloat16), pattern, dim)
    assert (naive != nm_mask(weight, pattern, dim)).any(), "there was nothing to break"


def test_conv_weights_and_empty_shards() -> None:
    check(
        torch.randn(3, 8, 3, 3).round(decimals=1) + 1e-4 * torch.randn(3, 8, 3, 3),
        "2:4",
        1,
        torch.bfloat16,
    )
    empty = round_in_order(torch.empty(0, 8), make_control(0.0, 2), 4, 1, torch.bfloat16)
    assert empty.shape == (0, 8)
