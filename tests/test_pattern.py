"""The N:M grammar: strict, immutable, and honest in what it prints."""

from __future__ import annotations

import ast
import dataclasses
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmfx.pattern
from nmfx.errors import NMError
from nmfx.pattern import MAX_M, Pattern

ALL = [(n, m) for m in range(1, MAX_M + 1) for n in range(1, m + 1)]

# Every one of these was accepted, or read as something else, by int() and split(":").
BAD_TEXTS = [
    "", ":", "2", "2:", ":4", "2:4:8", "2::4", "2/4", "2-4", "2 of 4", "2,4", "(2, 4)",
    " 2:4", "2:4 ", "2 :4", "2: 4", " 2 : 4 ", "\t2:4", "2:4\n", "\n2:4", "2:4\r\n", "2\n:4",
    "2:4\x00", "2\u00a0:4", "\ufeff2:4", "2\u200b:4",
    "+2:4", "2:+4", "-1:4", "-2:-4", "2:-4",
    "02:4", "2:04", "002:004", "0:4", "0:0", "2:0", "00:4",
    "2_0:4_0", "2:4_0", "2.0:4", "2:4.0", "2e0:4", "0x2:0x4", "0b10:0b100", "0o2:0o4",
    "\uff12:\uff14", "2:\uff14", "\u0662:\u0664", "\u00b2:\u2074", "2\uff1a4", "2\u22364",
    "100:200", "1:100", "2:1000000000000000000000",
    "N:M", "two:four", "2:4x", "x2:4", "True:4", "None", "m4n2", "2:4 (keep 2 of every 4)",
]  # fmt: skip


class Named(NamedTuple):
    n: int
    m: int


class Subclassed(int):
    pass


def test_parse_reads_every_pattern() -> None:
    for n, m in ALL:
        pattern = Pattern.parse(f"{n}:{m}")
        assert (pattern.n, pattern.m) == (n, m), pattern
        assert pattern.text == f"{n}:{m}", pattern
        assert pattern == Pattern(n, m) == Pattern.parse((n, m)), pattern


def test_parse_returns_a_pattern_itself() -> None:
    pattern = Pattern(2, 4)
    assert Pattern.parse(pattern) is pattern


@pytest.mark.parametrize("text", BAD_TEXTS, ids=ascii)
def test_parse_refuses_text(text: str) -> None:
    with pytest.raises(NMError) as caught:
        Pattern.parse(text)
    assert str(caught.value) == (
        f"pattern {text!r} is not of the form 'N:M' with 1 <= N <= M <= 64 "
        f"(ASCII digits, no blanks or signs); write for example '2:4'"
    )


@given(st.text(st.sampled_from("0123456789:+-_ .\n\uff12\u0664"), max_size=6))
def test_parse_accepts_only_what_it_prints(text: str) -> None:
    try:
        pattern = Pattern.parse(text)
    except NMError:
        assert text not in {f"{n}:{m}" for n, m in ALL}, f"{text!r} is a pattern"
    else:
        assert pattern.text == text, f"{text!r} was read as {pattern!r}"


@pytest.mark.parametrize(
    ("n", "m"), [(4, 2), (0, 4), (-1, 4), (0, 0), (-4, -2), (5, 4), (1, 65), (65, 65), (2, -4)]
)
def test_pattern_refuses_numbers_out_of_range(n: int, m: int) -> None:
    text = (
        f"pattern {n}:{m} breaks 1 <= N <= M <= 64; N:M means keep N of every M, for example '2:4'"
    )
    for make in (lambda: Pattern(n, m), lambda: Pattern.parse((n, m))):
        with pytest.raises(NMError) as caught:
            make()
        assert str(caught.value) == text


@pytest.mark.parametrize("text", ["4:2", "1:65", "99:99"])
def test_parse_refuses_text_out_of_range(text: str) -> None:
    with pytest.raises(NMError) as caught:
        Pattern.parse(text)
    assert str(caught.value) == (
        f"pattern {text} breaks 1 <= N <= M <= 64; N:M means keep N of every M, for example '2:4'"
    )


@pytest.mark.parametrize(
    ("n", "m", "kind"),
    [
        (True, 4, "bool"),
        (1, True, "bool"),
        (2.0, 4, "float"),
        (2, 4.0, "float"),
        (float("nan"), 4, "float"),
        ("2", 4, "str"),
        (2, "4", "str"),
        (None, 4, "NoneType"),
        (2, None, "NoneType"),
        ((2,), 4, "tuple"),
        (np.int64(2), 4, "int64"),
        (2, np.int32(4), "int32"),
        (Subclassed(2), 4, "Subclassed"),
    ],
    ids=repr,
)
def test_pattern_refuses_what_is_not_int(n: object, m: object, kind: str) -> None:
    text = f"pattern ({n!r}, {m!r}): N and M must be int, got {kind}; write for example (2, 4)"
    for make in (lambda: Pattern(n, m), lambda: Pattern.parse((n, m))):
        with pytest.raises(NMError) as caught:
            make()
        assert str(caught.value) == text


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ([2, 4], "list"),
        ((2, 4, 8), "tuple"),
        ((2,), "tuple"),
        ((), "tuple"),
        (Named(2, 4), "Named"),
        ({2: 4}, "dict"),
        ({2, 4}, "set"),
        (b"2:4", "bytes"),
        (2, "int"),
        (0.5, "float"),
        (True, "bool"),
        (None, "NoneType"),
        (range(2, 6, 2), "range"),
        (Pattern, "type"),
    ],
    ids=repr,
)
def test_parse_refuses_other_types(spec: object, kind: str) -> None:
    with pytest.raises(NMError) as caught:
        Pattern.parse(spec)
    assert str(caught.value) == (
        f"pattern {spec!r} is a {kind}; give a string like '2:4' or a tuple like (2, 4)"
    )


def test_pattern_says_kept_everywhere() -> None:
    assert str(Pattern(2, 4)) == "2:4 (keep 2 of every 4)"
    assert repr(Pattern(1, 16)) == "Pattern(1, 16)  # keep 1 of every 16"
    assert f"{Pattern(4, 8)}" == "4:8 (keep 4 of every 8)"
    assert eval(repr(Pattern(2, 4))) == Pattern(2, 4)


@pytest.mark.parametrize(("n", "m", "share"), [(2, 4, 0.5), (1, 16, 0.0625), (7, 7, 1.0)])
def test_pattern_density_is_the_share_kept(n: int, m: int, share: float) -> None:
    assert Pattern(n, m).density == share


def test_pattern_is_an_immutable_value() -> None:
    pattern = Pattern(2, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.n = 3
    assert (pattern.n, pattern.m) == (2, 4)
    assert len({Pattern(2, 4), Pattern(2, 4), Pattern(4, 8)}) == 2
    assert Pattern(2, 4) != Pattern(4, 8), "the same density is not the same pattern"
    assert pickle.loads(pickle.dumps(pattern)) == pattern


def test_error_is_a_value_error() -> None:
    assert issubclass(NMError, ValueError)


@pytest.mark.parametrize("name", ["pattern", "errors"])
def test_pattern_file_imports_no_torch(name: str) -> None:
    source = Path(nmfx.pattern.__file__).with_name(f"{name}.py").read_text()
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add("." * node.level + (node.module or "").split(".")[0])
    assert "torch" not in roots, f"{name}.py imports {sorted(roots)}"
    assert {root for root in roots if root.startswith(".")} <= {".errors"}, sorted(roots)
