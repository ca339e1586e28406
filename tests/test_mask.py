"""The definition of an N:M mask: its laws, against oracles, on the values that break masks."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, Case, cases, from_bits, lay_out, special_bits
from torch import Tensor

from nmfx.errors import NMError
from nmfx.mask import (
    as_bits,
    check_groups,
    is_nm,
    magnitude,
    nm_mask,
    nm_project,
    paper_mask,
    rank,
)
from nmfx.pattern import Pattern

NAN, INF = math.nan, math.inf


def flat(mask: Tensor) -> list[bool]:
    return mask.flatten().tolist()


# --- laws, on any weight -------------------------------------------------------------------------


@given(cases())
def test_mask_equals_the_oracle(case: Case) -> None:
    weight, (n, m), dim = case.weight, (case.pattern.n, case.pattern.m), case.dim
    mask = nm_mask(weight, case.pattern, dim)
    assert mask.dtype == torch.bool, mask.dtype
    assert mask.shape == weight.shape, mask.shape
    assert flat(mask) == reference.nm_mask(weight, n, m, dim), f"{case}: {mask}"


@given(cases())
def test_mask_keeps_exactly_n_of_every_group(case: Case) -> None:
    weight, pattern, dim = case
    mask = flat(nm_mask(weight, pattern, dim))
    for group in reference.groups_of(weight.shape, pattern.m, dim):
        kept = sum(mask[i] for i in group)
        assert kept == pattern.n, f"kept {kept} of group {group} in {case}"


@given(cases())
def test_mask_keeps_nothing_smaller_than_it_drops(case: Case) -> None:
    weight, pattern, dim = case
    mask = flat(nm_mask(weight, pattern, dim))
    keys = [reference.key(v, weight.dtype) for v in weight.flatten().tolist()]
    for group in reference.groups_of(weight.shape, pattern.m, dim):
        kept = [keys[i] for i in group if mask[i]]
        dropped = [keys[i] for i in group if not mask[i]]
        assert min(kept) >= max(dropped, default=0), f"{kept}, {dropped} in {case}"


@given(cases(finite=True, max_m=8))
def test_mask_is_the_best_of_all_choices(case: Case) -> None:
    weight, pattern, dim = case
    values, mask = weight.flatten().tolist(), flat(nm_mask(weight, pattern, dim))
    for group in reference.groups_of(weight.shape, pattern.m, dim):
        best = reference.best_choice([values[i] for i in group], pattern.n)
        kept = tuple(place for place, i in enumerate(group) if mask[i])
        total, most = (
            sum(abs(Fraction(values[group[p]])) for p in choice) for choice in (kept, best)
        )
        assert total == most, f"kept {kept}, better {best} of {[values[i] for i in group]}"
        assert kept == best, f"{[values[i] for i in group]}: a tie must keep the lower index"


@given(cases(), st.data())
def test_mask_ignores_signs(case: Case, data: st.DataObject) -> None:
    weight, pattern, dim = case
    sign = 1 << 8 * weight.element_size() - 1
    bits = reference.raw_bits(weight)
    flips = data.draw(st.lists(st.booleans(), min_size=len(bits), max_size=len(bits)))
    flipped = [b ^ sign if flip else b for b, flip in zip(bits, flips, strict=True)]
    other = from_bits(flipped, weight.dtype).view(weight.shape)
    assert torch.equal(nm_mask(other, pattern, dim), nm_mask(weight, pattern, dim)), case


def exponents_that_fit(weight: Tensor) -> tuple[int, int]:
    """The least and greatest k for which scaling every finite value by 2**k is exact."""
    mantissa = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
    info = torch.finfo(weight.dtype)
    least = math.frexp(info.smallest_normal)[1] - 1 - mantissa[weight.dtype]
    low, high = -4 * -least, 4 * -least
    for value in weight.flatten().tolist():
        if value and math.isfinite(value):
            whole, power = Fraction(value).as_integer_ratio(), math.frexp(value)[1]
            lowest = (whole[0] & -whole[0]).bit_length() - whole[1].bit_length()
            low, high = max(low, least - lowest), min(high, math.frexp(info.max)[1] - power)
    return low, high


@given(cases(), st.data())
def test_mask_ignores_scaling_by_powers_of_two(case: Case, data: st.DataObject) -> None:
    weight, pattern, dim = case
    k = data.draw(st.integers(*exponents_that_fit(weight)), "k")
    values = [math.ldexp(v, k) for v in weight.flatten().tolist()]
    scaled = torch.tensor(values, dtype=weight.dtype).view(weight.shape)
    back = [math.ldexp(v, -k) for v in scaled.flatten().tolist()]
    assert repr(back) == repr(weight.flatten().tolist()), f"2**{k} is not exact: the test is wrong"
    assert torch.equal(nm_mask(scaled, pattern, dim), nm_mask(weight, pattern, dim)), f"2**{k}"


@given(cases(), st.data())
def test_mask_follows_permuted_groups(case: Case, data: st.DataObject) -> None:
    weight, pattern, dim = case
    groups = weight.shape[dim] // pattern.m
    order = torch.tensor(data.draw(st.permutations(range(groups)), "order"))

    def permute(tensor: Tensor) -> Tensor:
        grouped = tensor.unflatten(dim, (groups, pattern.m))
        return grouped.index_select(dim, order).flatten(dim, dim + 1)

    mask = nm_mask(weight, pattern, dim)
    assert torch.equal(nm_mask(permute(weight), pattern, dim), permute(mask)), f"{order}: {case}"


@given(cases(), st.data())
def test_mask_follows_permuted_rows(case: Case, data: st.DataObject) -> None:
    weight, pattern, dim = case
    mask = nm_mask(weight, pattern, dim)
    for row_dim in set(range(weight.ndim)) - {dim}:
        order = torch.tensor(data.draw(st.permutations(range(weight.shape[row_dim])), "order"))
        got = nm_mask(weight.index_select(row_dim, order), pattern, dim)
        assert torch.equal(got, mask.index_select(row_dim, order)), f"dim {row_dim}, {order}"


@given(cases())
def test_mask_is_nested_in_the_mask_of_a_larger_n(case: Case) -> None:
    weight, (n, m), dim = case.weight, (case.pattern.n, case.pattern.m), case.dim
    mask = nm_mask(weight, (n, m), dim)
    larger = nm_mask(weight, (min(n + 1, m), m), dim)
    assert (larger | ~mask).all(), f"kept with {n} but not with {n + 1} of {m}: {case}"


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float64),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@given(data=st.data())
def test_mask_survives_an_exact_upcast(
    narrow: torch.dtype, wide: torch.dtype, data: st.DataObject
) -> None:
    weight, pattern, dim = data.draw(cases(dtypes=(narrow,)))
    upcast = nm_mask(weight.to(wide), pattern, dim)
    assert torch.equal(upcast, nm_mask(weight, pattern, dim)), weight


@given(cases(), st.sampled_from(LAYOUTS))
def test_mask_depends_on_values_not_strides(case: Case, layout: str) -> None:
    weight, pattern, dim = case
    other = lay_out(weight.contiguous(), layout)
    assert torch.equal(nm_mask(other, pattern, dim), nm_mask(weight, pattern, dim)), layout


@given(cases())
def test_mask_takes_negative_dims(case: Case) -> None:
    weight, pattern, dim = case
    same = torch.equal(nm_mask(weight, pattern, dim - weight.ndim), nm_mask(weight, pattern, dim))
    assert same, case


@given(cases())
def test_project_is_idempotent(case: Case) -> None:
    weight, pattern, dim = case
    once = nm_project(weight, pattern, dim)
    twice = nm_project(once, pattern, dim)
    assert reference.raw_bits(twice) == reference.raw_bits(once), f"{once}, {twice}"
    # Kept zeros are the first of their group, so even the mask repeats.
    assert torch.equal(nm_mask(once, pattern, dim), nm_mask(weight, pattern, dim)), case


@given(cases())
def test_project_keeps_bits_and_drops_to_positive_zero(case: Case) -> None:
    weight, pattern, dim = case
    before = reference.raw_bits(weight)
    projected = nm_project(weight, pattern, dim)
    mask = flat(nm_mask(weight, pattern, dim))
    expected = [b if kept else 0 for b, kept in zip(before, mask, strict=True)]
    assert reference.raw_bits(projected) == expected, f"{case}: {projected}"
    assert reference.raw_bits(weight) == before, "the argument was changed"


@given(cases())
def test_is_nm_equals_the_oracle(case: Case) -> None:
    weight, pattern, dim = case
    expected = reference.is_nm(weight, pattern.n, pattern.m, dim)
    assert is_nm(weight, pattern, dim) == expected, case


@given(cases())
def test_is_nm_holds_for_every_projection(case: Case) -> None:
    weight, pattern, dim = case
    assert is_nm(nm_project(weight, pattern, dim), pattern, dim), case


@given(cases())
def test_rank_is_a_permutation_ordered_by_magnitude(case: Case) -> None:
    weight, pattern, dim = case
    ranks = rank(weight, pattern.m, dim)
    assert ranks.dtype == torch.int8, ranks.dtype
    keys = [reference.key(v, weight.dtype) for v in weight.flatten().tolist()]
    places = ranks.flatten().tolist()
    for group in reference.groups_of(weight.shape, pattern.m, dim):
        order = sorted(group, key=lambda i: (-keys[i], i))
        assert [places[i] for i in order] == list(range(pattern.m)), f"{group}: {case}"


@given(cases())
def test_magnitude_sorts_like_the_oracle_key(case: Case) -> None:
    keys = [reference.key(v, case.weight.dtype) for v in case.weight.flatten().tolist()]
    magnitudes = magnitude(case.weight).flatten().tolist()
    by_key = {}
    for k, value in zip(keys, magnitudes, strict=True):
        assert by_key.setdefault(k, value) == value, f"key {k} has two magnitudes"
    ordered = [by_key[k] for k in sorted(by_key)]
    assert ordered == sorted(set(ordered)), f"{by_key}"


# --- the order, spelled out ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_special_values(dtype: torch.dtype) -> None:
    special = special_bits(dtype)
    names = ["zero", "least denormal", "largest denormal", "least normal", "one"]
    names += ["next after one", "two", "largest finite", "inf", "quiet nan"]
    for smaller, larger in itertools.combinations(names, 2):
        for first, second in ((smaller, larger), (larger, smaller)):
            pair = from_bits([special[first], special[second]], dtype)
            kept = flat(nm_mask(pair, "1:2"))
            assert kept == [first == larger, second == larger], f"{first}, {second}: kept {kept}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", ["signalling nan", "quiet nan", "nan of ones"])
@pytest.mark.parametrize("second", ["signalling nan", "quiet nan", "nan of ones"])
def test_order_all_nans_are_equal(dtype: torch.dtype, first: str, second: str) -> None:
    special, sign = special_bits(dtype), 1 << 8 * dtype.itemsize - 1
    for signs in itertools.product((0, sign), repeat=2):
        pair = from_bits([special[first] | signs[0], special[second] | signs[1]], dtype)
        assert flat(nm_mask(pair, "1:2")) == [True, False], f"{first}, {second}: {signs}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("values", "pattern", "kept"),
    [
        ([1, 1, 1, 1], "2:4", [0, 1]),
        ([1, -1, 1, -1], "2:4", [0, 1]),
        ([0, -1, 1, 1], "2:4", [1, 2]),
        ([0.0, -0.0, 0.0, -0.0], "2:4", [0, 1]),
        ([-0.0, 0.0], "1:2", [0]),
        ([NAN, NAN, NAN, 1], "2:4", [0, 1]),  # a rank comparison with > and == keeps all four
        ([NAN, NAN, NAN, NAN], "2:4", [0, 1]),
        ([1, NAN, 2, INF], "2:4", [1, 3]),
        ([INF, 1, 2, 3], "2:4", [0, 3]),  # Inf is the largest number: never dropped for a finite
        ([1, -INF, INF, INF], "2:4", [1, 2]),
        ([-3, 1, 2, -4], "2:4", [0, 3]),  # by magnitude, not by signed value
        ([1, 9, 8, 7], "2:4", [1, 2]),
        ([1, 2, 3, 4], "1:4", [3]),
        ([1, 2, 3, 4], "3:4", [1, 2, 3]),
        ([1, 2, 3, 4], "2:2", [0, 1, 2, 3]),
        ([5, 4, 3, 2, 1, 2], "2:3", [0, 1, 3, 5]),
        ([1, 2], "1:1", [0, 1]),
    ],
    ids=str,
)
def test_mask_of_known_groups(
    values: list[float], pattern: str, kept: list[int], dtype: torch.dtype
) -> None:
    mask = flat(nm_mask(torch.tensor(values, dtype=dtype), pattern))
    assert [i for i, is_kept in enumerate(mask) if is_kept] == kept, mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_prunes_negative_zero_to_positive_zero(dtype: torch.dtype) -> None:
    # A multiplication by the mask would leave -0.0, NaN and (as 0 * Inf) a new NaN behind.
    weight = torch.tensor([1, -0.0, -0.5, 2, NAN, NAN, NAN, INF], dtype=dtype)
    bits = reference.raw_bits(weight)
    projected = reference.raw_bits(nm_project(weight, "2:4"))
    assert projected == [bits[0], 0, 0, bits[3], bits[4], bits[5], 0, 0], projected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 16, 64])
def test_project_with_n_equal_m_changes_nothing(dtype: torch.dtype, m: int) -> None:
    specials = list(special_bits(dtype).values())
    weight = from_bits((specials * m)[: 3 * m], dtype).view(1, 3 * m)
    projected = nm_project(weight, (m, m))
    assert nm_mask(weight, (m, m)).all(), weight
    assert reference.raw_bits(projected) == reference.raw_bits(weight), projected
    assert projected.data_ptr() != weight.data_ptr(), "a projection is a new tensor"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_ignores_the_flush_denormal_flag(dtype: torch.dtype) -> None:
    weight = from_bits([3, 1, 2, 0, 0, 2, 3, 1, 5, 5, 4, 6], dtype)  # denormals and zero
    usual = reference.raw_bits(nm_project(weight, "2:4"))
    assert usual == [3, 0, 2, 0, 0, 2, 3, 0, 5, 0, 0, 6], usual
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-denormal flag")
    try:
        assert torch.tensor([1e-40]).mul(1.0).view(torch.int32).item() == 0, "the flag does nothing"
        flushed = reference.raw_bits(nm_project(weight, "2:4"))
        counted = is_nm(weight, "2:4"), is_nm(weight, "3:4")
    finally:
        torch.set_flush_denormal(False)
    assert flushed == usual, flushed
    assert counted == (False, False), "is_nm calls a denormal zero"


@pytest.mark.parametrize("make", [nm_mask, nm_project], ids=lambda f: f.__name__)
def test_mask_is_detached_and_new(make) -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    out = make(weight, "2:4", 1)
    assert type(out) is torch.Tensor, type(out)
    assert not out.requires_grad, out
    out.zero_()
    assert weight.tolist() == [[1, 2, 3, 4]], weight


def test_as_bits_is_a_view() -> None:
    weight = torch.zeros(4, 4).T[::2]
    assert as_bits(weight).data_ptr() == weight.data_ptr()
    assert as_bits(weight).stride() == weight.stride()
    as_bits(weight).fill_(0x3F80_0000)
    assert torch.equal(weight, torch.ones(2, 4)), weight


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dim", "size"),
    [
        ((6, 10), 1, 10),  # reshapes to (15, 4) without a word: groups would cross rows
        ((8, 3, 3, 3), 1, 3),  # a 3-channel stem: groups would cross kernel positions
        ((64, 1, 3, 3), 1, 1),  # depthwise
        ((4, 6), -1, 6),
        ((2, 4, 5), 2, 5),
        ((6, 4), 0, 6),
    ],
    ids=str,
)
@pytest.mark.parametrize("use", [nm_mask, nm_project, is_nm], ids=lambda f: f.__name__)
def test_groups_never_cross_rows(use, shape: tuple[int, ...], dim: int, size: int) -> None:
    with pytest.raises(NMError) as caught:
        use(torch.ones(shape), "2:4", dim)
    assert str(caught.value) == (
        f"size {size} of dim {dim % len(shape)} (shape {shape}) is not a multiple of 4, "
        f"so 2:4 (keep 2 of every 4) groups would straddle rows"
    )


@pytest.mark.parametrize(
    ("shape", "dim"), [((4,), 1), ((4,), -2), ((4, 4), 2), ((4, 4), -3), ((), 0), ((), -1)], ids=str
)
@pytest.mark.parametrize("use", [nm_mask, nm_project, is_nm], ids=lambda f: f.__name__)
def test_groups_refuse_a_dim_that_does_not_exist(use, shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(NMError) as caught:
        use(torch.ones(shape), "1:1", dim)
    assert str(caught.value) == f"dim={dim} does not exist in a tensor of shape {shape}"


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8],
    ids=str,
)
@pytest.mark.parametrize("use", [nm_mask, nm_project, is_nm], ids=lambda f: f.__name__)
def test_groups_refuse_other_dtypes(use, dtype: torch.dtype) -> None:
    with pytest.raises(NMError) as caught:
        use(torch.zeros(4, dtype=dtype), "2:4")
    assert str(caught.value) == (
        f"dtype {dtype} has no N:M order; use float16, bfloat16, float32 or float64"
    )


@pytest.mark.parametrize("use", [nm_mask, nm_project, is_nm, paper_mask], ids=lambda f: f.__name__)
def test_groups_refuse_a_bad_pattern(use) -> None:
    with pytest.raises(NMError, match="breaks 1 <= N <= M <= 64"):
        use(torch.ones(4, 4), "4:2")


@pytest.mark.parametrize(("dim", "expected"), [(0, 0), (1, 1), (-1, 1), (-2, 0)])
def test_check_groups_returns_a_plain_dim(dim: int, expected: int) -> None:
    assert check_groups(torch.ones(4, 8), Pattern(2, 4), dim) == expected


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 4, 0)], ids=str)
def test_mask_of_an_empty_weight_is_empty(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    assert nm_mask(weight, "2:4", 1).shape == shape
    assert nm_project(weight, "2:4", 1).shape == shape
    assert is_nm(weight, "2:4", 1)


def tensorrt_accepts(weight: Tensor, n: int, m: int) -> bool:
    """TensorRT's rule: for each k, r, s: count_nonzero(W[k, m*c : m*c + m, r, s]) <= n."""
    filters, channels, height, width = weight.shape
    nested = weight.tolist()
    return all(
        sum(nested[k][c + i][r][s] != 0 for i in range(m)) <= n
        for k in range(filters)
        for c in range(0, channels, m)
        for r in range(height)
        for s in range(width)
    )


