"""The strategies really make what they promise: otherwise every property test is weaker."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import reference
import strategies
import torch
from hypothesis import HealthCheck, Phase, given, settings
from strategies import Case

EXAMPLES = 200


def sample(strategy) -> list:
    """EXAMPLES values of a strategy, always the same ones."""
    seen = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value) -> None:
        seen.append(value)

    collect()
    return seen


@pytest.fixture(scope="module")
def sampled() -> list[Case]:
    return sample(strategies.cases())


@pytest.fixture(scope="module")
def sampled_traits(sampled: list[Case]) -> Counter[str]:
    """How many of the cases have each trait."""
    return Counter(trait for case in sampled for trait in traits(case))


def traits(case: Case) -> set[str]:
    """What is unusual about one case."""
    weight, pattern, dim = case
    values = weight.flatten().tolist()
    bits = reference.raw_bits(weight)
    keys = [reference.key(v, weight.dtype) for v in values]
    least_normal = torch.finfo(weight.dtype).smallest_normal
    nans = {b for v, b in zip(values, bits, strict=True) if math.isnan(v)}
    sign = 1 << (8 * weight.element_size() - 1)
    mask = reference.nm_mask(weight, pattern.n, pattern.m, dim)
    found = {
        "tie": any(
            len({keys[i] for i in g}) < len(g)
            for g in reference.groups_of(weight.shape, pattern.m, dim)
        ),
        "tie at the cut": any(
            {keys[i] for i in g if mask[i]} & {keys[i] for i in g if not mask[i]}
            for g in reference.groups_of(weight.shape, pattern.m, dim)
        ),
        "nan": bool(nans),
        "nan payloads": len({b & ~sign for b in nans}) > 1,
        "nan of both signs": {bool(b & sign) for b in nans} == {True, False},
        "inf": any(math.isinf(v) for v in values),
        "negative zero": sign in bits,
        "positive zero": 0 in bits,
        "denormal": any(0 < abs(v) < least_normal for v in values),
        "non-contiguous": not weight.is_contiguous(),
        "offset": weight.storage_offset() > 0,
        "odd size": any(size % 2 and size > 1 for size in weight.shape),
        "several groups": weight.shape[dim] > pattern.m,
        "inner dim": dim < weight.ndim - 1 and weight.shape[-1] > 1,
        "n == m": pattern.n == pattern.m,
        "m > 16": pattern.m > 16,
        "m is odd": pattern.m % 2 == 1,
    }
    return {name for name, value in found.items() if value}


@pytest.mark.parametrize(
    ("trait", "share"),
    [
        ("tie", 0.5),
        ("tie at the cut", 0.25),
        ("nan", 0.5),
        ("nan payloads", 0.3),
        ("nan of both signs", 0.3),
        ("inf", 0.3),
        ("negative zero", 0.3),
        ("positive zero", 0.3),
        ("denormal", 0.5),
        ("non-contiguous", 0.2),
        ("offset", 0.1),
        ("odd size", 0.2),  # hypothesis draws some sizes from constants in this source
        ("several groups", 0.3),
        ("inner dim", 0.02),
        ("n == m", 0.1),
        ("m > 16", 0.1),
        ("m is odd", 0.2),
    ],
)
def test_cases_make_common(sampled_traits: Counter[str], trait: str, share: float) -> None:
    count = sampled_traits[trait]
    assert count >= share * EXAMPLES, f"{trait}: {count} of {EXAMPLES} cases"


def test_cases_cover_every_dtype_and_rank(sampled: list[Case]) -> None:
    dtypes = Counter(case.weight.dtype for case in sampled)
    ranks = Counter(case.weight.ndim for case in sampled)
    assert set(dtypes) == set(strategies.DTYPES), dtypes
    assert set(ranks) == {1, 2, 3, 4, 5}, ranks


def test_cases_fit_their_pattern(sampled: list[Case]) -> None:
    for weight, pattern, dim in sampled:
        assert weight.shape[dim] % pattern.m == 0, f"{tuple(weight.shape)}, {pattern}, dim {dim}"
        assert weight.numel() <= 300, f"{tuple(weight.shape)} is slow to test"


def test_cases_finite_are_finite() -> None:
    for case in sample(strategies.cases(finite=True)):
        assert case.weight.isfinite().all(), case.weight


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
def test_lay_out_keeps_every_bit(layout: str, dtype: torch.dtype) -> None:
    specials = list(strategies.special_bits(dtype).values())  # 12 of them
    weight = strategies.from_bits(specials, dtype).view(3, 2, 1, 2)
    other = strategies.lay_out(weight, layout)
    assert reference.raw_bits(other) == specials, f"{layout}: {other}"
    assert other.is_contiguous() == (layout == "contiguous"), f"{layout}: {other.stride()}"


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
def test_special_bits_are_what_their_names_say(dtype: torch.dtype) -> None:
    special, info = strategies.special_bits(dtype), torch.finfo(dtype)
    value = dict(
        zip(special, strategies.from_bits(list(special.values()), dtype).tolist(), strict=True)
    )
    least = info.smallest_normal * info.eps
    assert value["zero"] == 0
    assert value["least denormal"] == least, value
    assert value["largest denormal"] == info.smallest_normal - least, value
    assert value["least normal"] == info.smallest_normal, value
    assert value["one"] == 1, value
    assert value["next after one"] == 1 + info.eps, value
    assert value["two"] == 2, value
    assert value["largest finite"] == info.max, value
    assert value["inf"] == math.inf, value
    for name in ("signalling nan", "quiet nan", "nan of ones"):
        assert math.isnan(value[name]), f"{name}: {value[name]}"


@pytest.mark.parametrize("max_m", [1, 4, 64])
def test_patterns_cover_the_range(max_m: int) -> None:
    seen = sample(strategies.patterns(max_m))
    assert all(1 <= p.n <= p.m <= max_m for p in seen), seen
    assert {p.m for p in seen} >= {1, max_m}, Counter(p.m for p in seen)
    assert any(p.n == p.m for p in seen), Counter(seen)


def test_bool_masks_have_both_values() -> None:
    shares = [mask.float().mean().item() for mask in sample(strategies.bool_masks((3, 5)))]
    assert min(shares) < 0.3, min(shares)
    assert max(shares) > 0.7, max(shares)
