"""linear_by_rows: bit for bit the operator of the form that the number of rows asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo.testing import CompileCounter

import nmfx
from nmfx.capture.packed import compress_weight, pack_weight
from nmfx.kernels import semi_structured as semi
from nmfx.mask import nm_project
from nmfx.ops.linear_by_rows import linear_by_rows
from nmfx.ops.linear_nm import linear_nm
from nmfx.ops.linear_semi_structured import linear_semi_structured
from nmfx.ops.packed import ACTIVATIONS

OUT, INTO, N, M = 40, 64, 2, 4
PATTERN = nmfx.Pattern(N, M)
PAIRS = [
    ("packed", "dense"),
    ("packed", "semi_structured"),
    ("semi_structured", "dense"),
    ("dense", "semi_structured"),
]


@pytest.fixture(autouse=True)
def _cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)


def make(
    dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """(forms by name, the dense weight, a bias)."""
    generator = torch.Generator().manual_seed(seed)
    weight = nm_project(torch.randn(OUT, INTO, generator=generator).to(dtype), PATTERN, 1)
    forms = {
        "packed": ("packed", *pack_weight(weight, 1, 1, PATTERN), N, M),
        "dense": ("dense", weight, False),
    }
    if dtype == torch.bfloat16:
        forms["semi_structured"] = ("semi_structured", *compress_weight(weight, 1)[:2], dtype)
    return forms, weight, torch.randn(OUT, generator=generator).to(dtype)


def alone(form: Any, x: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """The operator of one form, without any choice."""
    name, *rest = form
    if name == "packed":
        return linear_nm(x, *rest[:2], bias, OUT, INTO, N, M, activation)
    if name == "semi_structured":
        y = linear_semi_structured(x, *rest[:2], bias, OUT, INTO, rest[2])
    else:
        y = F.linear(x, rest[0], bias)
    return ACTIVATIONS[activation](y)


@given(
    pair=st.sampled_from(PAIRS),
    shape=st.lists(st.integers(0, 5), max_size=3),
    threshold=st.integers(1, 60),
    activation=st.sampled_from(list(ACTIVATIONS)),
    has_bias=st.booleans(),
)
def test_the_rows_choose_the_form(
    pair: tuple[str, str], shape: list[int], threshold: int, activation: str, has_bias: bool
) -> None:
    # Of two weights, so that the sides can be told apart: they round alike.
    (first, _, vector), (second, _, _) = (make(torch.bfloat16, seed) for seed in (1, 2))
    few, many = first[pair[0]], second[pair[1]]
    bias = vector if has_bias else None
    x = torch.randn(*shape, INTO).bfloat16()
    rows = torch.Size(shape).numel()
    actual = linear_by_rows(x, few, many, bias, OUT, INTO, threshold, activation)
    expected = alone(few if rows <= threshold else many, x, bias, activation)
    assert actual.shape == (*shape, OUT)
    assert torch.equal(actual, expected), f"{rows} rows, threshold {threshold}"


@pytest.mark.parametrize("rows", [6, 7, 8])
def test_the_threshold_itself_belongs_to_the_few(rows: int) -> None:
    (first, _, bias), (second, _, _) = make(), make(seed=2)
    x = torch.randn(rows, INTO)
    actual = linear_by_rows(x, first["packed"], second["dense"], bias, OUT, INTO, 7)
    expected = [alone(form, x, bias) for form in (first["packed"], second["dense"])]
    assert [torch.equal(actual, one) for one in expected] == [rows <= 7, rows > 7]


@pytest.mark.parametrize("rows", [2, 9])
def test_a_transposed_weight_is_that_of_addmm(rows: int) -> None:
    forms, weight, bias = make()
    x, stored = torch.randn(rows, INTO), weight.t().contiguous()
    few, many = forms["packed"], ("dense", stored, True)
    actual = linear_by_rows(x, few, many, bias, OUT, INTO, 4)
    expected = alone(few, x, bias) if rows <= 4 else torch.addmm(bias, x, stored)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_gradients_reach_input_and_bias_on_both_sides(rows: int, activation: str) -> None:
    forms, weight, bias = make(torch.float64)
    x = torch.randn(rows, INTO, dtype=torch.float64)

    def grads(run: Any) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        run(*inputs).square().sum().backward()
        return [tensor.grad for tensor in inputs]

    few, many = forms["packed"], forms["dense"]
    actual = grads(lambda x, b: linear_by_rows(x, few, many, b, OUT, INTO, 4, activation))
    expected = grads(lambda x, b: ACTIVATIONS[activation](F.linear(x, weight, b)))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rows", [2, 9])
def test_a_weight_that_is_to_be_trained_is_refused_on_both_sides(rows: int) -> None:
    forms, weight, bias = make()
    weight.requires_grad_()
    x = torch.randn(rows, INTO)
    with pytest.raises(nmfx.NMError, match=r"held in two forms has no gradient: train the spars"):
        linear_by_rows(x, forms["packed"], forms["dense"], bias, OUT, INTO, 4)
    with torch.no_grad():
        linear_by_rows(x, forms["packed"], forms["dense"], bias, OUT, INTO, 4)


@pytest.mark.parametrize("rows", [2, 9])
def test_it_reads_no_data_to_choose(rows: int) -> None:
    forms, _, bias = make()
    few, many = (
        tuple(part.to("meta") if isinstance(part, Tensor) else part for part in forms[name])
        for name in ("packed", "dense")
    )
    x = torch.empty(rows, INTO, device="meta")
    assert linear_by_rows(x, few, many, bias.to("meta"), OUT, INTO, 4).shape == (rows, OUT)


@pytest.mark.parametrize("rows", [2, 9])
def test_autocast_is_that_of_the_operator(rows: int) -> None:
    forms, _, bias = make()
    x = torch.randn(rows, INTO)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = linear_by_rows(x, forms["packed"], forms["dense"], bias, OUT, INTO, 4)
        expected = alone(forms["packed" if rows <= 4 else "dense"], x, bias)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("threshold", [4, 5])
def test_rows_of_a_nested_tensor_are_counted_together(threshold: int) -> None:
    (forms, _, bias), (others, _, _) = make(), make(seed=2)
    parts = [torch.randn(2, INTO), torch.randn(3, INTO)]
    nested, many = torch.nested.as_nested_tensor(parts), others["dense"]
    actual = linear_by_rows(nested, forms["packed"], many, bias, OUT, INTO, threshold)
    form = forms["packed"] if threshold == 5 else many
    for one, part in zip(actual.unbind(), parts, strict=True):
        torch.testing.assert_close(one, alone(form, part, bias))


def test_under_compile_the_comparison_is_one_guard() -> None:
    forms, _, bias = make()
    few, many = forms["packed"], forms["dense"]

    def run(x: Tensor) -> Tensor:
        return linear_by_rows(x, few, many, bias, OUT, INTO, 20, "relu")

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for rows in (6, 9, 20, 21, 50, 80, 3):
        x = torch.randn(rows, INTO)
        torch.testing.assert_close(compiled(x), run(x))
    assert counter.frame_count == 2, "one graph for each side of the threshold"


def test_fx_records_one_node() -> None:
    forms, _, bias = make()
    few, many = forms["packed"], forms["dense"]
    gm = fx.symbolic_trace(lambda x: linear_by_rows(x, few, many, bias, OUT, INTO, 4, "silu"))
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [linear_by_rows]
    for rows in (2, 9):
        x = torch.randn(rows, INTO)
        expected = alone(few if rows <= 4 else many, x, bias, "silu")
        assert torch.equal(gm(x), expected)


def test_an_input_that_does_not_fit_is_an_error() -> None:
    forms, _, bias = make()
    with pytest.raises(nmfx.NMError, match=r"does not end in in_features=64"):
        linear_by_rows(torch.randn(2, 60), forms["packed"], forms["dense"], bias, OUT, INTO, 4)
