"""A timer that answers what a test wants, so that decisions do not depend on the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest


class FakeTimer:
    """Stands in for `nmfx.tuning.timer.measure` and keeps what it was asked.

    Args:
        ms: milliseconds by candidate, the same for every layer and shape; or a function of the
            input's rows that returns them.
        whole: milliseconds of the whole model, one after the other; the last one stays.
    """

    def __init__(
        self,
        ms: Mapping[str, float] | Callable[[int], Mapping[str, float]],
        whole: tuple[float, ...] = (1.0,),
    ) -> None:
        self.ms, self.whole = ms, list(whole)
        self.asked: list[tuple[set[str], int]] = []
        self.cold: list[bool] = []

    def __call__(
        self,
        candidates: Mapping[str, Any],
        evict: Any = None,
        budget_s: float = 0.0,
        device: Any = None,
    ) -> dict[str, float]:
        if set(candidates) == {"model"}:
            candidates["model"]()
            return {"model": self.whole.pop(0) if len(self.whole) > 1 else self.whole[0]}
        if "dense" not in candidates:  # the algorithms of a form
            return dict.fromkeys(candidates, 1.0)
        x = candidates["dense"].args[0]
        rows = x.numel() // x.shape[-1]
        self.asked.append((set(candidates), rows))
        self.cold.append(evict is not None)
        ms = self.ms(rows) if callable(self.ms) else self.ms
        return {name: ms[name] for name in candidates}


def install(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> FakeTimer:
    fake = FakeTimer(*args, **kwargs)
    monkeypatch.setattr("nmfx.tuning.timer.measure", fake)
    return fake


PACKED_WINS = {"dense": 3.0, "prepacked": 2.0, "packed": 1.0}
PREPACKED_WINS = {"dense": 3.0, "prepacked": 1.0, "packed": 2.0}
DENSE_WINS = {"dense": 1.0, "prepacked": 2.0, "packed": 3.0}
