"""The native CPU kernels of nmfx::sr_ste against `mask.py`, bit for bit, per instruction set."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import raw_bits
from strategies import DTYPES, LAYOUTS, Case, cases, from_bits, lay_out, special_bits
from torch import Tensor

from nmfx.kernels import cpu
from nmfx.mask import nm_mask, nm_project
from nmfx.ops.keep import keep_, project_kept
from nmfx.ops.sr_ste import add_decay_, make_control, project, sr_ste

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.status())
# Those of other instruction sets have no masks of their own.
ISAS = [name for name in ("portable", "avx2", "avx512") if name in cpu.available()] or ["none"]
each_isa = pytest.mark.parametrize("isa", ISAS)

# Rows of a group in registers, in memory, of odd length; several vectors of columns and the rest.
PATTERNS = ("1:2", "2:4", "3:4", "2:5", "4:8", "7:8", "5:12", "8:16", "15:16", "9:20", "16:32")
PATTERNS += ("31:32", "5:33", "1:64", "32:64", "63:64")


@pytest.fixture(autouse=True)
def _restore_isa() -> Iterator[None]:
    name = cpu.isa()
    yield
    if name is not None:
        cpu.use_isa(name)


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values that tie, of both signs, with NaN and Inf among them."""
    pool = [*special_bits(dtype).values()]
    pool += [bits | 1 << 8 * dtype.itemsize - 1 for bits in pool]
    picks = torch.randint(len(pool), (math.prod(shape),)).tolist()
    return from_bits([pool[i] for i in picks], dtype).view(shape)


