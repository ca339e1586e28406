"""Copies of large weights: equal bit for bit, and in huge pages where there are some."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nmfx
from nmfx import huge_pages
from nmfx.huge_pages import SIZE, huge_cat, huge_copy
from nmfx.mask import DTYPES

needs_huge_pages = pytest.mark.skipif(huge_pages.why_not() is not None, reason="no huge pages")


def is_huge(tensor: torch.Tensor) -> bool:
    """Whether the kernel was asked for huge pages where a tensor begins: flag hg of its mapping."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(span[1], 16) <= tensor.data_ptr() < int(span[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("its mapping was not found")


@given(dtype=st.sampled_from([*DTYPES, torch.int32]), extra=st.integers(-9, 9), data=st.data())
def test_equal_bit_for_bit(dtype, extra, data):
    count = max(0, data.draw(st.sampled_from([0, 40, SIZE // dtype.itemsize])) + extra)
    bits = torch.randint(-128, 128, (count * dtype.itemsize,), dtype=torch.int8)  # NaN too
    tensor = bits.view(dtype)
    if data.draw(st.booleans()):
        tensor = torch.stack((tensor, tensor), 1)[:, 0]
    copied = huge_copy(tensor)
    assert (copied.dtype, copied.shape) == (dtype, tensor.shape)
    assert copied.is_contiguous()
    assert torch.equal(copied.view(torch.int8), bits)
    assert copied.untyped_storage().nbytes() == bits.numel()
    parts = [tensor[: count // 3], tensor[count // 3 :]]
    assert torch.equal(huge_cat(parts).view(torch.int8), bits)
    if copied.numel():
        assert copied.data_ptr() != tensor.data_ptr()


@needs_huge_pages
def test_large_ones_are_in_huge_pages():
    large = huge_copy(torch.ones(SIZE // 4, 3))
    assert large.data_ptr() % SIZE == 0
    assert is_huge(large)
    assert not is_huge(huge_copy(torch.ones(SIZE // 4 - 1)))


def test_a_tensor_like_any_other():
    tensor = huge_copy(torch.arange(SIZE, dtype=torch.float32).view(2, -1))
    assert torch.equal(copy.deepcopy(tensor), tensor)
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    assert torch.equal(torch.load(file), tensor)
    expected = tensor.clone()
    tensor.share_memory_()
    assert tensor.is_shared()
    assert torch.equal(tensor, expected)
    tensor.mul_(2)
    assert torch.equal(tensor, 2 * expected)


def test_memory_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    source = torch.ones(64 << 20, dtype=torch.uint8)
    copied = huge_copy(source)
    before = resident()
    for _ in range(5):
        copied = huge_copy(source)
    assert resident() - before < source.numel() // 2
    assert torch.equal(copied, source)


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_a_system_without(setting, tmp_path, monkeypatch):
    file = tmp_path / "enabled"
    if setting:
        file.write_text(setting)
    monkeypatch.setattr(huge_pages, "_SETTING", file)
    assert huge_pages.why_not()
    tensor = torch.ones(SIZE)
    assert torch.equal(huge_copy(tensor), tensor)
    assert "without huge pages" in nmfx.kernels.cpu.status()


@needs_huge_pages
def test_packed_weights_are_in_huge_pages(tmp_path):
    """Those that lower makes, and those that load reads."""
    model = nn.Sequential(nn.Linear(2048, 1024), nn.Linear(1024, 8))
    dense = copy.deepcopy(model)
    lowered = nmfx.lower(nmfx.fold(nmfx.sparsify(model, "2:4")), tune=False)
    nmfx.save(lowered, tmp_path / "model.safetensors")
    loaded = nmfx.load(tmp_path / "model.safetensors", into=dense)
    x = torch.randn(3, 2048)
    for served in (lowered, loaded):
        assert is_huge(served[0].weight_values)
        assert not is_huge(served[0].weight_index)  # 512 KB
    assert torch.equal(lowered(x), loaded(x))
