"""decide: the least total time, dense wins ties, packed must beat prepacked; with its sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmfx.tuning.decide import TIE, Choice, Timing, decide, packed_share

MS = st.floats(1e-3, 1e3)
TIMINGS = st.lists(
    st.builds(
        Timing,
        st.fixed_dictionaries({"dense": MS, "prepacked": MS, "packed": MS}),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=4,
)


def one(dense: float, prepacked: float, packed: float) -> Choice:
    ms = {"dense": dense, "prepacked": prepacked, "packed": packed}
    return decide([Timing(ms, 1)], every=False)


@pytest.mark.parametrize(
    ("ms", "name", "reason"),
    [
        ((2.0, 1.6, 1.0), "packed", "prepacked 1.25x, packed 2.00x as fast as dense"),
        (
            (2.0, 1.0, 1.6),
            "prepacked",
            "prepacked 2.00x, packed 1.25x as fast as dense: packed does not beat prepacked",
        ),
        ((2.0, 1.0, 4.0), "prepacked", "prepacked 2.00x, packed 0.50x as fast as dense"),
        ((2.0, 1.0, 0.99), "packed", "prepacked 2.00x, packed 2.02x as fast as dense"),
        ((1.0, 2.0, 4.0), "dense", "prepacked 0.50x, packed 0.25x as fast as dense"),
        (
            (1.0, 0.98, 0.98),
            "dense",
            "prepacked 1.02x, packed 1.02x as fast as dense: a tie, which dense wins",
        ),
    ],
)
def test_decide_one_shape(ms: tuple[float, float, float], name: str, reason: str) -> None:
    choice = one(*ms)
    assert (choice.name, choice.reason) == (name, reason)
    assert choice.ms_dense == ms[0]


def test_decide_adds_up_calls() -> None:
    prefill = Timing({"dense": 10.0, "packed": 11.0}, 1)
    decode = Timing({"dense": 1.0, "packed": 0.5}, 100)
    choice = decide([prefill, decode], every=False)
    assert (choice.name, choice.ms_dense, choice.ms) == ("packed", 110.0, 61.0)
    assert decide([prefill, Timing(decode.ms, 1)], every=False).name == "dense"


def test_decide_on_assumed_shapes_loses_nowhere() -> None:
    timings = [Timing({"dense": 10.0, "packed": 11.0}, 1), Timing({"dense": 9.0, "packed": 1.0}, 9)]
    choice = decide(timings, every=True)
    assert choice.name == "dense"
    assert choice.reason.endswith("as fast as dense in total, but slower at some number of rows")


def test_decide_with_dense_alone() -> None:
    choice = decide([Timing({"dense": 1.0}, 1)], every=False)
    assert (choice.name, choice.reason) == ("dense", "no other candidate")


@given(TIMINGS, st.booleans())
def test_decide_never_loses(timings: list[Timing], every: bool) -> None:
    choice = decide(timings, every=every)
    total = {name: sum(t.ms[name] * t.count for t in timings) for name in timings[0].ms}
    assert choice.ms == total[choice.name]
    assert choice.ms <= choice.ms_dense == total["dense"]
    if choice.name != "dense":
        assert choice.ms < total["dense"] * (1 - TIE), "a tie must go to dense"
    if choice.name == "packed":
        assert choice.ms < total["prepacked"], "compiled with freezing this would be slower"
    if every:
        for timing in timings:
            assert timing.ms[choice.name] <= timing.ms["dense"] * (1 + TIE)


def test_packed_share_weighs_layers_by_their_work() -> None:
    packed = Choice("packed", 1.0, 1.0, "", (1,), 300)
    dense = Choice("dense", 1.0, 1.0, "", (1,), 100)
    never_measured = Choice("dense", 0.0, 0.0, "")
    assert packed_share([packed, dense, never_measured]) == (
        "packed kernels carry 75% of the multiply-adds of the N:M layers that were measured, "
        "counted dense"
    )
    assert packed_share([never_measured]) is None


@pytest.mark.parametrize(
    ("packed", "semi", "name"),
    [
        ((0.4, 0.9), (1.3, 0.7), "packed"),  # semi-structured loses somewhere, so it is out
        ((1.3, 0.4), (0.9, 0.9), "semi_structured"),
        ((0.5, 0.5), (0.6, 0.3), "semi_structured"),
        ((0.5, 0.3), (0.6, 0.3), "packed"),
        ((1.3, 0.4), (0.4, 1.3), "dense"),
    ],
)
def test_decide_between_packed_and_semi_structured(
    packed: tuple[float, float], semi: tuple[float, float], name: str
) -> None:
    timings = [
        Timing({"dense": 1.0, "semi_structured": s, "packed": p}, 1)
        for p, s in zip(packed, semi, strict=True)
    ]
    assert decide(timings, every=True).name == name
