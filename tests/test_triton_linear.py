"""The GPU kernels of nmfx::linear_nm against dense products in float64.

With a GPU they run on it; without one in Triton's interpreter (conftest.py), PTX by way of numpy
(ptx.py). Whether they compile without spills, `test_triton_linear_compiled.py` reads in the
compiler's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nmfx.kernels import triton_packed
from nmfx.mask import as_bits, nm_project, same_values
from nmfx.ops import cuda
from nmfx.ops.packed import ACTIVATIONS
from nmfx.packing import pack, pack_conv, unpack

pytest.importorskip("triton", reason="triton is not installed: the GPU kernels cannot run")
import ptx
from triton_interpreter import rounding_bfloat16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = ["2:4", "1:4", "1:8", "4:8", "2:8", "1:16", "3:5", "7:12", "8:32", "1:2", "5:64"]
# Half precision is rounded once, from a sum in float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# numpy's, in the interpreter; that of Triton 3.6 makes numbers of arrays, which numpy 2.4 refuses.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array")


@pytest.fixture(scope="module", autouse=True)
def _bfloat16() -> Iterator[None]:
    with rounding_bfloat16(), nullcontext() if DEVICE == "cuda" else ptx.emulated():
        yield


def check(
    rows: int,
    outputs: int,
    groups: int,
    pattern: str,
    dtype: torch.dtype,
    bias: bool = False,
    activation: str = "none",
) -> None:
    n, m = map(int, pattern.split(":"))
    weight = nm_project(torch.randn(outputs, groups * m).to(dtype), pattern, 1).to(DEVICE)
    values, index = pack(weight, pattern)
    x = torch.randn(rows, groups * m).to(DEVICE, dtype)
    vector = torch.randn(outputs).to(DEVICE, dtype) if bias else None
    y = triton_packed.linear(x, values, index, vector, outputs, n, m, activation)
    wanted = ACTIVATIONS[activation](
        F.linear(x.double(), weight.double(), None if vector is None else vector.double())
    )
    assert (y.shape, y.dtype) == ((rows, outputs), dtype)
    assert y.is_contiguous()
    error = (y.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    assert error <= TOLERANCE[dtype], (rows, outputs, groups, pattern, dtype, float(error))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rows", [1, 8, 20])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_triton_linear_is_near_the_product(pattern: str, rows: int, dtype: torch.dtype) -> None:
    check(rows, 40, 128 // int(pattern.split(":")[1]), pattern, dtype)


@settings(max_examples=25)
@given(
    rows=st.sampled_from([1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 64]),
    outputs=st.integers(1, 70),
    groups=st.integers(1, 60),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_triton_linear_of_any_shape(
    rows: int,
    outputs: int,
    groups: int,
    pattern: str,
    dtype: torch.dtype,
    bias: bool,
    activation: str,
) -> None:
    check(rows, outputs, groups, pattern, dtype, bias, activation)


# 4:8 is gathered, 2:4 and 1:16 take the sparse tensor cores.
@pytest.mark.parametrize("pattern", ["4:8", "1:16", "2:4"])
@pytest.mark.parametrize("rows", [1, 16])
def test_triton_linear_adds_many_parts_in_order(rows: int, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    weight = nm_project(torch.randn(16, 16384).half(), pattern, 1).to(DEVICE)
    values, index = pack(weight, pattern)
    x = torch.randn(rows, 16384, device=DEVICE).half()
    first = triton_packed.linear(x, values, index, None, 16, n, m, "relu")
    assert torch.equal(first, triton_packed.linear(x, values, index, None, 16, n, m, "relu"))
    wanted = F.linear(x.double(), weight.double()).relu()
    assert (first.double() - wanted).norm() / wanted.norm() < 1e-3


def test_a_sum_is_cut_into_parts_of_whole_steps() -> None:
    for warps, length, step in ((16, 512, 16), (1, 100, 8), (4, 4096, 64), (8, 3, 8)):
        parts, per_part = triton_packed._parts(warps, length, step, 32, torch.device("cpu"))
        assert per_part % step == 0
        assert (parts - 1) * per_part < length <= parts * per_part
    assert triton_packed._parts(1, 512, 16, 32, torch.device("cpu"))[0] > 1
    assert triton_packed._parts(1000, 512, 16, 32, torch.device("cpu"))[0] == 1


@settings(max_examples=25)
@given(
    rows=st.sampled_from([1, 2, 7, 8, 9, 16, 17, 40, 64]),
    outputs=st.integers(1, 70),
    groups=st.sampled_from([1, 2, 3, 7, 8, 16, 25, 64, 128, 130]),
    pattern=st.sampled_from(["2:4", "1:4", "1:8", "1:16"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    bias=st.booleans(),
)
def test_sparse_tensor_cores_of_any_shape(
    rows: int, outputs: int, groups: int, pattern: str, dtype: torch.dtype, bias: bool
) -> None:
    check(rows, outputs, groups, pattern, dtype, bias, "gelu")


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "1:16"])
def test_sparse_tensor_cores_take_inputs_at_any_address(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    weight = nm_project(torch.randn(32, 64).half(), pattern, 1).to(DEVICE)
    values, index = pack(weight, pattern)
    x = torch.randn(3 * 64 + 1, device=DEVICE).half()[1:].view(3, 64)
    assert x.data_ptr() % 16
    y = triton_packed.linear(x, values, index, None, 32, n, m, "none")
    torch.testing.assert_close(
        y.double(), F.linear(x.double(), weight.double()), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "1:16"])
@pytest.mark.parametrize("rows", [2, 9, 20, 40])
def test_sparse_tensor_cores_of_few_outputs(
    rows: int, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of other sizes, for a GPU that they do not fill."""
    taken: list[dict[str, int]] = []
    start = triton_packed._sparse
    monkeypatch.setattr(
        triton_packed, "_sparse", lambda *args: taken.append(args[5]) or start(*args)
    )
    monkeypatch.setattr(triton_packed, "_processors", lambda device: 132)
    check(rows, 100, 2048 // int(pattern.split(":")[1]), pattern, torch.bfloat16, True, "relu")
    n, m = map(int, pattern.split(":"))
    assert taken == [triton_packed.sparse_constants(n, m, rows, True)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_triton_unpacks_bit_for_bit(pattern: str, dtype: torch.dtype) -> None:
    n, m = map(int, pattern.split(":"))
    for outputs, groups in ((16, 32), (5, 3), (40, 70)):
        weight = nm_project(torch.randn(outputs, groups * m).to(dtype), pattern, 1)
        weight[0, 0], weight[-1, -1] = -0.0, torch.inf
        values, index = pack(nm_project(weight, pattern, 1).to(DEVICE), pattern)
        dense = triton_packed.unpack(values, index, outputs, groups * m, n, m)
        wanted = unpack(values, index, outputs, groups * m, pattern)
        assert same_values(dense, wanted)
        assert torch.equal(as_bits(dense), as_bits(wanted))


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_triton_linear_shows_inf_and_nan_of_the_input(rows: int, value: float) -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 1.0, 1.0]], device=DEVICE)
    values, index = pack(weight, "2:4")
    x = torch.ones(rows, 4, device=DEVICE)
    x[0, 0] = value  # the first output keeps a weight for it
    y = triton_packed.linear(x, values, index, None, 2, 2, 4, "none")
    assert not y[0, 0].isfinite()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("rows", [1, 16])
