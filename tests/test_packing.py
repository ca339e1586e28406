"""The packed format, read back by a reader written from its text, and bit for bit."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from strategies import (
    DTYPES,
    LAYOUTS,
    Case,
    cases,
    element_bits,
    from_bits,
    lay_out,
    patterns,
    special_bits,
)
from torch import Tensor

from nmfx.capture.packed import pack_weight, unpack_weight
from nmfx.errors import NMError
from nmfx.mask import as_bits, magnitude, nm_project
from nmfx.packing import (
    check_packed,
    detect_pattern,
    index_bits,
    makes_smaller,
    pack,
    pack_conv,
    packed_bytes,
    packed_shapes,
    unpack,
    unpack_conv,
)
from nmfx.pattern import Pattern

PATTERN = Pattern(2, 4)


@st.composite
def tall(draw: DrawFn) -> Case:
    """A matrix of `cases`, often made taller than a block from the same values."""
    case = draw(cases(ndim=2, dim=1))
    rows = draw(st.sampled_from([case.weight.shape[0], 15, 16, 17, 33]))
    if rows == case.weight.shape[0]:
        return case
    pool, cols = reference.raw_bits(case.weight), case.weight.shape[1]
    bits = random.Random(draw(st.integers(0, 99))).choices(pool, k=rows * cols)
    weight = from_bits(bits, case.weight.dtype).view(rows, cols)
    return case._replace(weight=lay_out(weight, draw(st.sampled_from(LAYOUTS))))


matrices = tall()


def bits_rows(tensor: torch.Tensor) -> list[list[int]]:
    return reference.rows_of(reference.raw_bits(tensor), tensor.shape[0])


def bits_blocks(values: torch.Tensor) -> list[list[list[int]]]:
    """[block][slot][lane], as bit patterns."""
    return [bits_rows(block) for block in values]


def spare_bits(index: torch.Tensor, rows: int, slots: int, m: int) -> bool:
    """Whether a field after the last slot, or a row after the last row, is not 0."""
    width = reference.packed_width(m)
    for b, block in enumerate(index.tolist()):
        for lane in range(16):
            words = [word[lane] for word in block]
            first = slots if 16 * b + lane < rows else 0
            spare = range(first, len(words) * 32 // width)
            if any(reference.packed_field(words, slot, width) for slot in spare):
                return True
    return False


def pruned(case: Case) -> torch.Tensor:
    """The case's weight made N:M, in the layout it came in."""
    dense = nm_project(case.weight, case.pattern, 1)
    return dense if case.weight.is_contiguous() else lay_out(dense, "transposed")


@given(matrices)
def test_pack_round_trips_bit_for_bit(case: Case) -> None:
    weight = pruned(case)
    values, index = pack(weight, case.pattern)
    dense = unpack(values, index, *weight.shape, case.pattern)
    assert dense.dtype == weight.dtype, dense.dtype
    assert reference.raw_bits(dense) == reference.raw_bits(weight), f"{case}: {dense}"


@given(matrices)
def test_pack_is_what_its_text_says(case: Case) -> None:
    weight, (n, m) = pruned(case), (case.pattern.n, case.pattern.m)
    rows, cols = weight.shape
    values, index = pack(weight, case.pattern)
    assert index.dtype == torch.int32, index.dtype
    assert values.dtype == weight.dtype, values.dtype
    dense, fields = reference.read_packed(bits_blocks(values), index.tolist(), rows, cols, n, m)
    assert dense == bits_rows(weight), f"{weight} reads as {dense}"
    mask = reference.rows_of(reference.nm_mask(weight, n, m, 1), rows)
    kept = [[c % m for c in range(cols) if row[c]] for row in mask]
    assert fields == kept, f"{weight}: fields {fields}, kept columns {kept}"
    blocks, slots = math.ceil(rows / 16), cols // m * n
    words = math.ceil(slots * reference.packed_width(m) / 32)
    assert (tuple(values.shape), tuple(index.shape)) == (
        (blocks, slots, 16),
        (blocks, words, 16),
    )
    assert (tuple(values.shape), tuple(index.shape)) == packed_shapes(rows, cols, case.pattern)
    size = values.numel() * values.element_size() + index.numel() * index.element_size()
    assert packed_bytes(rows, cols, case.pattern, weight.element_size()) == size
    check_packed(values, index, rows, cols, case.pattern)


