"""nmfx::linear_nm in eager mode: values, gradients, errors.

The kernel that this process has runs here; `test_native_linear.py` takes all of them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Case, cases
from torch import Tensor

import nmfx
from nmfx.mask import nm_project
from nmfx.ops.linear_nm import linear_nm
from nmfx.ops.packed import ACTIVATIONS
from nmfx.packing import pack, unpack


def packed_case(
    dtype: torch.dtype = torch.float32, rows: int = 6, cols: int = 16, pattern: str = "2:4"
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], tuple[int, int, int, int]]:
    """(dense weight, (values, index, bias), (out_features, in_features, n, m))."""
    parsed = nmfx.Pattern.parse(pattern)
    weight = nm_project(torch.randn(rows, cols), parsed, 1).to(dtype)
    values, index = pack(weight, parsed)
    constants = (rows, cols, parsed.n, parsed.m)
    return weight, (values, index, torch.randn(rows).to(dtype)), constants


# Of the sum of absolute products, element by element: rounding the result included.
BOUNDS = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.float16: 2e-3,
    torch.bfloat16: 5e-3,
}


@given(cases(ndim=2, dim=1, finite=True), st.booleans(), st.sampled_from([(), (1,), (3,), (2, 3)]))
def test_linear_nm_is_near_the_float64_product_for_any_weight(
    case: Case, has_bias: bool, batch: tuple[int, ...]
) -> None:
    weight, pattern, _ = case
    dtype, weight = weight.dtype, nm_project(weight, pattern, 1)
    rows, cols = weight.shape
    values, index = pack(weight, pattern)
    x = torch.randn(*batch, cols).to(dtype)
    bias = torch.randn(rows).to(dtype) if has_bias else None
    actual = linear_nm(x, values, index, bias, rows, cols, pattern.n, pattern.m)
    assert actual.dtype == dtype, actual.dtype
    assert actual.shape == (*batch, rows), actual.shape
    dense = unpack(values, index, rows, cols, pattern).double()
    wide = None if bias is None else bias.double()
    wanted = F.linear(x.double(), dense, wide)
    terms = F.linear(x.double().abs(), dense.abs(), None if wide is None else wide.abs())
    # The largest weights add up to more than the dtype holds: then any order may overflow.
    safe = terms < torch.finfo(dtype).max / 4
    allowed = BOUNDS[dtype] * terms + torch.finfo(dtype).tiny
    off = (actual.double() - wanted).abs()
    assert (off <= allowed)[safe].all(), f"{off[safe]} > {allowed[safe]}"


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)], ids=str)
def test_linear_nm_of_an_empty_batch(batch: tuple[int, ...]) -> None:
    _, tensors, constants = packed_case()
    x = torch.randn(*batch, 16, requires_grad=True)
    out = linear_nm(x, *tensors, *constants)
    assert out.shape == (*batch, 6), out.shape
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.shape == x.shape, grad.shape


def test_linear_nm_of_strided_inputs() -> None:
    weight, (values, index, bias), constants = packed_case()
    for x in (
        torch.randn(16, 5).t(),
        torch.randn(5, 32)[:, ::2],
        torch.randn(5, 3, 16).transpose(0, 1),
        torch.randn(1, 16).expand(5, 16),
    ):
        actual = linear_nm(x, values, index, bias, *constants)
        torch.testing.assert_close(actual, F.linear(x, weight, bias))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_nm_gradients_equal_those_of_a_dense_layer(
    dtype: torch.dtype, batch: tuple[int, ...]
) -> None:
    weight, (values, index, bias), constants = packed_case(dtype)
    x, grad = torch.randn(*batch, 16).to(dtype), torch.randn(*batch, 6).to(dtype)
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    actual = torch.autograd.grad(linear_nm(x, values, index, bias, *constants), leaves, grad)
    wanted = torch.autograd.grad(F.linear(x, weight, bias), leaves, grad)
    for got, want in zip(actual, wanted, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape), got
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_nm_gradients_through_an_activation(activation: str) -> None:
    weight, (values, index, bias), constants = packed_case(torch.float64)
    x, grad = torch.randn(3, 16).double(), torch.randn(3, 6).double()
    leaves = [x.requires_grad_(), bias.requires_grad_()]

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return linear_nm(x, values, index, bias, *constants, activation)

    out, dense = run(x, bias), ACTIVATIONS[activation](F.linear(x, weight, bias))
    torch.testing.assert_close(out, dense)
    actual, wanted = (torch.autograd.grad(y, leaves, grad) for y in (out, dense))
    for got, want in zip(actual, wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_linear_nm_computes_only_the_gradients_that_are_asked_for() -> None:
    _, (values, index, bias), constants = packed_case()
    x = torch.randn(3, 16, requires_grad=True)
    linear_nm(x, values, index, bias, *constants).sum().backward()
    assert bias.grad is None
    assert x.grad is not None
    bias.requires_grad_()
    linear_nm(x.detach(), values, index, bias, *constants).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0)), bias.grad


def test_linear_nm_passes_gradcheck_twice() -> None:
    _, (values, index, bias), constants = packed_case(torch.float64, rows=3, cols=8)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    bias.requires_grad_()

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return linear_nm(x, values, index, bias, *constants).tanh()

    assert torch.autograd.gradcheck(run, (x, bias))
    assert torch.autograd.gradgradcheck(run, (x, bias))


def test_linear_nm_saves_only_the_packed_weight() -> None:
    _, (values, index, bias), constants = packed_case()
    x = torch.randn(3, 16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_nm(x, values, index, bias, *constants)
    addresses = {tensor.data_ptr() for tensor in saved}
    assert addresses == {values.data_ptr(), index.data_ptr()}, saved
    saved.clear()  # the gradient of an activation needs what went into it
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_nm(x, values, index, bias, *constants, "gelu")
    addresses = {tensor.data_ptr() for tensor in saved}
    assert addresses == {t.data_ptr() for t in (values, index, x, bias)}, saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_nm_under_autocast_equals_linear(dtype: torch.dtype) -> None:
    weight, (values, index, bias), constants = packed_case()
    x = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        actual, wanted = linear_nm(x, values, index, bias, *constants), F.linear(x, weight, bias)
    assert actual.dtype == wanted.dtype == dtype, actual.dtype
    torch.testing.assert_close(actual, wanted)
    (got,), (want,) = (torch.autograd.grad(out.sum(), x) for out in (actual, wanted))
    torch.testing.assert_close(got, want)


def test_linear_nm_under_autocast_leaves_float64_alone_as_linear_does() -> None:
    weight, (values, index, bias), constants = packed_case(torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, wanted = linear_nm(x, values, index, bias, *constants), F.linear(x, weight, bias)
    assert actual.dtype == wanted.dtype == torch.float64, actual.dtype
    torch.testing.assert_close(actual, wanted)


def test_linear_nm_under_autocast_takes_mixed_dtypes_as_linear_does() -> None:
    _, (values, index, bias), constants = packed_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_nm(torch.randn(3, 16, dtype=torch.bfloat16), values, index, bias, *constants)
    assert out.dtype == torch.bfloat16, out.dtype


# --- errors ------------------------------------------------------------------------------------


def refused(*args: object) -> str:
    """The message of the NMError that a call raises."""
    with pytest.raises(nmfx.NMError) as error:
        linear_nm(*args)
    return str(error.value)


def test_linear_nm_refuses_a_gradient_of_its_weight() -> None:
    _, (values, index, bias), constants = packed_case()
    text = refused(torch.randn(3, 16), values.requires_grad_(), index, bias, *constants)
    assert text == (
        "a packed weight has no gradient: train the sparsified model and lower it again, or "
        "freeze it with values.requires_grad_(False)"
    )
    with torch.no_grad():
        assert linear_nm(torch.randn(3, 16), values, index, bias, *constants).shape == (3, 6)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((), "input of shape () does not end in in_features=16"),
        ((3, 15), "input of shape (3, 15) does not end in in_features=16"),
        ((16, 3), "input of shape (16, 3) does not end in in_features=16"),
    ],
)
def test_linear_nm_refuses_inputs_of_another_width(shape: tuple[int, ...], text: str) -> None:
    _, tensors, constants = packed_case()
    assert refused(torch.randn(shape), *tensors, *constants) == text


def test_linear_nm_refuses_packed_tensors_that_do_not_fit() -> None:
    _, (values, index, bias), constants = packed_case()
    x = torch.randn(3, 16)
    fits = (
        "do not fit a (6, 16) weight with 2:4 (keep 2 of every 4), which needs (1, 8, 16) and "
        "(1, 1, 16) (torch.int32)"
    )
    assert refused(x, values[:, :4], index, bias, *constants) == (
        f"packed tensors of shapes (1, 4, 16) and (1, 1, 16) (torch.int32) {fits}"
    )
    assert refused(x, values, index[:, :0], bias, *constants) == (
        f"packed tensors of shapes (1, 8, 16) and (1, 0, 16) (torch.int32) {fits}"
    )
    assert refused(x, values[0], index, bias, *constants) == (
        f"packed tensors of shapes (8, 16) and (1, 1, 16) (torch.int32) {fits}"
    )
    assert refused(x, values, index.long(), bias, *constants) == (
        f"packed tensors of shapes (1, 8, 16) and (1, 1, 16) (torch.int64) {fits}"
    )
    strided = torch.empty(1, 16, 8).transpose(1, 2)
    assert refused(x, strided, index, bias, *constants) == (
        "packed tensors are contiguous; call .contiguous() on them"
    )
    assert refused(x[:, :15], values, index, bias, 6, 15, 2, 4) == (
        "15 columns are not a multiple of 4, as 2:4 (keep 2 of every 4) needs"
    )
    assert refused(x, values, index, bias[:3], *constants) == (
        "bias of shape (3,) does not fit 6 outputs"
    )


def test_linear_nm_refuses_a_pattern_outside_the_grammar() -> None:
    _, (values, index, bias), _ = packed_case()
    text = refused(torch.randn(3, 16), values, index, bias, 6, 16, 4, 2)
    assert "pattern 4:2 breaks 1 <= N <= M <= 64" in text, text


def test_linear_nm_refuses_an_unknown_activation() -> None:
    _, tensors, constants = packed_case()
    assert refused(torch.randn(3, 16), *tensors, *constants, "tanh") == (
        "activation='tanh' is none of none, relu, gelu, gelu_tanh, silu"
    )


def test_linear_nm_refuses_tensors_on_several_devices() -> None:
    _, (values, index, bias), constants = packed_case()
    assert refused(torch.randn(3, 16), values.to("meta"), index, bias, *constants) == (
        "input is on cpu, the packed weight on meta and cpu, the bias on cpu: move the whole "
        "model with .to(device)"
    )


def test_linear_nm_of_meta_tensors_as_linear() -> None:
    _, tensors, constants = packed_case()
    out = linear_nm(torch.empty(3, 16, device="meta"), *(t.to("meta") for t in tensors), *constants)
    assert out.shape == (3, 6), out.shape


def test_linear_nm_takes_a_bias_of_any_strides() -> None:
    weight, (values, index, _), constants = packed_case()
    x = torch.randn(3, 16)
    for bias in (torch.randn(12)[::2], torch.randn(1).expand(6)):
        actual = linear_nm(x, values, index, bias, *constants)
        torch.testing.assert_close(actual, F.linear(x, weight, bias))


def test_linear_nm_refuses_mixed_dtypes() -> None:
    _, (values, index, bias), constants = packed_case()
    advice = "move the whole model with .to(dtype), or run under torch.autocast"
    assert refused(torch.randn(3, 16), values.half(), index, bias.half(), *constants) == (
        f"input is torch.float32, the packed weight torch.float16, the bias torch.float16: {advice}"
    )
    assert refused(torch.randn(3, 16), values, index, bias.double(), *constants) == (
        f"input is torch.float32, the packed weight torch.float32, the bias torch.float64: {advice}"
    )
    assert refused(torch.randn(3, 16).double(), values, index, None, *constants) == (
        f"input is torch.float64, the packed weight torch.float32, the bias None: {advice}"
    )


# --- opcheck -----------------------------------------------------------------------------------

OPCHECK = [(torch.float32, (3,)), (torch.bfloat16, ())]
OPCHECK_DEEP = [
    pytest.param(dtype, batch, marks=pytest.mark.deep)
    for dtype in DTYPES
    for batch in ((), (3,), (2, 3))
    if (dtype, batch) not in OPCHECK
]


def opcheck(dtype: torch.dtype, batch: tuple[int, ...], activation: str) -> None:
    _, (values, index, bias), constants = packed_case(dtype)
    x = torch.randn(*batch, 16).to(dtype).requires_grad_()
    for some_bias in (bias.requires_grad_(), None):
        args = (x, values, index, some_bias, *constants, activation)
        torch.library.opcheck(torch.ops.nmfx.linear_nm.default, args)


@pytest.mark.parametrize(("dtype", "batch"), [*OPCHECK, *OPCHECK_DEEP], ids=str)
def test_linear_nm_passes_opcheck(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    opcheck(dtype, batch, "none")


@pytest.mark.deep
@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_tanh", "silu"])
def test_linear_nm_with_an_activation_passes_opcheck(activation: str) -> None:
    opcheck(torch.float32, (3,), activation)


@pytest.mark.parametrize(("dtype", "batch"), [*OPCHECK, *OPCHECK_DEEP], ids=str)
def test_linear_nm_grad_input_passes_opcheck(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    _, (values, index, _), constants = packed_case(dtype)
    grad = torch.randn(*batch, 6).to(dtype).requires_grad_()
    args = (grad, values, index, *constants)
    torch.library.opcheck(torch.ops.nmfx.linear_nm_grad_input.default, args)
