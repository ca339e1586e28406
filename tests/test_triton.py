"""The GPU kernels of nmfx::sr_ste against the formulas, bit for bit (NaN payloads: see `equal`).

With a GPU they run on it; without one in Triton's interpreter (conftest.py), which follows the same
program with numpy. What a compiler may do to it, `test_triton_compiled.py` reads in its output.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, Case, cases, element_bits, from_bits, lay_out
from test_rank import awkward
from torch import Tensor

from nmfx.errors import NMError
from nmfx.kernels import triton
from nmfx.mask import as_bits, nm_project
from nmfx.ops.sr_ste import ABI, _backward_eager, _forward_eager, make_control

pytest.importorskip("triton", reason="triton is not installed: the GPU kernels cannot run")
from triton_interpreter import rounding_bfloat16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MS = (2, 3, 4, 5, 8, 12, 16, 32, 64)
NARROWER = {
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float16: (torch.bfloat16,),
    torch.bfloat16: (torch.float16,),
}

# numpy's, in the interpreter: overflows and NaN are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def _bfloat16() -> Iterator[None]:
    with rounding_bfloat16():
        yield


def equal(actual: Tensor, wanted: Tensor, *, payloads: bool = True) -> None:
    """Same dtype, strides and bits; with `payloads=False` any NaN equals any NaN.

    Kept weights and gradients are copied, payload and all. What is computed or rounded has the NaN
    that the processor makes, and that differs even between a CPU and a GPU that both run torch.
    """
    assert actual.dtype == wanted.dtype, actual.dtype
    assert actual.shape == wanted.shape, actual.shape
    assert actual.stride() == wanted.stride(), (actual.stride(), wanted.stride())
    if not payloads:
        actual, wanted = ((x.masked_fill(x.isnan(), torch.nan)) for x in (actual, wanted))
    assert torch.equal(as_bits(actual), as_bits(wanted)), f"{actual}\nis not\n{wanted}"


def check_project(weight: Tensor, n: int, m: int, dim: int, dtype: torch.dtype | None) -> None:
    control = make_control(0.3, n, weight.device)
    before = as_bits(weight).clone()
    actual = triton.project(weight, control, m, dim, dtype)
    equal(actual, _forward_eager(weight, control, m, dim, ABI, dtype), payloads=dtype is None)
    if dtype is None:
        assert torch.equal(as_bits(actual), as_bits(nm_project(weight, (n, m), dim)))
    assert torch.equal(as_bits(weight), before), "the weight has changed"


def check_gradient(
    grad: Tensor, weight: Tensor, n: int, m: int, dim: int, lambda_w: float = 0.3
) -> None:
    control = make_control(lambda_w, n, weight.device)
    wanted = _backward_eager(grad, weight, control, m, dim, ABI)
    equal(triton.gradient(grad, weight, control, m, dim), wanted, payloads=False)
    # Two of the strides of `grad`, which `empty_like` would close the gaps of.
    in_place, decayed = (
        torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype, device=DEVICE).copy_(x)
        for x in (grad, wanted)
    )
    assert triton.decay_(in_place, weight, control, m, dim) is None
    equal(in_place, decayed, payloads=False)


def gradient_for(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Of every size from 2^-20 to 2^20, in the layout of the weight."""
    sizes = torch.exp2(torch.randint(-20, 20, weight.shape, device=DEVICE))
    return torch.empty_like(weight, dtype=dtype).copy_(torch.randn_like(sizes) * sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_equals_the_formula_for_ties_nan_and_inf(
    dtype: torch.dtype, m: int, layout: str
) -> None:
    weight = lay_out(awkward(dtype, m)[:2, : 2 * m].reshape(2, 2 * m, 2, 1), layout).to(DEVICE)
    turn = LAYOUTS.index(layout)
    ns = sorted({1, (m + 1) // 2, m})
    # Large groups are slow in the interpreter: their Ns take turns over the layouts.
    for n in ns if m < 32 else [ns[turn % len(ns)]]:
        check_project(weight, n, m, 1, None)
    n = 1 + turn * (m - 1) // 3
    if turn % 2 == DTYPES.index(dtype) % 2:
        check_project(weight, n, m, 1, NARROWER[dtype][m % len(NARROWER[dtype])])
    else:
        control = make_control(0.3, n, DEVICE)
        grad = gradient_for(weight, dtype)
        wanted = _backward_eager(grad, weight, control, m, 1, ABI)
        equal(triton.gradient(grad, weight, control, m, 1), wanted, payloads=False)


@settings(max_examples=25)
@given(case=cases(), data=st.data(), lambda_w=st.sampled_from([0.0, 2e-4, 0.3, -1.0, 1e300]))
def test_triton_equals_the_formula(case: Case, data: st.DataObject, lambda_w: float) -> None:
    (n, m), dim, weight = (case.pattern.n, case.pattern.m), case.dim, case.weight.to(DEVICE)
    assume(m > 1)
    check_project(weight, n, m, dim, data.draw(st.sampled_from([None, *NARROWER[weight.dtype]])))
    dtype = data.draw(st.sampled_from([weight.dtype, *DTYPES]))
    count = weight.numel()
    bits = data.draw(st.lists(element_bits(dtype), min_size=count, max_size=count))
    layout = data.draw(st.sampled_from(LAYOUTS))
    grad = lay_out(from_bits(bits, dtype).view(weight.shape), layout).to(DEVICE)
    check_gradient(grad, weight, n, m, dim - weight.ndim, lambda_w)


@pytest.mark.parametrize("shape", [(3, 700), (700, 3), (5, 12, 7, 9)], ids=str)
@pytest.mark.parametrize("m", [4, 7, 12])
def test_triton_serves_more_than_one_tile(shape: tuple[int, ...], m: int) -> None:
    dim = 0 if shape[0] > 9 else 1
    sizes = list(shape)
    sizes[dim] = sizes[dim] // m * m or m
    weight = torch.randn(sizes, device=DEVICE)
    check_project(weight, m // 2, m, dim, torch.bfloat16)
    check_gradient(torch.randn_like(weight), weight, m // 2, m, dim)


def test_triton_pruned_places_are_positive_zero() -> None:
    weight = torch.tensor([[-0.0, -1.0, -0.0, -2.0]], device=DEVICE)
    out = triton.project(weight, make_control(0.0, 1, DEVICE), 4, 1)
    assert as_bits(out).tolist() == as_bits(torch.tensor([[0.0, 0.0, 0.0, -2.0]])).tolist()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_triton_takes_empty_weights(shape: tuple[int, ...]) -> None:
    weight = torch.empty(shape, device=DEVICE)
    check_project(weight, 2, 4, 1, torch.bfloat16)
    check_gradient(torch.empty_like(weight), weight, 2, 4, 1)


def test_triton_refuses_groups_that_straddle_rows() -> None:
    weight = torch.empty(2, 6, device=DEVICE)
    message = r"size 6 of dim 1 \(shape \(2, 6\)\) is not a multiple of 4"
    with pytest.raises(NMError, match=message):
        triton.project(weight, make_control(0.0, 2, DEVICE), 4, 1)
