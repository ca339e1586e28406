"""The packed format, read back by a reader written from its text, and bit for bit."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, Case, cases, from_bits, lay_out, special_bits

from nmfx.errors import NMError
from nmfx.mask import nm_project
from nmfx.packing import check_packed, index_bits, pack, packed_bytes, packed_shapes, unpack
from nmfx.pattern import Pattern

matrices = cases(ndim=2, dim=1)


def bits_rows(tensor: torch.Tensor) -> list[list[int]]:
    return reference.rows_of(reference.raw_bits(tensor), tensor.shape[0])


def pruned(case: Case) -> torch.Tensor:
    """The case's weight made N:M, in the layout it came in."""
    dense = nm_project(case.weight, case.pattern, 1)
    return dense if case.weight.is_contiguous() else lay_out(dense, "transposed")


@given(matrices)
def test_pack_round_trips_bit_for_bit(case: Case) -> None:
    weight = pruned(case)
    values, index = pack(weight, case.pattern)
    dense = unpack(values, index, weight.shape[1], case.pattern)
    assert dense.dtype == weight.dtype, dense.dtype
    assert reference.raw_bits(dense) == reference.raw_bits(weight), f"{case}: {dense}"


@given(matrices)
def test_pack_is_what_its_text_says(case: Case) -> None:
    weight, (n, m) = pruned(case), (case.pattern.n, case.pattern.m)
    rows, cols = weight.shape
    values, index = pack(weight, case.pattern)
    assert index.dtype == torch.uint8, index.dtype
    assert values.dtype == weight.dtype, values.dtype
    dense, fields = reference.read_packed(bits_rows(values), index.tolist(), cols, n, m)
    assert dense == bits_rows(weight), f"{weight} reads as {dense}"
    mask = reference.rows_of(reference.nm_mask(weight, n, m, 1), rows)
    kept = [[c % m for c in range(cols) if row[c]] for row in mask]
    assert fields == kept, f"{weight}: fields {fields}, kept columns {kept}"
    assert (tuple(values.shape), tuple(index.shape)) == packed_shapes(rows, cols, case.pattern)
    size = values.numel() * values.element_size() + index.numel()
    assert packed_bytes(rows, cols, case.pattern, weight.element_size()) == size
    check_packed(values, index, cols, case.pattern)


@given(matrices)
def test_pack_leaves_the_last_bits_zero(case: Case) -> None:
    _, index = pack(pruned(case), case.pattern)
    width = index_bits(case.pattern.m)
    used = case.weight.shape[1] // case.pattern.m * case.pattern.n * width
    for row in index.tolist():
        text = sum(byte << 8 * place for place, byte in enumerate(row))
        assert text >> used == 0, f"{case.pattern}: {row} has bits set after bit {used}"


@given(matrices)
def test_pack_never_drops_a_value(case: Case) -> None:
    weight, pattern, _ = case
    if reference.is_nm(weight, pattern.n, pattern.m, 1):
        values, index = pack(weight, pattern)
        dense = unpack(values, index, weight.shape[1], pattern)
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
    assert reference.raw_bits(values) == specials, values
    dense = unpack(values, index, 16, "1:4")
    assert reference.raw_bits(dense) == reference.raw_bits(weight), dense


def test_pack_example_of_the_text() -> None:
    values, index = pack(torch.tensor([[0.0, 5, 0, 7, 1, 0, 0, 2]]), "2:4")
    assert values.tolist() == [[5, 7, 1, 2]]
    assert index.tolist() == [[0b11_00_11_01]]


def test_pack_pads_a_group_with_its_first_zeros() -> None:
    values, index = pack(torch.tensor([[0.0, 0, 0, 3, 0, 0, 0, 0]]), "2:4")
    assert values.tolist() == [[0, 3, 0, 0]]
    assert index.tolist() == [[0b01_00_11_00]]


@pytest.mark.parametrize(
    ("m", "width"),
    [(1, 1), (2, 1), (3, 2), (4, 2), (5, 4), (8, 4), (15, 4), (16, 4), (17, 8), (64, 8)],
)
def test_index_bits_follow_the_text(m: int, width: int) -> None:
    assert index_bits(m) == width


def test_packed_bytes_of_common_patterns() -> None:
    # 2:4 in 16 bits: half of the values and 2 bits for each, 9/16 of dense.
    assert packed_bytes(128, 256, Pattern(2, 4), 2) == 128 * 256 * 2 * 9 // 16
    # 1:16 in 32 bits: a sixteenth of the values and 4 bits for each.
    assert packed_bytes(128, 256, Pattern(1, 16), 4) == 128 * 16 * 4 + 128 * 8
    # Rows end on a byte: one 2-bit field per row still takes a byte.
    assert packed_bytes(3, 4, Pattern(1, 4), 4) == 3 * 4 + 3


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)], ids=str)
def test_pack_takes_empty_weights(shape: tuple[int, int]) -> None:
    values, index = pack(torch.zeros(shape), "2:4")
    check_packed(values, index, shape[1], "2:4")
    assert unpack(values, index, shape[1], "2:4").shape == shape


def test_pack_makes_new_plain_tensors() -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    values, index = pack(weight, "1:4")
    dense = unpack(values, index, 4, "1:4")
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