@given(cases(ndim=4, dim=1, max_m=8))
def test_is_nm_equals_the_rule_of_tensorrt(case: Case) -> None:
    weight, (n, m) = case.weight, (case.pattern.n, case.pattern.m)
    assert is_nm(weight, (n, m), 1) == tensorrt_accepts(weight, n, m), weight
    assert tensorrt_accepts(nm_project(weight, (n, m), 1), n, m), weight


def test_is_nm_counts_groups_not_averages() -> None:
    assert is_nm(torch.tensor([1.0, 2, 0, 0, 0, 3, 0, 4]), "2:4")
    assert not is_nm(torch.tensor([1.0, 2, 3, 0, 0, 0, 0, 4]), "2:4"), "half zero is not 2:4"
    assert not is_nm(torch.tensor([0.0, 0, 1, 2, 3, 4, 0, 0]), "1:4")


def test_is_nm_counts_odd_values() -> None:
    assert is_nm(torch.tensor([-0.0, 1.0, -0.0, 2.0]), "2:4"), "-0.0 is a zero"
    assert not is_nm(torch.tensor([NAN, 1.0, 0.0, 2.0]), "2:4"), "NaN is not a zero"
    assert not is_nm(torch.tensor([1e-45, 1e-45, 1e-45, 0.0]), "2:4"), "a denormal is not a zero"


