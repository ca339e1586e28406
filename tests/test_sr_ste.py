"""nmfx::sr_ste in eager mode: the projection bit for bit, the gradient exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import raw_bits
from strategies import DTYPES, LAYOUTS, Case, cases, from_bits, lay_out, special_bits
from torch import Tensor

import nmfx
from nmfx.mask import nm_mask, nm_project
from nmfx.ops.sr_ste import ABI, make_control, sr_ste

LAMBDAS = (0.0, 2e-4, 2.0**-6, 0.3)


def exact_gradient(grad: Tensor, weight: Tensor, mask: Tensor, lambda_w: float) -> Tensor:
    """g + lambda * (1 - mask) * w; half precision is computed in float32 and rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = torch.tensor(lambda_w, dtype=wide)
    decayed = grad.to(wide) + factor * weight.to(wide)
    return torch.where(mask, grad, decayed.to(weight.dtype))


def gradient(weight: Tensor, pattern: str, dim: int, lambda_w: float, grad: Tensor) -> Tensor:
    """The gradient that autograd gives a leaf with the values and layout of `weight`."""
    leaf = weight.detach().requires_grad_()
    parsed = nmfx.Pattern.parse(pattern)
    out = sr_ste(leaf, make_control(lambda_w, parsed.n), parsed.m, dim)
    (result,) = torch.autograd.grad(out, leaf, grad)
    return result


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@given(cases())
def test_sr_ste_equals_the_projection_bit_for_bit(case: Case) -> None:
    weight, pattern, dim = case
    control = make_control(2e-4, pattern.n)
    expected = raw_bits(nm_project(weight, pattern, dim))
    for signed_dim in (dim, dim - weight.ndim):
        out = sr_ste(weight, control, pattern.m, signed_dim)
        assert out.dtype == weight.dtype, out.dtype
        assert out.stride() == torch.empty_like(weight).stride(), out.stride()
        assert raw_bits(out) == expected, f"{case}: {out}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_sr_ste_of_a_conv_weight_in_any_layout(dtype: torch.dtype, layout: str) -> None:
    pool = [*special_bits(dtype).values()] * 16
    picks = torch.randperm(len(pool)).tolist()
    weight = lay_out(from_bits([pool[i] for i in picks], dtype).view(4, 8, 3, 2), layout)
    out = sr_ste(weight, make_control(0.0, 2), 4, 1)
    assert raw_bits(out) == raw_bits(nm_project(weight, "2:4", 1)), f"{weight}\n{out}"
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last), out.stride()