def exact_gradient(grad: Tensor, weight: Tensor, mask: Tensor, lambda_w: float) -> Tensor:
    """g + lambda * (1 - mask) * w, half precision rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    decayed = grad.to(wide) + torch.tensor(lambda_w, dtype=wide) * weight.to(wide)
    return torch.where(mask, grad.to(weight.dtype), decayed.to(weight.dtype))


def assert_exact(weight: Tensor, pattern: str, dim: int) -> None:
    n, m = map(int, pattern.split(":"))
    control = make_control(0.25, n)
    wanted = nm_project(weight, pattern, dim)
    out = project(weight, control, m, dim)
    assert raw_bits(out) == raw_bits(wanted), f"{pattern} along {dim}: {weight}\n{out}"
    mask, grad = nm_mask(weight, pattern, dim), torch.randn(weight.shape).to(weight.dtype)
    gradient = torch.ops.nmfx.sr_ste_backward(grad, weight, control, m, dim, 0)
    expected = exact_gradient(grad, weight, mask, 0.25)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)
    assert raw_bits(gradient[mask]) == raw_bits(grad[mask])
    in_place = grad.clone()
    add_decay_(in_place, weight, control, m, dim)
    assert raw_bits(in_place) == raw_bits(gradient)


@each_isa
@given(case=cases())
def test_masks_equal_the_definition(isa: str, case: Case) -> None:
    cpu.use_isa(isa)
    assert_exact(case.weight, case.pattern.text, case.dim)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_of_many_groups(isa: str, dtype: torch.dtype, pattern: str) -> None:
    cpu.use_isa(isa)
    m = int(pattern.split(":")[1])
    torch.manual_seed(m)
    for shape, dim in (
        ((7, 37 * m), 1),  # rows, the last vector in part
        ((3 * m, 71), 0),  # columns, the last vector begins early
        ((2, 5 * m, 3), 1),  # columns narrower than a vector
        ((5, 2 * m, 3, 3), 1),  # a convolution
    ):
        for values in (awkward(shape, dtype), torch.randn(shape).to(dtype)):
            assert_exact(values, pattern, dim)
    assert_exact(lay_out(torch.randn(5, 2 * m, 3, 3).to(dtype), "channels_last"), pattern, 1)
    assert_exact(torch.ones(4, 8 * m, dtype=dtype), pattern, 1)  # nothing but ties


@each_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@given(case=cases(dtypes=(torch.float32,)))
def test_masks_and_cast_in_one_pass(isa: str, dtype: torch.dtype, case: Case) -> None:
    cpu.use_isa(isa)
    weight, pattern, dim = case
    out = project(weight, make_control(0.0, pattern.n), pattern.m, dim, dtype)
    wanted = nm_project(weight, pattern, dim).to(dtype)
    assert out.dtype == dtype
    assert out.stride() == torch.empty_like(weight).stride()
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    finite = ~wanted.isnan()
    assert raw_bits(out[finite]) == raw_bits(wanted[finite])


@each_isa
@given(case=cases(), layout=st.sampled_from(["contiguous", "transposed", "channels_last"]))
def test_a_fixed_mask_is_one_select(isa: str, case: Case, layout: str) -> None:
    cpu.use_isa(isa)
    weight, pattern, dim = case
    mask = nm_mask(weight, pattern, dim)
    if weight.ndim == 4:
        mask = lay_out(mask, layout)  # not always that of the weight
    wanted = torch.where(mask, weight, 0.0)
    out = project_kept(weight, mask)
    assert out.stride() == torch.empty_like(weight).stride()
    assert raw_bits(out) == raw_bits(wanted)
    grad = weight.clone()
    keep_(grad, mask)
    assert raw_bits(grad) == raw_bits(wanted)
    if weight.dtype == torch.float32:
        narrow = project_kept(weight, mask, torch.bfloat16)
        torch.testing.assert_close(
            narrow, wanted.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("shape", [(5,), (3, 1000), (2048, 4096)], ids=str)
def test_a_fixed_mask_of_any_size(shape: tuple[int, ...]) -> None:
    weight, mask = torch.randn(shape), torch.rand(shape) < 0.5
    assert torch.equal(project_kept(weight, mask), torch.where(mask, weight, 0.0))
    with pytest.raises(RuntimeError, match="bool"):
        project_kept(weight, mask.float())
    with pytest.raises(RuntimeError):
        project_kept(weight, mask[:-1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_another_dtype_or_layout(layout: str, grad_dtype: torch.dtype) -> None:
    weight = lay_out(torch.randn(8, 16, 3, 2), layout)
    grad = torch.randn(8, 16, 3, 2).to(grad_dtype)
    control, mask = make_control(0.25, 2), nm_mask(weight, "2:4", 1)
    wanted = exact_gradient(grad, weight, mask, 0.25)
    assert torch.equal(torch.ops.nmfx.sr_ste_backward(grad, weight, control, 4, 1, 0), wanted)
    add_decay_(grad, weight, control, 4, 1)
    assert torch.equal(grad, wanted.to(grad_dtype))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(512, 1024), (2048, 4096), (512, 512, 3, 3)], ids=str)
def test_large_weights(shape: tuple[int, ...], threads: int) -> None:
    # Beyond a megabyte results are pooled, beyond the caches they are written past them.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = torch.randn(shape)
        for layout in ("contiguous", "channels_last"):
            values = lay_out(weight, layout)
            out = project(values, make_control(0.0, 2), 4, 1)
            assert out.stride() == values.stride()
            assert torch.equal(out, nm_project(values, "2:4", 1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 3, 3)], ids=str)
def test_empty_weights(shape: tuple[int, ...]) -> None:
    weight, control = torch.empty(shape), make_control(0.25, 2)
    assert project(weight, control, 4, 1).shape == shape
    assert torch.ops.nmfx.sr_ste_backward(weight, weight, control, 4, 1, 0).shape == shape
    add_decay_(weight, weight, control, 4, 1)


@pytest.mark.parametrize(
    ("weight", "control", "m", "dim", "text"),
    [
        (torch.ones(4, 6), make_control(0.0, 2), 4, 1, "size 6 of dim 1 is not a multiple of 4"),
        (torch.ones(4, 8), make_control(0.0, 5), 4, 1, "outside 1 <= N <= M <= 64"),
        (torch.ones(4, 8), make_control(0.0, 2).float(), 4, 1, "control is a float64 tensor"),
        (torch.ones(4, 8), make_control(0.0, 2), 4, 2, "dim=2"),
        (torch.ones(4, 8).int(), make_control(0.0, 2), 4, 1, "take float16, bfloat16"),
    ],
    ids=["size", "n", "control", "dim", "dtype"],
)
def test_bad_arguments(weight: Tensor, control: Tensor, m: int, dim: int, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        project(weight, control, m, dim)


# --- memory of large results -------------------------------------------------------------------


def test_freed_results_are_used_again() -> None:
    weight, control = torch.randn(1024, 1024), make_control(0.0, 2)
    out = project(weight, control, 4, 1)
    address = out.data_ptr()
    kept = project(weight, control, 4, 1)
    assert kept.data_ptr() != address, "two live results share their memory"
    view = out[3]
    del out
    again = project(weight, control, 4, 1)
    assert again.data_ptr() != address, "memory that a view refers to was given away"
    del view, again
    gc.collect()
    addresses = {project(weight, control, 4, 1).data_ptr() for _ in range(5)}
    assert address in addresses or len(addresses) == 1, "every result has new memory"
    assert torch.equal(kept, nm_project(weight, "2:4", 1))


def test_results_outlive_their_thread_and_are_independent() -> None:
    weights = [torch.randn(1024, 512) for _ in range(4)]
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = project(weights[i], make_control(0.0, 2), 4, 1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, weight in enumerate(weights):
        assert torch.equal(results[i], nm_project(weight, "2:4", 1))


def test_pooled_results_behave_like_tensors() -> None:
    weight = torch.randn(1024, 512, requires_grad=True)
    out = sr_ste(weight, make_control(0.0, 2), 4, 1)
    wanted = nm_project(weight.detach(), "2:4", 1)
    assert torch.equal(out.clone(), wanted)
    with torch.no_grad():
        out = project(weight.detach(), make_control(0.0, 2), 4, 1)
        out.mul_(2.0)
        out.resize_(2, 3)  # fits in the memory that is there
        assert torch.equal(out, 2 * wanted.flatten()[:6].view(2, 3))
        out = project(weight.detach(), make_control(0.0, 2), 4, 1)
        out.share_memory_()
        assert torch.equal(out, wanted)