@given(matrices)
def test_pack_leaves_spare_fields_and_rows_zero(case: Case) -> None:
    rows = case.weight.shape[0]
    values, index = pack(pruned(case), case.pattern)
    assert not spare_bits(index, rows, values.shape[1], case.pattern.m), index.tolist()
    for slot in bits_blocks(values)[-1]:
        padding = slot[(rows - 1) % 16 + 1 :]
        assert not any(padding), f"{case.pattern}, {rows} rows: {slot}"


@given(matrices)
def test_pack_never_drops_a_value(case: Case) -> None:
    weight, pattern, _ = case
    if reference.is_nm(weight, pattern.n, pattern.m, 1):
        values, index = pack(weight, pattern)
        dense = unpack(values, index, *weight.shape, pattern)
        # -0.0 may be dropped: it is a zero. Everything else must come back.
        got, want = reference.raw_bits(dense), reference.raw_bits(weight)
        zero = {0, 1 << 8 * weight.element_size() - 1}
        assert all(a == b or {a, b} <= zero for a, b in zip(got, want, strict=True)), case
        return
    with pytest.raises(NMError) as caught:
        pack(weight, pattern)
    assert str(caught.value) == (
        f"a group has more than {pattern.n} nonzeros, which breaks {pattern}; packing would drop "
        f"values, so prune first (nmfx.fold) or choose another pattern"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_keeps_every_special_value(dtype: torch.dtype, layout: str) -> None:
    # Each special, of both signs, as the one kept value of its own 1:4 group.
    sign = 1 << 8 * dtype.itemsize - 1
    specials = [b | s for b in special_bits(dtype).values() for s in (0, sign)]
    weight = from_bits([b for special in specials for b in (special, 0, 0, 0)], dtype).view(6, 16)
    values, index = pack(lay_out(weight, layout), "1:4")
    slots = bits_blocks(values)[0]
    assert [slot[row] for row in range(6) for slot in slots] == specials, values
    dense = unpack(values, index, 6, 16, "1:4")
    assert reference.raw_bits(dense) == reference.raw_bits(weight), dense


def test_pack_example_of_the_text() -> None:
    values, index = pack(torch.tensor([[0.0, 5, 0, 7, 1, 0, 0, 2]]), "2:4")
    assert values[0, :, 0].tolist() == [5, 7, 1, 2]
    assert index[0, :, 0].tolist() == [0b1111 << 16 | 0b0001]


def test_pack_pads_a_group_with_its_first_zeros() -> None:
    values, index = pack(torch.tensor([[0.0, 0, 0, 3, 0, 0, 0, 0]]), "2:4")
    assert values[0, :, 0].tolist() == [0, 3, 0, 0]
    # Fields 0, 3, 0, 1: slots 0 and 2 in the low half, 1 and 3 in the high half.
    assert index[0, :, 0].tolist() == [0b0111 << 16]


def test_pack_uses_the_sign_bit_of_a_word() -> None:
    # Sixteen fields of 3: every bit of the word is set, which int32 reads as -1.
    values, index = pack(torch.tensor([[0.0, 0, 0, 1] * 16]), "1:4")
    assert index[0, :, 0].tolist() == [-1]
    assert torch.equal(unpack(values, index, 1, 64, "1:4"), torch.tensor([[0.0, 0, 0, 1] * 16]))


@pytest.mark.parametrize(
    ("m", "width"),
    [(1, 2), (2, 2), (3, 2), (4, 2), (5, 4), (8, 4), (15, 4), (16, 4), (17, 8), (64, 8)],
)
def test_index_bits_follow_the_text(m: int, width: int) -> None:
    assert index_bits(m) == width


def test_packed_bytes_of_common_patterns() -> None:
    # 2:4 in 16 bits: half of the values and 2 bits for each, 9/16 of dense.
    assert packed_bytes(128, 256, Pattern(2, 4), 2) == 128 * 256 * 2 * 9 // 16
    # 1:16 in 32 bits: a sixteenth of the values and 4 bits for each.
    assert packed_bytes(128, 256, Pattern(1, 16), 4) == 128 * 16 * 4 + 128 * 8
    # Rows end on a word and blocks on 16 rows: one 2-bit field in each of 3 rows takes 16 words.
    assert packed_bytes(3, 4, Pattern(1, 4), 4) == 16 * 4 + 16 * 4


@pytest.mark.parametrize(
    ("pattern", "itemsize", "most"),
    [("2:4", 4, 0.54), ("2:4", 2, 0.57), ("1:16", 4, 0.08)],
)
def test_packing_saves_the_memory_it_promises(pattern: str, itemsize: int, most: float) -> None:
    ratio = packed_bytes(4096, 4096, Pattern.parse(pattern), itemsize) / (4096 * 4096 * itemsize)
    assert ratio <= most, f"{pattern} with {itemsize} bytes: {ratio} of dense"


@given(patterns(), st.integers(1, 40), st.sampled_from([2, 4, 8]))
def test_makes_smaller_counts_full_blocks(pattern: Pattern, groups: int, itemsize: int) -> None:
    slots = groups * pattern.n
    packed = slots * itemsize + math.ceil(slots * reference.packed_width(pattern.m) / 32) * 4
    columns = groups * pattern.m
    assert makes_smaller(columns, pattern, itemsize) == (packed < columns * itemsize)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)], ids=str)
