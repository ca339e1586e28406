"""The shapes that `lower(model)` assumes when it is given no example inputs."""

from __future__ import annotations

from .shapes import Seen

# One row at a time (decoding, a single request), eight (a small batch), 128 (a short prompt, a
# batch). A choice has to hold at each of them, so the counts only weigh what the report adds up:
# 128 rows, run in either way.
ROWS = {1: 128, 8: 16, 128: 1}

ASSUMED = "no example inputs: rows 1, 8 and 128 assumed"


def assumed(in_features: int, dtype: object, bias: bool) -> dict[Seen, int]:
    """Inputs of a linear layer, with their counts."""
    return {
        Seen((rows, in_features), (in_features, 1), str(dtype), bias=bias): count
        for rows, count in ROWS.items()
    }
