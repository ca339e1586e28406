"""Values of command-line options, checked as they are read: a wrong one is one line on stderr."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

import nmfx

from .meter import FLIPS_EVERY


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(text, 0)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(text, 1)


def steps(text: str) -> int:
    """A whole number of steps; fewer would measure no flips."""
    return _at_least(text, FLIPS_EVERY)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return number


def pattern(text: str) -> str:
    """An N:M pattern, as nmfx writes it."""
    try:
        return nmfx.Pattern.parse(text).text
    except nmfx.NMError as error:
        raise ArgumentTypeError(" ".join(str(error).split())) from None


def _at_least(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return number