@given(matrices, st.data())
def test_check_packed_refuses_a_changed_index(case: Case, data: st.DataObject) -> None:
    # Any byte changed: either refused, or a different weight that is still in bounds and canonical.
    weight, pattern = pruned(case), case.pattern
    cols = weight.shape[1]
    values, index = pack(weight, pattern)
    row = data.draw(st.integers(0, index.shape[0] - 1), "row")
    byte = data.draw(st.integers(0, index.shape[1] - 1), "byte")
    index[row, byte] ^= data.draw(st.integers(1, 255), "flipped bits")
    dense, fields = None, None
    try:
        dense, fields = reference.read_packed(
            bits_rows(values), index.tolist(), cols, pattern.n, pattern.m
        )
    except IndexError:
        in_bounds = False
    else:
        in_bounds = all(f < pattern.m for r in fields for f in r)
    n = pattern.n
    valid = (
        in_bounds
        and all(
            list(group) == sorted(set(group))
            for r in fields
            for group in (r[i : i + n] for i in range(0, len(r), n))
        )
        and all(
            sum(b << 8 * p for p, b in enumerate(r)) >> values.shape[1] * index_bits(pattern.m) == 0
            for r in index.tolist()
        )
    )
    if valid:
        check_packed(values, index, cols, pattern)
        got = bits_rows(unpack(values, index, cols, pattern))
        assert got == dense, f"{index.tolist()}: {got}"
    else:
        with pytest.raises(NMError):
            check_packed(values, index, cols, pattern)


def good() -> tuple[torch.Tensor, torch.Tensor]:
    """A packed 2:4 weight of shape (2, 12): values (2, 6), index (2, 2) with 4 spare bits."""
    return pack(torch.eye(2, 12), "2:4")


TEXT = "packed values are float16, bfloat16, float32 or float64 and the index is uint8, got "
SHAPES = "a packed weight with 2 rows, 12 columns and 2:4 (keep 2 of every 4) has shapes (2, 6) "


@pytest.mark.parametrize(
    ("values", "index", "cols", "text"),
    [
        (
            lambda v: v,
            lambda i: i,
            10,
            "cols=10 is not a multiple of 4, as 2:4 (keep 2 of every 4) needs",
        ),
        (lambda v: v[0], lambda i: i, 12, "packed tensors are 2-D, got (6,), (2, 2)"),
        (lambda v: v, lambda i: i.flatten(), 12, "packed tensors are 2-D, got (2, 6), (4,)"),
        (lambda v: v.int(), lambda i: i, 12, TEXT + "torch.int32 and torch.uint8"),
        (lambda v: v, lambda i: i.to(torch.int8), 12, TEXT + "torch.float32 and torch.int8"),
        (lambda v: v, lambda i: i.bool(), 12, TEXT + "torch.float32 and torch.bool"),
        (
            lambda v: v.to(torch.float8_e4m3fn),
            lambda i: i,
            12,
            TEXT + "torch.float8_e4m3fn and torch.uint8",
        ),
        (lambda v: v[:, :-1], lambda i: i, 12, SHAPES + "and (2, 2), got (2, 5) and (2, 2)"),
        (lambda v: v, lambda i: i[:, :-1], 12, SHAPES + "and (2, 2), got (2, 6) and (2, 1)"),
        (lambda v: v, lambda i: i[:1], 12, SHAPES + "and (2, 2), got (2, 6) and (1, 2)"),
        (
            lambda v: v,
            lambda i: i,
            -12,
            "a packed weight with 2 rows, -12 columns and 2:4 (keep 2 of every 4) has shapes "
            "(2, -6) and (2, -1), got (2, 6) and (2, 2)",
        ),
        (
            lambda v: v,
            lambda i: i | 0x80,
            12,
            "the bits after the last field of a packed index row are not 0",
        ),
        (
            lambda v: v,
            torch.zeros_like,
            12,
            "the packed indices of a group do not increase",
        ),
        (
            lambda v: v,
            lambda i: torch.tensor([[0b01_10_01_10, 0b0110]] * 2, dtype=torch.uint8),
            12,
            "the packed indices of a group do not increase",
        ),
    ],
)
def test_check_packed_refuses(values, index, cols: int, text: str) -> None:
    good_values, good_index = good()
    check_packed(good_values, good_index, 12, "2:4")
    with pytest.raises(NMError) as caught:
        check_packed(values(good_values), index(good_index), cols, "2:4")
    assert str(caught.value) == text


def test_check_packed_refuses_an_index_outside_its_group() -> None:
    values, index = pack(torch.eye(3), "1:3")
    index[1, 0] = 3  # two bits hold 0..3, a group of three has 0..2
    with pytest.raises(NMError) as caught:
        check_packed(values, index, 3, "1:3")
    assert str(caught.value) == "a packed index is 3, outside its group of 3"


def test_check_packed_refuses_a_bad_pattern() -> None:
    with pytest.raises(NMError, match="is not of the form 'N:M'"):
        check_packed(*good(), 12, "2 : 4")


def test_unpack_fills_with_positive_zero() -> None:
    weight = torch.tensor([[-0.0, 1.0, -0.0, -0.0], [math.nan, -0.0, -0.0, -0.0]])
    values, index = pack(weight, "1:4")
    dense = unpack(values, index, 4, "1:4")
    assert reference.raw_bits(dense) == [0, 0x3F80_0000, 0, 0, 0x7FC0_0000, 0, 0, 0], dense
