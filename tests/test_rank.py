"""The fast ranks against their definition, `nmfx.mask.rank`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, Case, cases, from_bits, lay_out, special_bits
from torch import Tensor

from nmfx.kernels.rank import PAIRWISE_MAX_M, rank_eager, rank_pointwise
from nmfx.mask import rank

# torch's own, when Inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

FAST = {"eager": rank_eager, "pointwise": rank_pointwise}


def assert_ranks(actual: Tensor, weight: Tensor, m: int, dim: int) -> None:
    expected = rank(weight, m, dim)
    assert actual.dtype == expected.dtype == torch.int8, actual.dtype
    assert actual.shape == weight.shape, actual.shape
    assert torch.equal(actual, expected), f"{weight}\n{actual}\nis not\n{expected}"


def awkward(dtype: torch.dtype, m: int) -> Tensor:
    """(6, 4 * m, 2): all special values with both signs, tied and shuffled, in every group."""
    positive = list(special_bits(dtype).values())
    sign = 1 << (8 * dtype.itemsize - 1)
    pool = positive + [bits | sign for bits in positive] + positive[:3]
    generator = torch.Generator().manual_seed(m)
    picks = torch.randint(len(pool), (6 * 4 * m * 2,), generator=generator).tolist()
    return from_bits([pool[i] for i in picks], dtype).view(6, 4 * m, 2)


@pytest.mark.parametrize("name", FAST)
@given(case=cases())
def test_rank_equals_the_definition(name: str, case: Case) -> None:
    weight, m, dim = case.weight, case.pattern.m, case.dim
    assert_ranks(FAST[name](weight, m, dim), weight, m, dim)
    assert_ranks(FAST[name](weight, m, dim - weight.ndim), weight, m, dim)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 8, 9, 16, 63, 64])
def test_rank_equals_the_definition_for_ties_nan_and_inf(
    name: str, dtype: torch.dtype, m: int
) -> None:
    weight = awkward(dtype, m)
    assert_ranks(FAST[name](weight, m, 1), weight, m, 1)


def test_rank_eager_takes_both_branches_above() -> None:
    assert PAIRWISE_MAX_M == 8, "move the values of m in the test above around the new limit"


@pytest.mark.parametrize("name", FAST)
def test_rank_of_no_groups_is_empty(name: str) -> None:
    for shape in ((0, 8), (3, 0)):
        assert_ranks(FAST[name](torch.empty(shape), 4, 1), torch.empty(shape), 4, 1)


def compiled(m: int, dim: int) -> Callable[[Tensor], Tensor]:
    # dynamic=False: one kernel per shape, as in a model.
    return torch.compile(lambda weight: rank_pointwise(weight, m, dim), dynamic=False)


@pytest.mark.parametrize(
    ("dtype", "m", "dim", "layout"),
    [
        (torch.float32, 4, 1, "contiguous"),
        (torch.bfloat16, 4, 0, "sliced"),
        pytest.param(torch.float32, 16, 0, "sliced", marks=pytest.mark.deep),
        pytest.param(torch.bfloat16, 16, 1, "contiguous", marks=pytest.mark.deep),
        pytest.param(torch.float64, 3, 1, "transposed", marks=pytest.mark.deep),
        pytest.param(torch.float16, 8, 2, "transposed", marks=pytest.mark.deep),
    ],
)
def test_rank_pointwise_compiled_equals_the_definition(
    dtype: torch.dtype, m: int, dim: int, layout: str
) -> None:
    weight = lay_out(awkward(dtype, m).movedim(1, dim), layout)
    assert_ranks(compiled(m, dim)(weight), weight, m, dim)


@pytest.mark.deep
@settings(max_examples=25)
@given(case=cases(max_m=16))
def test_rank_pointwise_compiled_equals_the_definition_anywhere(case: Case) -> None:
    torch.compiler.reset()  # every example is another shape
    weight, m, dim = case.weight, case.pattern.m, case.dim
    assert_ranks(compiled(m, dim)(weight), weight, m, dim)
