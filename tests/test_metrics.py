"""SAD is a metric; density and kept_energy against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, bool_masks, cases

from nmfx.errors import NMError
from nmfx.mask import nm_mask, nm_project
from nmfx.metrics import Sad, density, kept_energy, mask_sad, sad

SHAPES = {"stem": (3, 5), "head": (2, 2, 3)}
snapshots = st.fixed_dictionaries({name: bool_masks(shape) for name, shape in SHAPES.items()})


def as_list(snapshot: dict[str, torch.Tensor]) -> dict[str, list[bool]]:
    return {name: mask.flatten().tolist() for name, mask in snapshot.items()}


@given(snapshots, snapshots)
def test_sad_counts_the_entries_that_differ(before: dict, after: dict) -> None:
    expected = {
        name: sum(a != b for a, b in zip(row, as_list(after)[name], strict=True))
        for name, row in as_list(before).items()
    }
    result = sad(before, after)
    assert result == Sad(expected, sum(expected.values()), 27), result
    assert result.per_weight == sum(expected.values()) / 27, result


@given(snapshots, snapshots)
def test_sad_is_symmetric(a: dict, b: dict) -> None:
    assert sad(a, b) == sad(b, a)


@given(snapshots, snapshots)
def test_sad_is_zero_only_for_equal_masks(a: dict, b: dict) -> None:
    assert sad(a, a).total == 0, sad(a, a)
    assert (sad(a, b).total == 0) == (as_list(a) == as_list(b)), sad(a, b)


@given(snapshots, snapshots, snapshots)
def test_sad_obeys_the_triangle_inequality(a: dict, b: dict, c: dict) -> None:
    direct, detour = sad(a, c), (sad(a, b), sad(b, c))
    assert direct.total <= detour[0].total + detour[1].total, f"{direct} > {detour}"
    for name, count in direct.per_layer.items():
        assert count <= sum(part.per_layer[name] for part in detour), f"{name}: {direct}, {detour}"


@given(cases(ndim=2, dim=1), st.randoms(use_true_random=False))
def test_sad_of_one_pattern_counts_whole_swaps(case: Case, random) -> None:
    # N kept before and after in every group: each weight that leaves makes room for another.
    weight, pattern, _ = case
    order = list(range(weight.shape[0]))
    random.shuffle(order)
    flips = mask_sad(nm_mask(weight, pattern, 1), nm_mask(weight[order], pattern, 1))
    assert flips % 2 == 0, f"{flips} flips of {pattern}"


def test_sad_compares_any_strides() -> None:
    mask = torch.tensor([[True, False, False], [False, True, True]])
    assert mask_sad(mask, mask.T.contiguous().T) == 0
    assert mask_sad(mask, ~mask) == 6


def test_sad_of_empty_masks_is_zero() -> None:
    empty = {"a": torch.zeros(0, 4, dtype=torch.bool)}
    assert sad(empty, empty) == Sad({"a": 0}, 0, 0)
    assert sad(empty, empty).per_weight == 0.0


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (
            torch.zeros(2, 4, dtype=torch.bool),
            torch.zeros(4, 2, dtype=torch.bool),
            "SAD compares two bool masks of one shape, got torch.bool (2, 4) and torch.bool (4, 2)",
        ),
        (
            torch.zeros(4, dtype=torch.bool),
            torch.zeros(1, 4, dtype=torch.bool),
            "SAD compares two bool masks of one shape, got torch.bool (4,) and torch.bool (1, 4)",
        ),
        (
            torch.zeros(4),
            torch.zeros(4, dtype=torch.bool),
            "SAD compares two bool masks of one shape, got torch.float32 (4,) and torch.bool (4,)",
        ),
        (
            torch.zeros(4, dtype=torch.bool),
            torch.zeros(4, dtype=torch.uint8),
            "SAD compares two bool masks of one shape, got torch.bool (4,) and torch.uint8 (4,)",
        ),
    ],
    ids=["shape", "broadcast", "before float", "after uint8"],
)
def test_sad_refuses_other_masks(before: torch.Tensor, after: torch.Tensor, text: str) -> None:
    with pytest.raises(NMError) as caught:
        mask_sad(before, after)
    assert str(caught.value) == text
    with pytest.raises(NMError) as caught:
        sad({"fc.weight": before}, {"fc.weight": after})
    assert str(caught.value) == f"fc.weight: {text}"


@pytest.mark.parametrize(
    ("before", "after", "odd"),
    [
        (["a", "c"], ["b", "c"], "['a', 'b']"),
        (["a"], ["b", "a"], "['b']"),
        (["b", "a"], ["a"], "['b']"),
        ([], ["a"], "['a']"),
    ],
    ids=str,
)
def test_sad_refuses_other_names(before: list[str], after: list[str], odd: str) -> None:
    mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(NMError) as caught:
        sad(dict.fromkeys(before, mask), dict.fromkeys(after, mask))
    assert str(caught.value) == (
        f"the snapshots do not name the same parameters; only in one: {odd}"
    )


def test_sad_refuses_empty_snapshots() -> None:
    with pytest.raises(NMError) as caught:
        sad({}, {})
    assert str(caught.value) == (
        "the snapshots are empty; sparsify the model before taking nmfx.masks"
    )


@given(cases())
def test_density_counts_nonzeros(case: Case) -> None:
    values = case.weight.flatten().tolist()
    expected = sum(v != 0 for v in values) / len(values)
    assert density(case.weight) == expected, case.weight


@given(cases())
def test_density_of_a_projection_is_at_most_the_pattern(case: Case) -> None:
    weight, pattern, dim = case
    assert density(nm_project(weight, pattern, dim)) <= pattern.density, case


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, -0.0, 1.0, 0.0], 0.25),
        ([math.nan, 0.0], 0.5),
        ([1e-45, math.inf], 1.0),
        ([-0.0, 0.0], 0.0),
        ([], 1.0),
    ],
    ids=str,
)
def test_density_of_odd_values(values: list[float], expected: float) -> None:
    assert density(torch.tensor(values)) == expected


def test_density_takes_a_parameter() -> None:
    assert density(torch.nn.Parameter(torch.tensor([1.0, 0.0]))) == 0.5


@given(cases(finite=True, dtypes=(torch.float32, torch.float16, torch.bfloat16)), st.data())
def test_kept_energy_equals_exact_arithmetic(case: Case, data: st.DataObject) -> None:
    # Every square of a float32 is a normal float64, so only the sums round.
    mask = data.draw(bool_masks(tuple(case.weight.shape)))
    squares = [Fraction(v) ** 2 for v in case.weight.flatten().tolist()]
    kept = sum(s for s, k in zip(squares, mask.flatten().tolist(), strict=True) if k)
    expected = float(kept / sum(squares)) if sum(squares) else 1.0
    assert kept_energy(case.weight, mask) == pytest.approx(expected, rel=1e-12), case


@given(cases(finite=True, dtypes=(torch.float32, torch.bfloat16)))
def test_kept_energy_of_a_mask_is_at_least_its_density(case: Case) -> None:
    weight, pattern, dim = case
    energy = kept_energy(weight, nm_mask(weight, pattern, dim))
    assert pattern.density - 1e-12 <= energy <= 1, f"{energy} < {pattern.density}"


def test_kept_energy_of_known_values() -> None:
    weight = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float16)
    assert kept_energy(weight, torch.tensor([False, True, True, False])) == 16 / 25
    assert kept_energy(torch.zeros(4), torch.zeros(4, dtype=torch.bool)) == 1.0
    # 60000**2 overflows float16 and float32 sums of many lose digits: float64 does neither.
    large = torch.full((4,), 60000.0, dtype=torch.float16)
    assert kept_energy(large, nm_mask(large, "1:4")) == 0.25


def test_kept_energy_selects_and_does_not_multiply() -> None:
    # 0 * Inf would make the kept sum NaN.
    weight = torch.tensor([1.0, math.inf])
    assert kept_energy(weight, torch.tensor([True, False])) == 0.0
