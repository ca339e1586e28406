"""The native CPU kernels of nmfx::linear_nm against the float64 definition, per instruction set."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

import nmfx
from nmfx.kernels import cpu
from nmfx.mask import nm_mask, nm_project
from nmfx.ops.linear_nm import linear_nm
from nmfx.ops.packed import ACTIVATIONS
from nmfx.packing import pack, unpack
from nmfx.pattern import Pattern

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.status())
ISAS = cpu.available() or ["no native library"]
each_isa = pytest.mark.parametrize("isa", ISAS)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIALISED = ("2:4", "1:4", "4:8", "2:8", "1:8", "1:16", "2:16", "4:16", "8:16")
GENERAL = ("1:2", "3:4", "3:5", "5:7", "7:20", "16:32", "1:32", "33:64")
ROWS = (0, 1, 2, 3, 7, 8, 9, 15, 17, 33, 65, 127, 129)
LAYOUTS = ("contiguous", "row stride", "transposed", "expanded", "columns apart", "3-D", "1-D")

# Norm-wise; bfloat16 is measured by torch's own product.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1e-3}


@pytest.fixture(autouse=True)
def _restore_isa() -> Iterator[None]:
    name = cpu.isa()
    yield
    if name is not None:
        cpu.use_isa(name)


def assert_near(actual: Tensor, wanted: Tensor, squares: Tensor) -> None:
    """Compares with the float64 result, norm-wise; bfloat16 may round that once.

    Torch's own bfloat16 is no yardstick: oneDNN's convolutions with AMX give garbage, NaN among it,
    for some shapes (torch 2.13, an Intel Xeon), and then nothing would be wrong.

    Args:
        actual: what a kernel computed.
        wanted: the definition, in float64.
        squares: sums of squared products: the size that results have when nothing cancels.
    """
    assert actual.shape == wanted.shape, f"{actual.shape} != {wanted.shape}"
    allowed = TOLERANCES[actual.dtype] * squares.sum().sqrt()
    if actual.dtype == torch.bfloat16:
        allowed += 1.1 * (wanted.to(actual.dtype).double() - wanted).norm()
    off = (actual.double() - wanted).norm()
    assert off <= allowed, f"off by {off}, {allowed} allowed"  # NaN fails too


def assert_linear(
    actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> None:
    assert actual.dtype == x.dtype, actual.dtype
    act, wide = ACTIVATIONS[activation], None if bias is None else bias.double()
    wanted = act(F.linear(x.double(), weight.double(), wide))
    squares = F.linear(x.double() ** 2, weight.double() ** 2, None if wide is None else wide**2)
    assert_near(actual, wanted, squares)


def lay_out(rows: int, cols: int, layout: str, dtype: torch.dtype) -> Tensor:
    """Random rows of `cols` columns; "1-D" is one row, "3-D" three times as many."""
    if layout == "row stride":
        return torch.randn(rows, cols + 3, dtype=dtype)[:, 1 : cols + 1]
    if layout == "transposed":
        return torch.randn(cols, rows, dtype=dtype).t()
    if layout == "expanded":
        return torch.randn(1, cols, dtype=dtype).expand(rows, cols)
    if layout == "columns apart":
        return torch.randn(rows, 2 * cols, dtype=dtype)[:, ::2]
    if layout == "3-D":
        return torch.randn(3, rows, cols, dtype=dtype).transpose(0, 1)
    return torch.randn(cols if layout == "1-D" else (rows, cols), dtype=dtype)


def packed(
    out: int, cols: int, pattern: Pattern, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(dense weight, values, index); some groups keep zeros."""
    weight = torch.randn(out, cols) * (torch.rand(out, cols) < 0.9)
    weight = nm_project(weight, pattern, 1).to(dtype)
    values, index = pack(weight, pattern)
    return unpack(values, index, out, cols, pattern), values, index


class Call(NamedTuple):
    pattern: Pattern
    out: int
    groups: int
    rows: int
    layout: str
    has_bias: bool
    activation: str
    seed: int


@st.composite
def calls(draw: DrawFn) -> Call:
    name = draw(st.one_of(st.sampled_from(SPECIALISED), st.sampled_from(GENERAL)))
    return Call(
        Pattern.parse(name),
        draw(st.sampled_from((1, 15, 16, 17, 33, 127, 129))),
        draw(st.integers(1, 20)),
        draw(st.sampled_from(ROWS)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.booleans()),
        draw(st.sampled_from(list(ACTIVATIONS))),
        draw(st.integers(0, 999)),
    )


