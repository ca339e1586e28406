"""A step of the sweep, and what may become of it: passed, explained, an NMError, a failure."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nmfx

# In the text of a failure: a wrong result that no user would have seen.
SILENT = "SILENT"
Note = Callable[[str, Any], Any]


class Wrong(Exception):
    """A check that does not hold."""


class Explained(Exception):
    """A check whose reference does not apply, and what nmfx says about it."""


@contextmanager
def step(note: Note, name: str) -> Iterator[None]:
    """Runs a block as one step: whatever it raises becomes the step's outcome."""
    note("begin", name)
    try:
        yield
    except nmfx.NMError as error:
        note(name, f"nmerror: {error}")
    except Wrong as error:
        note(name, f"fail: {error}")
    except Explained as error:
        note(name, f"explained: {error}")
    except Exception as error:  # noqa: BLE001 (any exception is the finding)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error}"[:500]
        note(name, f"fail: {text} ({Path(where.filename).name}:{where.lineno})")
    else:
        note(name, "pass")