def test_pack_takes_empty_weights(shape: tuple[int, int]) -> None:
    values, index = pack(torch.zeros(shape), "2:4")
    assert (tuple(values.shape), tuple(index.shape)) == packed_shapes(*shape, Pattern(2, 4))
    check_packed(values, index, *shape, "2:4")
    assert unpack(values, index, *shape, "2:4").shape == shape


def test_pack_makes_new_plain_tensors() -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    values, index = pack(weight, "1:4")
    dense = unpack(values, index, 4, 4, "1:4")
    for tensor in (values, index, dense):
        assert type(tensor) is torch.Tensor, type(tensor)
        assert tensor.is_contiguous(), tensor.stride()
        assert not tensor.requires_grad, tensor
    values.fill_(9)
    assert torch.equal(weight.detach(), torch.eye(4)), "packing shares memory with the weight"


@pytest.mark.parametrize("shape", [(8,), (2, 4, 4), (8, 4, 3, 3)], ids=str)
def test_pack_refuses_other_ranks(shape: tuple[int, ...]) -> None:
    with pytest.raises(NMError) as caught:
        pack(torch.zeros(shape), "2:4")
    assert str(caught.value) == f"a packed weight is 2-D (rows, cols), got shape {shape}"


def test_pack_refuses_cols_that_do_not_divide() -> None:
    with pytest.raises(NMError) as caught:
        pack(torch.zeros(4, 6), "2:4")
    assert str(caught.value) == (
        "size 6 of dim 1 (shape (4, 6)) is not a multiple of 4, so 2:4 (keep 2 of every 4) "
        "groups would straddle rows"
    )


def test_pack_counts_denormals_as_values(flush_denormal: None) -> None:
    # With the flag set `w != 0` is False for a denormal, and a packer that asks it loses values.
    with pytest.raises(NMError, match="more than 2 nonzeros"):
        pack(from_bits([1, 2, 3, 4], torch.float32).view(1, 4), "2:4")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pack_weight_keeps_denormals(flush_denormal: None, dtype: torch.dtype) -> None:
    # Its own check called a kept denormal a zero, and so a change.
    weight = from_bits([0, 5, 0, 7] * 8, dtype).view(4, 8)
    again = unpack_weight(*pack_weight(weight, 1, 1, PATTERN), (4, 8), 1, 1, PATTERN)
    assert torch.equal(as_bits(again), as_bits(weight))