# --- values ------------------------------------------------------------------------------------


def test_the_library_is_there_where_a_compiler_is() -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ on the PATH")
    assert cpu.LIBRARY.exists(), "build it: python nmfx/kernels/cpu/build.py"
    if os.environ.get(cpu.VARIABLE) != "none":
        assert "portable" in cpu.available(), cpu.status()
        assert cpu.status().startswith(f"packed layers run native {cpu.isa()} kernels")


def check_call(isa: str, dtype: torch.dtype, call: Call) -> None:
    cpu.use_isa(isa)
    assert cpu.isa() == isa
    torch.manual_seed(call.seed)
    pattern, cols = call.pattern, call.groups * call.pattern.m
    weight, values, index = packed(call.out, cols, pattern, dtype)
    x = lay_out(call.rows, cols, call.layout, dtype)
    bias = torch.randn(call.out, dtype=dtype) if call.has_bias else None
    constants = call.out, cols, pattern.n, pattern.m
    actual = linear_nm(x, values, index, bias, *constants, call.activation)
    assert_linear(actual, x, weight, bias, call.activation)
    assert actual.is_contiguous(), actual.stride()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_isa
@given(calls())
def test_every_kernel_is_near_the_definition(isa: str, dtype: torch.dtype, call: Call) -> None:
    check_call(isa, dtype, call)


@needs_library
@given(calls())
def test_the_float64_kernel_is_near_the_definition(call: Call) -> None:
    check_call("portable", torch.float64, call)


@needs_library
@pytest.mark.parametrize("pattern", [*SPECIALISED, *GENERAL])
@each_isa
def test_every_pattern_with_few_and_with_many_rows(isa: str, pattern: str) -> None:
    for dtype in DTYPES:
        for rows in (1, 5, 40):
            call = Call(Pattern.parse(pattern), 33, 9, rows, "contiguous", True, "none", rows)
            check_call(isa, dtype, call)