def test_triton_linear_takes_a_bias_of_any_strides(rows: int) -> None:
    weight = nm_project(torch.randn(40, 16), "2:4", 1).to(DEVICE)
    values, index = pack(weight, "2:4")
    x = torch.randn(rows, 16, device=DEVICE)
    for bias in (torch.randn(40, 3, device=DEVICE)[:, 1], torch.ones(1, device=DEVICE).expand(40)):
        y = triton_packed.linear(x, values, index, bias, 40, 2, 4, "none")
        torch.testing.assert_close(y, F.linear(x, weight, bias))


def test_triton_linear_of_no_rows_and_no_outputs() -> None:
    values, index = pack(torch.zeros(16, 8, device=DEVICE), "2:4")
    y = triton_packed.linear(
        torch.zeros(0, 8, device=DEVICE), values, index, None, 16, 2, 4, "none"
    )
    assert y.shape == (0, 16)


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("kernels", [True, False])
def test_the_op_on_a_gpu_takes_either_way(
    rows: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cuda.linear` is what the op calls for CUDA tensors."""
    monkeypatch.setattr(triton_packed, "why_not", lambda values, m: None if kernels else "no GPU")
    called: list[str] = []
    for name in ("linear", "unpack"):
        function = getattr(triton_packed, name)
        monkeypatch.setattr(
            triton_packed, name, lambda *args, n=name, f=function: called.append(n) or f(*args)
        )
    weight = nm_project(torch.randn(20, 16), "2:4", 1).to(DEVICE)
    values, index = pack(weight, "2:4")
    bias = torch.randn(20, device=DEVICE)
    x = torch.randn(16, rows, device=DEVICE).t().unsqueeze(0)
    y = cuda.linear(x, values, index, bias, 20, 16, 2, 4, "relu")
    torch.testing.assert_close(y, F.linear(x, unpack(values, index, 20, 16, "2:4"), bias).relu())
    few = rows <= triton_packed.most_rows(values, 2, 4)
    assert called == (["linear" if few else "unpack"] if kernels else [])


@pytest.mark.parametrize(
    ("size", "groups", "took"),
    [((4, 3), 1, "linear"), ((40, 10), 1, "unpack"), ((4, 3), 2, "")],
)
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_packed_convolution_on_a_gpu_is_a_product_of_patches(
    size: tuple[int, int],
    groups: int,
    took: str,
    batch: int,
    pattern: str,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`cuda.conv` is what the op calls for CUDA tensors."""
    monkeypatch.setattr(triton_packed, "why_not", lambda values, m: None)
    called: list[str] = []
    for name in ("linear", "unpack"):
        function = getattr(triton_packed, name)
        monkeypatch.setattr(
            triton_packed, name, lambda *args, n=name, f=function: called.append(n) or f(*args)
        )
    n, m = map(int, pattern.split(":"))
    weight = nm_project(torch.randn(20, 16 // groups, 3, 2).half(), pattern, 1).to(DEVICE)
    values, index = pack_conv(weight, groups, pattern)
    bias = torch.randn(20, device=DEVICE).half()
    x = torch.randn(batch, 16, *size, device=DEVICE).half().to(memory_format=layout)
    window = [2, 1], [1, 1], [1, 2]
    y = cuda.conv(x, values, index, bias, 20, [3, 2], *window, groups, n, m, "relu")
    wanted = F.conv2d(x, weight, bias, *window, groups).relu()
    torch.testing.assert_close(y, wanted, rtol=4e-3, atol=4e-3)
    assert not batch or y.is_contiguous(memory_format=layout)
    assert called == ([took] if took and batch else ["linear"] if took else [])


def test_triton_linear_says_what_it_does_not_take() -> None:
    values = torch.zeros(1, 2, 16, dtype=torch.float64)
    assert "not torch.float64" in str(triton_packed.why_not(values, 4))
    if DEVICE == "cpu":
        assert "not on a GPU" in str(triton_packed.why_not(values.float(), 4))