def test_pack_weight_takes_negative_zeros_in_place_of_values() -> None:
    weight = torch.tensor([[-0.0, -0.0, -0.0, -0.0, 1.0, -0.0, -0.0, -0.0]])
    again = unpack_weight(*pack_weight(weight, 1, 1, PATTERN), (1, 8), 1, 1, PATTERN)
    assert torch.equal(again, weight), "as numbers"


@given(matrices, st.data())
def test_check_packed_refuses_a_changed_index(case: Case, data: st.DataObject) -> None:
    # Any word changed: either refused, or a different weight that is in bounds and canonical.
    weight, pattern = pruned(case), case.pattern
    (rows, cols), (n, m) = weight.shape, (pattern.n, pattern.m)
    values, index = pack(weight, pattern)
    at = tuple(data.draw(st.integers(0, size - 1)) for size in index.shape)
    flips = st.one_of(st.integers(0, 31).map(lambda bit: 1 << bit), st.integers(1, 2**32 - 1))
    flipped = data.draw(flips, "flipped bits")
    index[at] ^= flipped - (flipped >> 31 << 32)
    try:
        dense, fields = reference.read_packed(bits_blocks(values), index.tolist(), rows, cols, n, m)
    except IndexError:
        valid = False
    else:
        groups = [row[i : i + n] for row in fields for i in range(0, len(row), n)]
        valid = all(group == sorted(set(group)) for group in groups)
        valid = valid and not spare_bits(index, rows, values.shape[1], m)
    if valid:
        check_packed(values, index, rows, cols, pattern)
        got = bits_rows(unpack(values, index, rows, cols, pattern))
        assert got == dense, f"{index.tolist()}: {got}"
    else:
        with pytest.raises(NMError):
            check_packed(values, index, rows, cols, pattern)


def good() -> tuple[torch.Tensor, torch.Tensor]:
    """A packed 2:4 weight of shape (2, 12): 6 slots, and one word with 20 spare bits per row."""
    return pack(torch.eye(2, 12), "2:4")


def put(tensor: torch.Tensor, lane: int, value: float) -> torch.Tensor:
    """The tensor with `value` in the first slot or word of a lane."""
    tensor = tensor.clone()
    tensor[0, 0, lane] = value
    return tensor


TEXT = "packed values are float16, bfloat16, float32 or float64 and the index is int32, got "
SHAPES = (
    "a packed weight with 2 rows, 12 columns and 2:4 (keep 2 of every 4) has shapes (1, 6, 16) "
    "and (1, 1, 16), got "
)
SPARE = "the bits after the last field of a packed index are not 0"
PADDING = "the rows after the last of 2 in a packed weight are not 0"
ORDER = "the packed indices of a group do not increase"


