"""Semi-structured weights without a GPU: CUTLASS on the CPU, cuSPARSELt on meta tensors."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmfx.errors import NMError
from nmfx.kernels import semi_structured as semi
from nmfx.mask import as_bits, nm_project
from nmfx.ops.linear_semi_structured import linear_semi_structured
from nmfx.pattern import Pattern

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DTYPES = list(semi.DTYPES)


def weight(out: int, into: int, dtype: torch.dtype, n: int = 2) -> Tensor:
    return nm_project(torch.randn(out, into).to(dtype), (n, 4), 1)


def pair(out: int, into: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    w = weight(out, into, dtype)
    return w, *semi.compress(w, semi.CUTLASS)


# --- the form ----------------------------------------------------------------------------------


@given(
    out=st.integers(1, 70),
    groups=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 2),
    data=st.data(),
)
def test_decompressed_is_what_was_compressed(
    out: int, groups: int, dtype: torch.dtype, n: int, data: st.DataObject
) -> None:
    w = weight(out, 4 * groups, dtype, n)
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    row = data.draw(st.integers(0, out - 1))
    w[row, :4] = torch.tensor([0.0, smallest / 4, 0.0, -largest])  # the first is a denormal
    compressed, meta = semi.compress(w, semi.CUTLASS)
    again = semi.decompress(compressed, meta, *w.shape, dtype)
    assert torch.equal(as_bits(again), as_bits(w))
    stored = compressed.nbytes + meta.nbytes
    assert stored == semi.compressed_bytes(*w.shape, semi.CUTLASS)


def test_bytes_of_shapes_that_fit() -> None:
    for backend in (semi.CUSPARSELT, semi.CUTLASS):
        assert semi.compressed_bytes(4096, 4096, backend) / (4096 * 4096 * 2) == 0.5625


def test_sizes_that_can_be_a_weight() -> None:
    whole = semi.compressed_bytes(64, 64, semi.CUSPARSELT)
    sizes = [(whole, 0), (whole + 16, 0), (whole - 1, 0), (whole, 1)]
    found = [semi.has_size(size, 60, 60, semi.CUSPARSELT) for size in sizes]
    assert found == [True, True, False, False]
    assert semi.has_size((64 * 64, 64 * 8), 60, 60, semi.CUTLASS)
    assert not semi.has_size((64 * 64, 64 * 8 - 1), 60, 60, semi.CUTLASS)


@given(
    out=st.integers(1, 70),
    groups=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(["2:4", "1:4", "1:2"]),
)
def test_what_was_compressed_passes_the_check(
    out: int, groups: int, dtype: torch.dtype, pattern: str
) -> None:
    w = nm_project(torch.randn(out, 4 * groups).to(dtype), pattern, 1)
    semi.check_cutlass(*semi.compress(w, semi.CUTLASS), *w.shape, dtype, Pattern.parse(pattern))


def test_the_format_tells_dtypes_and_libraries_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 702)
    formats = [semi.format_of(b, d, CUDA) for b in (semi.CUSPARSELT, semi.CUTLASS) for d in DTYPES]
    assert len(set(formats)) == 4
    assert formats[0] == "cuSPARSELt torch.float16 702 for 9.0"


def test_minus_zero_becomes_zero_and_nothing_else_changes() -> None:
    w = torch.tensor([[-0.0, 1.0, -0.0, -2.0]], dtype=torch.float16)
    again = semi.decompress(*semi.compress(w, semi.CUTLASS), 1, 4, w.dtype)
    assert torch.equal(as_bits(again), as_bits(w + 0.0))


def test_values_are_never_dropped() -> None:
    w = torch.tensor([[1.0, 9.0, 8.0, 7.0]], dtype=torch.bfloat16)  # torch keeps 1 and 9
    with pytest.raises(NMError, match=r"does not give back a \(1, 4\) weight"):
        semi.compress(w, semi.CUTLASS)


# --- who may ------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an H200 and everything that torch has for it."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    return monkeypatch


@pytest.mark.parametrize(
    ("capability", "library", "expected"),
    [
        ((7, 5), True, r"compute capability 7.5 has no sparse tensor cores"),
        ((8, 0), True, semi.CUSPARSELT),
        ((8, 6), False, semi.CUTLASS),
        ((9, 0), True, semi.CUSPARSELT),
        ((9, 0), False, r"without cuSPARSELt, which compute capability 9.0 needs"),
        ((10, 0), True, semi.CUSPARSELT),
    ],
)
def test_the_library_for_a_device(
    capability: tuple[int, int], library: bool, expected: object, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu.setattr(torch.backends.cusparselt, "is_available", lambda: library)
    found = semi.backend_of(CUDA)
    if isinstance(expected, str):
        assert isinstance(found, str)
        assert re.search(expected, found)
    else:
        assert found is expected


def test_no_library_for_other_devices(gpu: pytest.MonkeyPatch) -> None:
    assert "the weight is on cpu" in str(semi.backend_of(CPU))
    gpu.setattr(torch.version, "hip", "6.0")
    assert "AMD GPUs" in str(semi.backend_of(CUDA))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w, None),
        (lambda w: w.float(), r"float16 or bfloat16, not torch.float32"),
        (lambda w: w[:, :-2], r"no groups of 4"),
        (lambda w: w.view(32, 64, 1, 1), None),
        (lambda w: w[:, :, None].expand(32, 64, 3), None),
        (lambda w: w.view(32, 32, 2).movedim(2, 1), "no groups of 4"),
        (lambda w: w[:9], "would not be smaller"),
        (lambda w: w[:0], "no groups of 4"),
        (lambda w: torch.ones_like(w), "more than 2 nonzeros"),
        (lambda w: torch.where(w == w.max(), torch.inf, w), "NaN or Inf"),
    ],
)
def test_the_values_decide(
    change: object, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)
    found = semi.why_not(change(weight(32, 64, torch.bfloat16)), 1)  # type: ignore[operator]
    assert found is None if reason is None else re.search(reason, str(found))


def test_convolutions_in_groups_are_no_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)
    found = semi.why_not(weight(32, 64, torch.bfloat16).view(32, 64, 1, 1), 1, groups=2)
    assert found == "a convolution in 2 groups is no one product"


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:8", "1:16", "2:16"])
def test_sparser_patterns_qualify_when_no_four_hold_more_than_two(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)
    w = nm_project(torch.randn(32, 64), pattern, 1).half()
    assert semi.why_not(w, 1) is None
    assert semi.why_not(w.t(), 0) is None


# --- shapes that a library on a GPU is given -----------------------------------------------------


@pytest.mark.parametrize("out", [1, 16, 50])
@pytest.mark.parametrize("into", [4, 64, 100])
@pytest.mark.parametrize("rows", [0, 1, 8, 13])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", [semi.CUSPARSELT, semi.CUTLASS], ids=lambda b: b.name)
def test_shapes_are_filled_up(
    out: int,
    into: int,
    rows: int,
    bias: bool,
    backend: semi.Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's own shape functions, which meta tensors run, refuse what does not fit."""
    monkeypatch.setattr(semi, "_on_gpu", lambda input: True)
    monkeypatch.setattr(semi.cusparselt, "why_not", lambda: "torch's product, in this test")

    def empty(*sizes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    filled_out, filled_into = out + -out % backend.out, into + -into % backend.into
    if backend is semi.CUSPARSELT:
        compressed, meta = empty(filled_out, filled_into * 9 // 8), empty(0)
    else:
        compressed = empty(filled_out, filled_into)
        meta = empty(filled_out, filled_into // 8)
    vector = empty(out, dtype=torch.bfloat16) if bias else None
    y = semi.multiply(empty(into, rows, dtype=torch.bfloat16).t(), compressed, meta, vector, out)
    assert y.shape == (rows, out)
    assert y.is_contiguous()


@pytest.mark.parametrize("rows", [8, 13])
def test_cusparselt_is_called_as_it_wants(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that multiplies, and asks for what cuSPARSELt asks for."""
    w, calls = weight(20, 24, torch.bfloat16), []

    def product(
        compressed: Tensor, x: Tensor, bias: Tensor | None, transpose_result: bool, alg_id: int
    ) -> Tensor:
        if alg_id > 2:  # as the library answers
            raise RuntimeError("invalid value when calling cusparseLtMatmulAlgSetAttribute")
        assert (compressed.shape, x.shape[0], x.shape[1] % 8) == ((32, 32), 32, 0)
        assert x.t().is_contiguous()
        assert transpose_result
        calls.append(x)
        return F.linear(x.t(), compressed, bias)

    monkeypatch.setattr(torch, "_cslt_compress", lambda filled: filled.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(semi, "_on_gpu", lambda input: True)
    monkeypatch.setattr(semi.cusparselt, "why_not", lambda: "torch's product, in this test")
    compressed, meta = semi.compress(w, semi.CUSPARSELT)
    assert meta.numel() == 0
    assert len(calls) == 1, "it was decompressed and compared"
    x, bias = torch.randn(rows, 24).bfloat16(), torch.randn(20).bfloat16()
    y = semi.multiply(x, compressed, meta, bias, 20)
    torch.testing.assert_close(y, F.linear(x, w, bias))
    monkeypatch.setattr(semi, "_UNIT_ROWS", 7)
    assert torch.equal(semi.decompress(compressed, meta, 20, 24, w.dtype), w)
    assert list(semi.algorithms(x, compressed, meta, 20)) == [0, 1, 2]


def test_the_algorithm_is_that_of_the_nearest_number_of_rows() -> None:
    measured = (8, 3, 2048, 17, 8192, 20)
    for rows, algorithm in ((0, 3), (100, 3), (200, 17), (4000, 17), (5000, 20), (10**6, 20)):
        assert semi.algorithm_for(rows, measured) == algorithm
    assert semi.algorithm_for(100, ()) == 0


def test_algorithms_are_pairs_with_increasing_rows() -> None:
    for good in ((), (8, 3), (0, 0, 2048, 63)):
        semi.check_algorithms(good)
    for bad in ((8,), (8, 64), (8, -1), (8, 3, 8, 4), (9, 3, 8, 4), (8, 3, 9)):
        with pytest.raises(NMError, match="are not rows, algorithm"):
            semi.check_algorithms(bad)


def test_cusparselt_needs_its_gpu() -> None:
    x, compressed = torch.randn(2, 32).bfloat16(), torch.zeros(32, 36, dtype=torch.uint8)
    with pytest.raises(NMError, match="runs on the GPU it was compressed on, and is now on cpu"):
        semi.multiply(x, compressed, torch.empty(0, dtype=torch.uint8), None, 32)


# --- the op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_equals_a_dense_linear(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    w, compressed, meta = pair(20, 24, dtype)
    vector = torch.randn(20).to(dtype) if bias else None
    x = torch.randn(shape).to(dtype)
    y = linear_semi_structured(x, compressed, meta, vector, 20, 24, dtype)
    torch.testing.assert_close(y, F.linear(x, w, vector))
    assert y.is_contiguous()


def test_op_takes_any_strides() -> None:
    w, compressed, meta = pair(20, 24)
    x = torch.randn(24, 5, 3).bfloat16().permute(2, 1, 0)
    y = linear_semi_structured(x, compressed, meta, None, 20, 24, torch.bfloat16)
    torch.testing.assert_close(y, F.linear(x, w))


@pytest.mark.parametrize("backend", [semi.CUSPARSELT, semi.CUTLASS], ids=lambda b: b.name)
def test_a_library_sees_contiguous_and_aligned_memory(
    backend: semi.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are given addresses, and look at no strides."""
    w = weight(64, 64, torch.bfloat16)
    seen: list[Tensor] = []

    def product(compressed: Tensor, x: Tensor, bias: Tensor, **rest: object) -> Tensor:
        seen.extend([compressed, x.t(), bias])
        return x.new_zeros(x.shape[1], 64)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(
        torch,
        "_sparse_semi_structured_addmm",
        lambda bias, compressed, places, x: product(compressed, x, bias).t(),
    )
    compressed, meta = semi.compress(w, semi.CUTLASS)
    monkeypatch.setattr(semi, "_on_gpu", lambda input: True)
    monkeypatch.setattr(semi.cusparselt, "why_not", lambda: "torch's product, in this test")
    if backend is semi.CUSPARSELT:
        meta = meta[:0]
    x = torch.zeros(8 * 64 + 1).bfloat16()[1:].view(8, 64)  # from an odd place on
    bias = torch.zeros(64, 3).bfloat16()[:, 1]
    wide = torch.zeros(64, 2 * compressed.shape[1], dtype=torch.uint8)[:, ::2]
    semi.multiply(x, wide, meta, bias, 64)
    assert len(seen) == 3
    for tensor in seen:
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0


def test_op_passes_opcheck() -> None:
    _, compressed, meta = pair(20, 24)
    x, bias = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((3, 24), (20,)))
    op = torch.ops.nmfx.linear_semi_structured.default
    torch.library.opcheck(op, (x, compressed, meta, bias, 20, 24, torch.bfloat16))
    torch.library.opcheck(op, (x[0].detach(), compressed, meta, None, 20, 24, torch.bfloat16))
    grad = torch.ops.nmfx.linear_semi_structured_grad_input.default
    torch.library.opcheck(
        grad, (torch.randn(3, 20).bfloat16(), compressed, meta, 20, 24, torch.bfloat16)
    )


def test_op_gradients_equal_those_of_a_dense_linear() -> None:
    w, compressed, meta = pair(20, 24)
    x = torch.randn(2, 3, 24).bfloat16().requires_grad_()
    bias = torch.randn(20).bfloat16().requires_grad_()

    def second(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), (x, bias), create_graph=True)
        return [*first, *torch.autograd.grad(first[0].square().sum(), x)]

    actual = second(linear_semi_structured(x, compressed, meta, bias, 20, 24, torch.bfloat16))
    for got, want in zip(actual, second(F.linear(x, w, bias)), strict=True):
        torch.testing.assert_close(got, want)


def test_op_under_autocast() -> None:
    w, compressed, meta = pair(20, 24)
    x, bias = torch.randn(3, 24), torch.randn(20)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_semi_structured(x, compressed, meta, bias, 20, 24, torch.bfloat16)
        torch.testing.assert_close(y, F.linear(x, w.float(), bias))
    with torch.autocast("cpu", torch.float16), pytest.raises(NMError, match=r"after \.to\(torch"):
        linear_semi_structured(x, compressed, meta, bias, 20, 24, torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(3, 23).bfloat16(), None, r"does not end in in_features=24"),
        (torch.zeros(3, 24), None, r"input is torch.float32, the packed weight torch.bfloat16"),
        (torch.zeros(3, 24).bfloat16(), torch.zeros(19).bfloat16(), r"does not fit 20 outputs"),
        (torch.zeros(3, 24, device="meta").bfloat16(), None, r"move the whole model"),
    ],
)
def test_op_says_what_does_not_fit(x: Tensor, bias: Tensor | None, message: str) -> None:
    _, compressed, meta = pair(20, 24)
    with pytest.raises(NMError, match=message):
        linear_semi_structured(x, compressed, meta, bias, 20, 24, torch.bfloat16)
