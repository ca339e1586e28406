"""A progress bar for work that takes long, where somebody can see it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

_DELAY_S = 2.0  # shorter work needs no bar


def progress(items: Sequence[T], what: str, unit: str = "layer") -> Iterable[T]:
    """The items; a bar on a terminal's stderr once they take more than two seconds."""
    return progress_of(items, what, unit)


def progress_of(items: Iterable[T], what: str, unit: str = "layer") -> Iterable[T]:
    """The same for items whose number is not known."""
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=f"nmfx: {what}", unit=unit, delay=_DELAY_S, leave=False)