@pytest.mark.parametrize(
    ("values", "index", "rows", "cols", "text"),
    [
        (
            lambda v: v,
            lambda i: i,
            2,
            10,
            "cols=10 is not a multiple of 4, as 2:4 (keep 2 of every 4) needs",
        ),
        (lambda v: v.int(), lambda i: i, 2, 12, TEXT + "torch.int32 and torch.int32"),
        (lambda v: v, lambda i: i.long(), 2, 12, TEXT + "torch.float32 and torch.int64"),
        (
            lambda v: v,
            lambda i: i.view(torch.uint8),
            2,
            12,
            TEXT + "torch.float32 and torch.uint8",
        ),
        (
            lambda v: v,
            lambda i: i.view(torch.float32),
            2,
            12,
            TEXT + "torch.float32 and torch.float32",
        ),
        (lambda v: v, lambda i: i.bool(), 2, 12, TEXT + "torch.float32 and torch.bool"),
        (
            lambda v: v.to(torch.float8_e4m3fn),
            lambda i: i,
            2,
            12,
            TEXT + "torch.float8_e4m3fn and torch.int32",
        ),
        (lambda v: v[0], lambda i: i, 2, 12, SHAPES + "(6, 16) and (1, 1, 16)"),
        (lambda v: v, lambda i: i.flatten(), 2, 12, SHAPES + "(1, 6, 16) and (16,)"),
        (lambda v: v[:, :-1], lambda i: i, 2, 12, SHAPES + "(1, 5, 16) and (1, 1, 16)"),
        (lambda v: v[..., :2], lambda i: i, 2, 12, SHAPES + "(1, 6, 2) and (1, 1, 16)"),
        (lambda v: v, lambda i: i[:, :-1], 2, 12, SHAPES + "(1, 6, 16) and (1, 0, 16)"),
        (lambda v: v, lambda i: i[..., :2], 2, 12, SHAPES + "(1, 6, 16) and (1, 1, 2)"),
        (lambda v: v, lambda i: i[:0], 2, 12, SHAPES + "(1, 6, 16) and (0, 1, 16)"),
        (
            lambda v: v,
            lambda i: i,
            17,
            12,
            "a packed weight with 17 rows, 12 columns and 2:4 (keep 2 of every 4) has shapes "
            "(2, 6, 16) and (2, 1, 16), got (1, 6, 16) and (1, 1, 16)",
        ),
        (
            lambda v: v,
            lambda i: i,
            2,
            -12,
            "a packed weight with 2 rows, -12 columns and 2:4 (keep 2 of every 4) has shapes "
            "(1, -6, 16) and (1, 0, 16), got (1, 6, 16) and (1, 1, 16)",
        ),
        (lambda v: v[:0], lambda i: i[:0], -12, 12, "rows=-12 is negative"),
        # Six slots: the low half ends after bit 5, the high half after bit 21.
        (lambda v: v, lambda i: i | 1 << 6, 2, 12, SPARE),
        (lambda v: v, lambda i: i | 1 << 15, 2, 12, SPARE),
        (lambda v: v, lambda i: i | 1 << 22, 2, 12, SPARE),
        (lambda v: v, lambda i: i | -(1 << 31), 2, 12, SPARE),
        (lambda v: v, lambda i: put(i, 2, 1), 2, 12, PADDING),
        (lambda v: v, lambda i: put(i, 15, 1 << 20), 2, 12, PADDING),
        (lambda v: put(v, 2, 1.0), lambda i: i, 2, 12, PADDING),
        (lambda v: put(v, 15, -0.0), lambda i: i, 2, 12, PADDING),
        (lambda v: v, torch.zeros_like, 2, 12, ORDER),
        # Fields 2, 1 in every group of the second row.
        (lambda v: v, lambda i: put(i, 1, 0b010101 << 16 | 0b101010), 2, 12, ORDER),
    ],
)
def test_check_packed_refuses(values, index, rows: int, cols: int, text: str) -> None:
    good_values, good_index = good()
    check_packed(good_values, good_index, 2, 12, "2:4")
    with pytest.raises(NMError) as caught:
        check_packed(values(good_values), index(good_index), rows, cols, "2:4")
    assert str(caught.value) == text


def test_check_packed_refuses_an_index_outside_its_group() -> None:
    values, index = pack(torch.eye(3), "1:3")
    index[0, 0, 1] = 3  # two bits hold 0..3, a group of three has 0..2
    with pytest.raises(NMError) as caught:
        check_packed(values, index, 3, 3, "1:3")
    assert str(caught.value) == "a packed index is 3, outside its group of 3"


def test_check_packed_refuses_a_bad_pattern() -> None:
    with pytest.raises(NMError, match="is not of the form 'N:M'"):
        check_packed(*good(), 2, 12, "2 : 4")