# --- the paper's groupings -----------------------------------------------------------------------


@st.composite
def paper_cases(draw: st.DrawFn) -> tuple[Case, str]:
    """Weights of 2 to 5 dimensions whose channels rarely divide by M, though their size does."""
    m = draw(st.sampled_from([1, 2, 3, 4, 8]))
    case = draw(cases(ndim=draw(st.integers(2, 5)), dim=draw(st.integers(0, 1)), max_m=m))
    return case, draw(st.sampled_from(["flat", "channels_last"]))


@given(paper_cases())
def test_paper_mask_equals_its_two_groupings(drawn: tuple[Case, str]) -> None:
    (weight, pattern, _), layout = drawn
    values = weight.flatten().tolist()
    expected = [False] * len(values)
    for group in reference.paper_groups(weight.shape, pattern.m, layout):
        kept = reference.keep([values[i] for i in group], pattern.n, weight.dtype)
        for i, is_kept in zip(group, kept, strict=True):
            expected[i] = is_kept
    mask = paper_mask(weight, pattern, layout)
    assert mask.shape == weight.shape, mask.shape
    assert flat(mask) == expected, f"{layout}: {weight} {mask}"


@given(cases(dim=1, ndim=4))
def test_paper_mask_in_channels_last_is_the_hardware_axis(case: Case) -> None:
    weight, pattern, _ = case
    expected = nm_mask(weight, pattern, 1)
    assert torch.equal(paper_mask(weight, pattern, "channels_last"), expected), case
    assert torch.equal(paper_mask(weight, pattern), expected), "the default is channels_last"