@needs_library
@pytest.mark.parametrize("pattern", SPECIALISED)
@each_isa
def test_edges_of_tiles_and_chunks(isa: str, pattern: str) -> None:
    """Rows in ones and pairs of 16, blocks in ones, twos and fours, columns in 32 and 512."""
    parsed = Pattern.parse(pattern)
    for rows in (2, 4, 16, 17, 32, 33, 49, 64, 130):
        for out, cols in ((16, 32), (112, 512), (81, 528), (33, 1072)):
            call = Call(parsed, out, cols // parsed.m, rows, "contiguous", True, "relu", rows)
            check_call(isa, torch.bfloat16, call)
    call = Call(parsed, 40, 1040 // parsed.m, 520, "row stride", False, "gelu", 0)
    check_call(isa, torch.bfloat16, call)


@needs_library
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:16"])
@each_isa
def test_more_activations_than_a_cache_holds(isa: str, pattern: str) -> None:
    """Columns in chunks that pass over ranges of blocks; 39 blocks are two ranges and one over."""
    parsed = Pattern.parse(pattern)
    for rows in (256, 300):
        call = Call(parsed, 617, 2112 // parsed.m, rows, "contiguous", True, "none", rows)
        check_call(isa, torch.bfloat16, call)
    weight, values, index = packed(617, 2112, parsed, torch.bfloat16)
    x = torch.randn(256, 2112, dtype=torch.bfloat16)
    x[77, 5] = math.inf
    cpu.use_isa(isa)
    actual = linear_nm(x, values, index, None, 617, 2112, parsed.n, parsed.m)
    kept = nm_mask(weight, parsed, 1)[:, 5]
    assert torch.equal(~actual[77].isfinite(), kept)
    assert actual[torch.arange(256) != 77].isfinite().all()


@needs_library
@each_isa
def test_no_columns_give_the_bias(isa: str) -> None:
    cpu.use_isa(isa)
    bias = torch.randn(33)
    for dtype in DTYPES:
        values, index = pack(torch.zeros(33, 0, dtype=dtype), Pattern(2, 4))
        for rows in (1, 4, 40, 100):
            x = torch.zeros(rows, 0, dtype=dtype)
            actual = linear_nm(x, values, index, bias.to(dtype), 33, 0, 2, 4)
            assert torch.equal(actual, bias.to(dtype).expand(rows, 33)), f"{dtype}, {rows} rows"


@needs_library
@pytest.mark.parametrize("size", [1, 15, 17, 127, 129, 1000])
@each_isa
def test_one_row_of_odd_sizes(isa: str, size: int) -> None:
    m = next((m for m in range(2, 65) if size % m == 0), 1)
    for pattern, cols in ((Pattern(max(1, m // 2), m), size), (Pattern(2, 4), 4 * size)):
        for dtype in DTYPES:
            call = Call(pattern, size, cols // pattern.m, 1, "contiguous", True, "none", size)
            check_call(isa, dtype, call)


@needs_library
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("pattern", [*SPECIALISED, "1:2", "3:5", "7:20", "33:64"])
@each_isa
def test_nan_and_inf_reach_only_the_rows_that_keep_their_column(
    isa: str, pattern: str, rows: int
) -> None:
    cpu.use_isa(isa)
    parsed = Pattern.parse(pattern)
    out, cols = 21, 5 * parsed.m
    for dtype in (*DTYPES, torch.float64):
        weight, values, index = packed(out, cols, parsed, dtype)
        x = torch.randn(rows, cols, dtype=dtype)
        for row in range(rows):  # rows with a NaN, an Inf, both, or neither
            specials = [math.nan, math.inf, -math.inf][: row % 4 + (rows == 1)]
            x[row, torch.randperm(cols)[: len(specials)]] = torch.tensor(specials, dtype=dtype)
        actual = linear_nm(x, values, index, None, out, cols, parsed.n, parsed.m)
        # Only kept positions, zeros among them, are multiplied at all.
        kept = nm_mask(weight, parsed, 1)
        products = torch.where(kept, weight.double() * x.double()[:, None], 0.0)
        wanted = products.sum(2)
        assert torch.equal(actual.isnan(), wanted.isnan()), f"{dtype}: other NaN"
        for sign in (math.inf, -math.inf):
            assert torch.equal(actual == sign, wanted == sign), f"{dtype}: other {sign}"
        finite = wanted.isfinite()
        off = (actual.double() - wanted)[finite].abs()
        assert (off <= 2e-2 * products.abs().sum(2)[finite]).all(), f"{dtype}: {off.max()}"


# --- threads -----------------------------------------------------------------------------------


@pytest.fixture
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@needs_library
@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@each_isa
def test_threads_do_not_change_a_bit(isa: str, dtype: torch.dtype) -> None:
    cpu.use_isa(isa)
    for pattern in map(Pattern.parse, ("2:4", "1:8", "3:5", "33:64")):
        cols = 5 * 64 // pattern.m * pattern.m
        _, values, index = packed(260, cols, pattern, dtype)
        bias = torch.randn(260, dtype=dtype)
        for rows in (1, 2, 9, 65, 300):
            x = torch.randn(rows, cols, dtype=dtype)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                constants = 260, cols, pattern.n, pattern.m
                results.append(linear_nm(x, values, index, bias, *constants, "gelu"))
            for other in results[1:]:
                assert torch.equal(results[0], other), f"{pattern}, {rows} rows"


@needs_library
@pytest.mark.usefixtures("_restore_threads")
@each_isa
def test_python_threads_share_a_layer(isa: str) -> None:
    cpu.use_isa(isa)
    torch.set_num_threads(2)
    pattern = Pattern(2, 4)
    for dtype in DTYPES:
        _, values, index = packed(129, 256, pattern, dtype)
        for rows in (1, 65):
            x = torch.randn(rows, 256, dtype=dtype)

            def run(_: int, x: Tensor = x, v: Tensor = values, i: Tensor = index) -> Tensor:
                return linear_nm(x, v, i, None, 129, 256, 2, 4, "silu")

            alone = run(0)
            with ThreadPoolExecutor(4) as pool:
                for together in pool.map(run, range(40)):
                    assert torch.equal(alone, together), f"{dtype}, {rows} rows"


# --- corrupted and odd arguments ---------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("pattern", [*SPECIALISED, *GENERAL, "1:1", "1:3", "2:17", "1:64"])
@each_isa
def test_a_corrupted_index_never_reads_elsewhere(isa: str, pattern: str) -> None:
    cpu.use_isa(isa)
    parsed = Pattern.parse(pattern)
    for dtype in (*DTYPES, torch.float64):
        for groups in (1, 3):
            cols = groups * parsed.m
            _, values, index = packed(17, cols, parsed, dtype)
            noise = torch.randint(-(2**31), 2**31, index.shape).int()
            for corrupted in (noise, torch.full_like(index, -1)):
                for rows in (1, 4, 33):
                    x = torch.ones(rows, cols, dtype=dtype)
                    out = linear_nm(x, values, corrupted, None, 17, cols, parsed.n, parsed.m)
                    assert out.shape == (rows, 17), out.shape


@needs_library
@pytest.mark.skipif("amx_bf16" not in ISAS, reason="this CPU has no AMX")
@pytest.mark.parametrize("pattern", SPECIALISED)
def test_a_corrupted_index_keeps_to_a_row_that_is_not_finite(pattern: str) -> None:
    """Such rows are summed apart. After the last activation comes a NaN, which none may read."""
    cpu.use_isa("amx_bf16")
    parsed = Pattern.parse(pattern)
    cols = 3 * parsed.m
    _, values, index = packed(17, cols, parsed, torch.bfloat16)
    memory = torch.ones(33 * cols + 64, dtype=torch.bfloat16)
    memory[33 * cols - 1], memory[33 * cols :] = math.inf, math.nan
    x = memory[: 33 * cols].view(33, cols)
    corrupted = torch.full_like(index, -1)
    out = linear_nm(x, torch.ones_like(values), corrupted, None, 17, cols, parsed.n, parsed.m)
    assert not out.isnan().any()
    assert out[:-1].isfinite().all()


@needs_library
def test_the_op_itself_refuses_what_does_not_fit() -> None:
    _, values, index = packed(17, 16, Pattern(2, 4), torch.float32)
    x = torch.randn(3, 16)
    for args in (
        (x, values[:1].contiguous(), index, None, 17, 16, 2, 4, "none"),
        (x, values, index, None, 33, 16, 2, 4, "none"),
        (x, values, index, None, 17, 16, 2, 65, "none"),
        (x, values, index, None, 17, 16, 0, 4, "none"),
        (x, values, index, None, 17, -16, 2, 4, "none"),
        (x, values, index, torch.randn(16), 17, 16, 2, 4, "none"),
        (x.int(), values.int(), index, None, 17, 16, 2, 4, "none"),
        (x[:, :12], values, index, None, 17, 16, 2, 4, "none"),
        (x, values, index, None, 17, 16, 2, 4, "tanh"),
    ):
        with pytest.raises((RuntimeError, nmfx.NMError)):
            torch.ops.nmfx.linear_nm(*args)


# --- choosing the instruction set --------------------------------------------------------------


@needs_library
def test_use_isa_refuses_an_unknown_name_and_changes_nothing() -> None:
    before = cpu.isa()
    with pytest.raises(nmfx.NMError) as error:
        cpu.use_isa("sse9")
    text = f"sse9 cannot be used here; available: {', '.join(cpu.available())}"
    assert str(error.value) == text
    assert cpu.isa() == before


_REPORT = """
try:
    import torch, nmfx
    from nmfx.kernels import cpu
    from nmfx.ops.linear_nm import linear_nm
    from nmfx.packing import pack
    out = linear_nm(torch.ones(2, 4), *pack(torch.tensor([[1., 0, 2, 0]]), "2:4"), None, 1, 4, 2, 4)
    print(cpu.isa(), cpu.status(), out.tolist(), sep="|")
except Exception as error:
    print(type(error).__name__, error, sep="|")
"""


def lacking() -> list[str]:
    """One instruction set that this machine does not have, if there is any."""
    return [name for name in cpu.NAMES if name not in cpu.available()][-1:]


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    """What a fresh process says for each value of the variable."""
    names = (*cpu.available(), *lacking(), "none", "avx9")
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", _REPORT],
            env={**os.environ, cpu.VARIABLE: name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    out = {}
    for name, process in processes.items():
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name}: {stderr}"
        out[name] = stdout.strip()
    return out


@needs_library
def test_the_variable_pins_an_instruction_set(reports: dict[str, str]) -> None:
    for name in cpu.available():
        status = f"packed layers run native {name} kernels"
        assert reports[name] == f"{name}|{status}|[[3.0], [3.0]]"
    for name in lacking():
        lacks = f"NMFX_CPU_ISA={name}: this machine lacks it, it has {cpu.available()}"
        assert reports[name] == f"NMError|{lacks}"


def test_the_variable_none_leaves_the_reference_kernel(reports: dict[str, str]) -> None:
    status = "packed layers run in plain torch, slower than dense: NMFX_CPU_ISA=none"
    assert reports["none"] == f"None|{status}|[[3.0], [3.0]]"


def test_the_variable_refuses_an_unknown_name(reports: dict[str, str]) -> None:
    takes = "it takes one of portable, avx2, avx512, avx512_bf16, amx_bf16, or none"
    assert reports["avx9"] == f"NMError|NMFX_CPU_ISA=avx9: {takes}"
