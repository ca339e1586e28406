"""A library's function, run with some of the helpers that it calls replaced by ours."""

from __future__ import annotations

import types
from typing import Any


def with_helpers(function: Any, **helpers: Any) -> Any:
    """A copy of a Python function that finds `helpers` where it looks up these global names.

    Its other globals are those of now: what is replaced in their module later is not seen.
    """
    names = {**function.__globals__, **helpers}
    del names["__name__"]  # else Dynamo looks names up in the module that is called so
    code, defaults, cells = function.__code__, function.__defaults__, function.__closure__
    copy = types.FunctionType(code, names, function.__name__, defaults, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