@given(cases(ndim=2, dim=1))
def test_paper_mask_of_a_linear_weight_has_one_grouping(case: Case) -> None:
    weight, pattern, _ = case
    expected = nm_mask(weight, pattern, 1)
    for layout in ("flat", "channels_last"):
        assert torch.equal(paper_mask(weight, pattern, layout), expected), layout


def test_paper_mask_flat_of_a_stem_crosses_kernel_positions() -> None:
    # What nm_mask refuses. Of 27 weights per filter, the seventh group spans two filters.
    weight = torch.arange(8 * 27, dtype=torch.float32).view(8, 3, 3, 3)
    mask = paper_mask(weight, "2:4", "flat")
    assert mask.view(-1, 4).tolist() == [[False, False, True, True]] * 54, mask
    # So filters keep 13 or 14 of their 27 weights.
    assert mask.sum((1, 2, 3)).tolist() == [13, 13, 14, 14] * 2, mask.sum((1, 2, 3))


def test_paper_mask_refuses_another_layout() -> None:
    with pytest.raises(NMError) as caught:
        paper_mask(torch.ones(4, 4), "2:4", "NHWC")
    assert str(caught.value) == "layout='NHWC' is not 'flat' or 'channels_last'"


@pytest.mark.parametrize("layout", ["flat", "channels_last"])
def test_paper_mask_refuses_a_size_that_does_not_divide(layout: str) -> None:
    with pytest.raises(NMError) as caught:
        paper_mask(torch.ones(5, 3, 1, 1), "2:4", layout)
    assert str(caught.value) == (
        "15 elements (shape (5, 3, 1, 1)) are not a multiple of 4, "
        "so they cannot be cut into 2:4 (keep 2 of every 4) groups"
    )