@given(cases(), st.sampled_from(LAMBDAS))
def test_sr_ste_gradient_is_exact(case: Case, lambda_w: float) -> None:
    weight, pattern, dim = case
    grad = torch.randn(weight.shape).to(weight.dtype)
    mask = nm_mask(weight, pattern, dim)
    actual = gradient(weight, pattern.text, dim, lambda_w, grad)
    expected = exact_gradient(grad, weight, mask, lambda_w)
    assert_equal(actual, expected)
    # Said once more without the helper: a kept weight gets its own gradient, bit for bit.
    assert raw_bits(actual[mask]) == raw_bits(grad[mask]), f"{case}: {actual}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sr_ste_gradient_of_kept_zeros_is_the_plain_one(dtype: torch.dtype) -> None:
    # 2:4 keeps one or two zeros in each of these groups.
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, -0.0]], dtype=dtype)
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0]], dtype=dtype)
    assert_equal(gradient(weight, "2:4", 1, 0.5, grad), grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sr_ste_with_lambda_zero_is_the_straight_through_estimator(dtype: torch.dtype) -> None:
    weight, grad = torch.randn(6, 16).to(dtype), torch.randn(6, 16).to(dtype)
    assert raw_bits(gradient(weight, "1:4", 1, 0.0, grad)) == raw_bits(grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sr_ste_gradient_in_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    # The decay alone, 2e-4 * w, is below half a unit of g here unless the sum is rounded once:
    # the expected values come from float64.
    weight = torch.linspace(-3, 3, 512, dtype=torch.float64).to(dtype).view(8, 64)
    grad = torch.linspace(1, 1.5, 512, dtype=torch.float64).to(dtype).view(8, 64)
    mask = nm_mask(weight, "2:4", 1)
    decay = torch.where(mask, 0.0, 0.03 * weight.double())
    expected = (grad.double() + decay).to(dtype)
    twice = grad + decay.to(dtype)
    assert not torch.equal(expected, twice), "the example does not tell one rounding from two"
    assert_equal(gradient(weight, "2:4", 1, 0.03, grad), expected)


def test_sr_ste_gradient_takes_any_layout_of_the_incoming_gradient() -> None:
    weight = torch.randn(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    mask = nm_mask(weight, "2:4", 1)
    for grad in (
        torch.randn(8, 8, 3, 3),
        torch.randn(8, 8, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(1).expand(8, 8, 3, 3),
        torch.randn(8, 8, 6, 6)[..., ::2, ::2],
    ):
        actual = gradient(weight, "2:4", 1, 0.3, grad)
        assert_equal(actual, exact_gradient(grad, weight, mask, 0.3))


def test_sr_ste_double_backward_is_that_of_its_gradient_formula() -> None:
    # The gradient g + lambda (1 - mask) w is an ordinary function of g and w where masks do not
    # flip: gradcheck compares its derivatives with finite differences.
    order = torch.randperm(64).view(4, 16)
    weight = ((order + 1.0) * torch.sign(torch.randn(4, 16))).double().requires_grad_()
    grad = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    control = make_control(0.3, 2)

    def gradient_of(grad: Tensor, weight: Tensor) -> Tensor:
        out = sr_ste(weight, control, 4, 1)
        return torch.autograd.grad(out, weight, grad, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient_of, (grad, weight))
    mask = nm_mask(weight, "2:4", 1)
    (second,) = torch.autograd.grad(gradient_of(grad, weight).sum(), weight)
    assert_equal(second, 0.3 * (~mask).double())


def test_sr_ste_two_forwards_before_one_backward_add_up() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    first = sr_ste(weight, make_control(0.25, 2), 4, 1)
    second = sr_ste(weight, make_control(0.5, 1), 4, 1)
    (3.0 * first + second).sum().backward()
    half, quarter = nm_mask(weight, "2:4", 1), nm_mask(weight, "1:4", 1)
    expected = exact_gradient(torch.full((4, 8), 3.0), weight.detach(), half, 0.25)
    expected += exact_gradient(torch.ones(4, 8), weight.detach(), quarter, 0.5)
    torch.testing.assert_close(weight.grad, expected)


def test_sr_ste_refuses_a_backward_through_an_overwritten_weight() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    out = sr_ste(weight, make_control(0.25, 2), 4, 1)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def conv_weight(dtype: torch.dtype, layout: str, requires_grad: bool) -> Tensor:
    return lay_out(torch.randn(4, 8, 3, 2).to(dtype), layout).requires_grad_(requires_grad)


OPCHECK = [
    (torch.float32, "contiguous", True),
    (torch.float16, "channels_last", True),
    (torch.bfloat16, "transposed", True),
    (torch.float64, "sliced", False),
]
OPCHECK_DEEP = [
    pytest.param(dtype, layout, requires_grad, marks=pytest.mark.deep)
    for dtype in DTYPES
    for layout in LAYOUTS
    for requires_grad in (True, False)
    if (dtype, layout, requires_grad) not in OPCHECK
]


@pytest.mark.parametrize(("dtype", "layout", "requires_grad"), [*OPCHECK, *OPCHECK_DEEP])
def test_sr_ste_passes_opcheck(dtype: torch.dtype, layout: str, requires_grad: bool) -> None:
    weight = conv_weight(dtype, layout, requires_grad)
    args = (weight, make_control(2.0**-6, 2), 4, 1, ABI)
    torch.library.opcheck(torch.ops.nmfx.sr_ste.default, args)


@pytest.mark.parametrize(("dtype", "layout", "requires_grad"), [*OPCHECK, *OPCHECK_DEEP])
def test_sr_ste_backward_passes_opcheck(
    dtype: torch.dtype, layout: str, requires_grad: bool
) -> None:
    weight = conv_weight(dtype, layout, requires_grad)
    grad = torch.randn(4, 8, 3, 2).to(dtype).requires_grad_(requires_grad)
    args = (grad, weight, make_control(2.0**-6, 2), 4, 1, ABI)
    torch.library.opcheck(torch.ops.nmfx.sr_ste_backward.default, args)


@pytest.mark.parametrize(("dtype", "layout"), [case[:2] for case in OPCHECK])
def test_sr_ste_without_autograd_passes_opcheck(dtype: torch.dtype, layout: str) -> None:
    weight, control = conv_weight(dtype, layout, False), make_control(2.0**-6, 2)
    torch.library.opcheck(torch.ops.nmfx.sr_ste_project.default, (weight, control, 4, 1))
    grad = torch.randn(4, 8, 3, 2).to(dtype)
    args = (grad, weight, control, 4, 1, ABI)
    torch.library.opcheck(torch.ops.nmfx.sr_ste_gradient.default, args)
    mask = torch.rand(grad.shape) < 0.5
    torch.library.opcheck(torch.ops.nmfx.keep_project.default, (weight, mask))
    torch.library.opcheck(torch.ops.nmfx.keep_.default, (grad.clone(), mask))
    torch.library.opcheck(torch.ops.nmfx.sr_ste_decay_.default, args)
