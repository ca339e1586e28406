"""Two forms or one: from milliseconds by number of rows to a choice, a threshold, a sentence."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmfx
from nmfx.tuning.decide import TIE, Choice, Timing, decide, packed_share
from nmfx.tuning.two_forms import check_keep, decide_two

KEEP = ("packed", "dense")


def two(
    ms: Mapping[int, Mapping[str, float]], keep: Any = KEEP, *, every: bool = False, count: int = 1
) -> Choice:
    timings = [Timing(one, count, rows) for rows, one in ms.items()]
    return decide_two(timings, decide(timings, every=every), keep, every=every)


def times(packed: float, dense: float, **others: float) -> dict[str, float]:
    return {"dense": dense, **others, "packed": packed}


def test_each_form_wins_somewhere() -> None:
    choice = two({1: times(1, 3), 8: times(1, 3), 4096: times(6, 2)})
    assert (choice.name, choice.threshold, choice.ms, choice.ms_dense) == (
        "packed+dense",
        181,
        4.0,
        8.0,
    )
    assert choice.reason == (
        "1 to 8 rows: packed 3.00x as fast as dense; 4096 rows: packed 0.33x as fast as dense: "
        "packed up to 181 rows, dense above (181 is the geometric middle of 8 and 4096), together "
        "2.00x as fast as dense alone"
    )


@pytest.mark.parametrize(
    ("ms", "name", "why"),
    [
        (
            {1: times(1, 3), 64: times(1, 3)},
            "packed",
            "packed up to 8 rows, dense above would be 0.50x as fast as packed alone",
        ),
        ({1: times(3, 1), 64: times(3, 1)}, "dense", "would be 0.50x as fast as dense alone"),
        ({1: times(0.99, 1), 64: times(3, 2)}, "dense", "would be 1.00x as fast as dense alone"),
        ({1: times(2, 1), 64: times(1, 2)}, "dense", "would be 0.75x as fast as dense alone"),
        ({7: times(1, 3)}, "packed", "all inputs had 7 rows"),
        ({0: times(1, 3), 8: times(3, 1)}, "dense", "every two would be slower than dense at so"),
        ({1: {"dense": 1.0}, 64: {"dense": 1.0}}, "dense", "packed is no candidate here"),
    ],
    ids=["packed", "dense", "tie", "the wrong way round", "one number", "no rows", "no candidate"],
)
def test_one_copy_with_the_reason(ms: dict[int, dict[str, float]], name: str, why: str) -> None:
    choice = two(ms)
    assert (choice.name, choice.threshold, choice.dense_share) == (name, 0, 0.0)
    assert "; one copy: " in choice.reason
    assert why in choice.reason.partition("; one copy: ")[2]


def test_prepacked_alone_may_beat_both() -> None:
    ms = {1: times(1, 3, prepacked=1), 64: times(3, 1, prepacked=1)}
    assert two(ms).name == "prepacked"
    assert two(ms).reason.endswith("would be 1.00x as fast as prepacked alone")


def test_the_calls_of_a_number_of_rows_are_added_up() -> None:
    # Two inputs of 8 rows, say of different strides: 3 * 1 + 1 * 5 packed, 3 * 2 + 1 * 3 dense.
    timings = [
        Timing(times(1, 2), 3, 8),
        Timing(times(5, 3), 1, 8),
        Timing(times(9, 4), 2, 50),
    ]
    choice = decide_two(timings, decide(timings, every=False), KEEP, every=False)
    assert (choice.name, choice.threshold, choice.ms) == ("packed+dense", 20, 8 + 2 * 4)
    assert choice.reason.startswith("8 rows: packed 1.12x as fast as dense; 50 rows: packed 0.44x")


@pytest.mark.parametrize(
    ("semi", "dense", "name"),
    [((1, 3), (3, 1), "semi_structured+dense"), ((3, 1), (1, 3), "dense+semi_structured")],
)
def test_semi_structured_and_dense_go_either_way(
    semi: tuple[float, float], dense: tuple[float, float], name: str
) -> None:
    ms = {
        rows: {"dense": d, "semi_structured": s, "packed": 9.0}
        for rows, s, d in zip((1, 100), semi, dense, strict=True)
    }
    choice = two(ms, ("dense", "semi_structured"))
    assert (choice.name, choice.threshold) == (name, 10)
    assert "semi-structured" in choice.reason


def test_assumed_rows_lose_nowhere() -> None:
    """Packed for the first two numbers of rows would be best, but loses at the second."""
    ms = {1: times(1, 9), 8: times(1.2, 1), 128: times(9, 1)}
    assert two(ms, every=False).threshold == 2
    assert two(ms, every=True).threshold == 2
    ms[8] = times(0.9, 1)
    assert two(ms, every=True).threshold == 32
    ms[1] = times(1.2, 1)
    assert "slower than dense at some number of rows" in two(ms, every=True).reason


def test_assumed_rows_are_compared_with_what_is_allowed_alone() -> None:
    """Packed alone is fastest in total, but not allowed: it loses at 128 rows."""
    ms = {1: times(100, 300), 128: times(1.5, 1)}
    assert two(ms, every=False).name == "packed"
    choice = two(ms, every=True)
    assert choice.name == "packed+dense"
    assert choice.reason.endswith("together 2.98x as fast as dense alone")


def test_packed_kernels_get_their_part_of_the_work() -> None:
    choice = two({1: times(1, 3), 3: times(6, 2)})
    whole = Choice(choice.name, 1.0, 1.0, "", (1, 3), 400, choice.threshold, choice.dense_share)
    assert choice.dense_share == 0.75
    assert str(packed_share([whole])).startswith("packed kernels carry 25% of")


ROWS = st.lists(st.integers(1, 5000), min_size=2, max_size=5, unique=True)
MS = st.floats(1e-3, 1e3)


@given(ROWS, st.data(), st.booleans())
def test_two_forms_are_faster_than_any_one(rows: list[int], data: Any, every: bool) -> None:
    one = st.fixed_dictionaries({"dense": MS, "prepacked": MS, "packed": MS})
    ms = {r: data.draw(one) for r in rows}
    choice = two(ms, every=every)
    single = decide([Timing(one, 1, r) for r, one in ms.items()], every=every)
    if choice.name == single.name:
        assert (choice.ms, choice.threshold) == (single.ms, 0)
        return
    assert choice.name == "packed+dense"
    assert choice.ms < single.ms * (1 - TIE)
    forms = {r: "packed" if r <= choice.threshold else "dense" for r in rows}
    assert set(forms.values()) == {"packed", "dense"}, "both are used"
    assert choice.ms == pytest.approx(sum(ms[r][form] for r, form in forms.items()))
    few = max(r for r in rows if forms[r] == "packed")
    many = min(r for r in rows if forms[r] == "dense")
    assert choice.threshold**2 <= few * many < (choice.threshold + 1) ** 2
    if every:
        assert all(ms[r][form] <= ms[r]["dense"] * (1 + TIE) for r, form in forms.items())
    for cut in itertools.pairwise(sorted(rows)):  # no other cut is faster
        other = sum(one["packed" if r <= cut[0] else "dense"] for r, one in ms.items())
        assert every or choice.ms <= other * (1 + 1e-9)


@pytest.mark.parametrize(
    "keep",
    [
        *("packed", "packed+dense", (), ("packed",), {"packed", "dense"}, 2, True),
        *(("packed", "packed"), ("packed", "prepacked"), ("packed", 3)),
        ("packed", "dense", "semi_structured"),
    ],
    ids=lambda keep: repr(keep) if not isinstance(keep, set) else "set",
)
def test_anything_else_is_no_keep(keep: Any) -> None:
    with pytest.raises(nmfx.NMError, match=r"keep=.* does not name two forms .*, like keep="):
        check_keep(keep, tune=True)


def test_keep_needs_timings() -> None:
    check_keep(None, tune=False)
    check_keep(["dense", "packed"], tune=True)
    with pytest.raises(nmfx.NMError, match=r"with tune=False: .* is measured; leave tune=True"):
        check_keep(KEEP, tune=False)