def test_unpack_fills_with_positive_zero() -> None:
    weight = torch.tensor([[-0.0, 1.0, -0.0, -0.0], [math.nan, -0.0, -0.0, -0.0]])
    values, index = pack(weight, "1:4")
    dense = unpack(values, index, 2, 4, "1:4")
    assert reference.raw_bits(dense) == [0, 0x3F80_0000, 0, 0, 0x7FC0_0000, 0, 0, 0], dense


class Conv(NamedTuple):
    """A convolution's N:M weight (out_channels, channels / groups, *kernel_size)."""

    weight: torch.Tensor
    groups: int
    pattern: Pattern


@st.composite
def convs(draw: DrawFn) -> Conv:
    dtype, pattern = draw(st.sampled_from(DTYPES)), draw(patterns(max_m=8))
    groups = draw(st.integers(1, 3))
    outputs = draw(st.sampled_from([1, 3, 15, 16, 17, 33]))
    channels = draw(st.integers(1, 2)) * pattern.m
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (3,), (1,)]))
    shape = (groups * outputs, channels, *kernel)
    pool = draw(st.lists(element_bits(dtype), min_size=8, max_size=40))
    bits = random.Random(draw(st.integers(0, 99))).choices(pool, k=math.prod(shape))
    weight = nm_project(from_bits(bits, dtype).view(shape), pattern, 1)
    return Conv(lay_out(weight, draw(st.sampled_from(LAYOUTS))), groups, pattern)


@given(convs())
def test_pack_conv_round_trips_bit_for_bit(conv: Conv) -> None:
    weight, groups, pattern = conv
    values, index = pack_conv(weight, groups, pattern)
    dense = unpack_conv(values, index, tuple(weight.shape), groups, pattern)
    for tensor in (values, index, dense):
        assert tensor.is_contiguous(), tensor.stride()
    assert (dense.dtype, dense.shape) == (weight.dtype, weight.shape)
    assert reference.raw_bits(dense) == reference.raw_bits(weight), f"{conv}: {dense}"


@given(convs())
def test_pack_conv_is_what_its_text_says(conv: Conv) -> None:
    weight, groups, (n, m) = conv.weight, conv.groups, (conv.pattern.n, conv.pattern.m)
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    positions = math.prod(weight.shape[2:])
    values, index = pack_conv(weight, groups, conv.pattern)
    blocks = math.ceil(outputs / 16)
    assert values.shape[0] == index.shape[0] == groups * blocks
    filters = bits_rows(weight)  # of each filter: channels slowest, as the weight is declared
    for g in range(groups):
        v, i = (t[g * blocks : (g + 1) * blocks] for t in (values, index))
        check_packed(v, i, outputs, positions * channels, conv.pattern)
        dense, _ = reference.read_packed(
            bits_blocks(v), i.tolist(), outputs, positions * channels, n, m
        )
        for o, row in enumerate(dense):
            want = filters[g * outputs + o]
            columns = [want[c * positions + k] for k in range(positions) for c in range(channels)]
            assert row == columns, f"group {g}, output {o}: {row} is not {columns}"


def test_pack_conv_refuses_groups_that_cross_kernel_positions() -> None:
    # Eight columns, but only two channels at each kernel position.
    with pytest.raises(NMError) as caught:
        pack_conv(torch.zeros(8, 2, 2, 2), 1, "2:4")
    assert str(caught.value) == (
        "size 2 of dim 1 (shape (8, 2, 2, 2)) is not a multiple of 4, so 2:4 (keep 2 of every 4) "
        "groups would straddle rows"
    )


def test_pack_conv_refuses_a_weight_that_breaks_the_pattern() -> None:
    weight = nm_project(torch.randn(6, 4, 3, 3), "2:4", 1)
    weight[5, :, 2, 1] = 1  # of the last filter, at one kernel position
    with pytest.raises(NMError, match="a group has more than 2 nonzeros, which breaks 2:4"):
        pack_conv(weight, 2, "2:4")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ((6, 8, 3, 3), "2:4"),
        ((6, 32, 1, 1), "1:16"),
        ((3, 16, 3), "1:8"),
        ((6, 4, 3, 3), "2:4"),  # few channels, but rows of 36 columns
        ((6, 3, 5, 5), "1:3"),
        ((6, 32), "2:4"),
    ],
    ids=str,
)
def test_detect_pattern_finds_what_a_weight_was_pruned_to(
    shape: tuple[int, ...], pattern: str, dtype: torch.dtype
) -> None:
    weight = nm_project(torch.randn(shape).to(dtype), pattern, 1)
    assert detect_pattern(weight) == Pattern.parse(pattern)
    assert detect_pattern(weight.transpose(0, 1).contiguous(), 0) == Pattern.parse(pattern)


def test_detect_pattern_of_a_4d_weight_looks_along_channels() -> None:
    weight = torch.ones(4, 8, 3, 3)
    weight[:, :, 1:] = 0  # 1:3 along a column of the kernel, dense along channels at its first row
    assert detect_pattern(weight) is None
    weight[:, 1::2] = 0
    assert detect_pattern(weight) == Pattern(1, 2)
    assert detect_pattern(torch.ones(4, 8, 3, 3)) is None
    assert detect_pattern(torch.zeros(0, 8, 3, 3)) is None


def least_by_hand(weight: Tensor, dim: int) -> Pattern | None:
    """The pattern of the fewest bytes, each N:M counted in all of the weight."""
    size, itemsize = weight.shape[dim], weight.element_size()
    columns = size * weight.shape[2:].numel()
    best, least = None, 16 * columns * itemsize
    for m in range(2, min(size, 64) + 1):
        if size % m == 0:
            groups = (weight != 0).movedim(dim, -1).reshape(-1, m)
            pattern = Pattern(max(1, int(groups.sum(1).max())), m)
            if packed_bytes(16, columns, pattern, itemsize) < least:
                best, least = pattern, packed_bytes(16, columns, pattern, itemsize)
    return best


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_detect_pattern_is_the_least_of_all(share: float, dim: int) -> None:
    for columns in (1, 7, 12, 36, 64, 96, 128):
        for rows in (1, 3, 16, 17, 40):
            weight = torch.where(torch.rand(rows, columns) < share, 1.0, 0.0)
            weight[16:] = torch.randn(rows, columns)[16:] * weight[16:]
            weight[rows // 2 :, ::3] = 0.0  # lines that are not alike
            given = weight if dim else weight.t().contiguous()
            expected = least_by_hand(weight, 1)
            assert detect_pattern(given, dim) == expected, (rows, columns)


def test_detect_pattern_of_lines_that_are_not_alike() -> None:
    weight = nm_project(torch.randn(40, 64), "1:8", 1)
    weight[33] = nm_project(torch.randn(1, 64), "2:4", 1)
    assert detect_pattern(weight) == Pattern(2, 4)
    weight[33] = 1.0
    assert detect_pattern(weight) is None
    assert detect_pattern(torch.zeros(40, 64)) == Pattern(1, 64)


def test_detect_pattern_reads_a_few_lines_of_a_dense_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def counted(weight: Tensor) -> Tensor:
        read.append(weight.numel())
        return magnitude(weight)

    monkeypatch.setattr("nmfx.packing.magnitude", counted)
    for dim, lines in ((1, 16 * 256), (0, 512 * 16)):
        read.clear()
        assert detect_pattern(torch.randn(512, 256), dim) is None
        assert max(read) == lines


@pytest.mark.parametrize("dim", [0, 1])
def test_detect_pattern_counts_denormals_as_values(flush_denormal: None, dim: int) -> None:
    weight = from_bits([1, 2, 0, 0] * 32, torch.float32).view(8, 16)
    pattern = detect_pattern(weight if dim == 1 else weight.t(), dim)
    assert pattern == Pattern(2, 4)
    pack(weight, pattern)
