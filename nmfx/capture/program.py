"""What `torch.compile(backend=nmfx.backend)` runs: compiled code that holds packed weights.

The code was made for the weights of that moment, and the model still owns them. Before each call
every packed weight is compared with what it was made from: the same tensor, the same memory, the
same version (torch counts what is written in place). One that changed is packed again, or, if it
is no longer N:M, the graph runs dense as it was captured.

`remarks` tells `nmfx.report` what became of a weight; what was compiled and is gone is not told.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import NMError
from ..pattern import Pattern
from .packed import pack_weight


class PackedWeight:
    """A weight and what was packed of it.

    Args:
        weight: dense, with a version counter.
        place: its number among the arguments of the graph; None if the graph holds it itself.
        dim, groups, pattern: see `pack_weight`.
    """

    def __init__(
        self, weight: Tensor, place: int | None, dim: int, groups: int, pattern: Pattern
    ) -> None:
        self._constants = dim, groups, pattern
        self._place, self._fixed = place, weight if place is None else None
        self.values, self.index = pack_weight(weight, dim, groups, pattern)
        self.good, self.times = True, 0
        self._remember(weight)

    def _remember(self, weight: Tensor) -> None:
        self._of, self._version = weakref.ref(weight), weight._version
        # Keeps the memory from being given to another weight, which would look the same.
        self._memory = weight.detach()
        self._address = weight.data_ptr()

    def _weight(self, args: Sequence[Any]) -> Tensor:
        return self._fixed if self._place is None else args[self._place]  # type: ignore[return-value]

    def current(self, args: Sequence[Any]) -> bool:
        """Whether it was made from what the graph is called with now."""
        weight = self._weight(args)
        return (
            weight is self._of()
            and weight._version == self._version
            and weight.data_ptr() == self._address
        )

    @torch.no_grad()
    def pack_again(self, args: Sequence[Any]) -> None:
        """Packs what the graph is called with now; `good` says whether it is still N:M.

        Other threads take it for current from the moment it remembers the weight, so that is last.
        """
        weight = self._weight(args)
        try:
            values, index = pack_weight(weight, *self._constants)
        except NMError:
            self.good = False
        else:
            self.values.copy_(values)  # in place: compiled code may have taken the address
            self.index.copy_(index)
            self.good, self.times = True, self.times + 1
        self._remember(weight)

    def remark(self) -> str:
        """What became of it since, for the report; "" if nothing."""
        if not self.good:
            pattern = self._constants[2]
            return f"; its weight was changed and is no longer {pattern.text}: its graph runs dense"
        return f"; packed again, as its weight was changed (times: {self.times})" * bool(self.times)


class Program:
    """A compiled graph.

    Args:
        run: what the inner backend made of the rewritten graph.
        kept: the arguments that it still takes, by number; None for all.
        packed: the weights that it holds.
        dense: the graph as it was captured.
        constant: whether the inner backend may have made the packed tensors part of its code, so
            that they cannot be replaced.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        kept: Sequence[int] | None = None,
        packed: Sequence[PackedWeight] = (),
        dense: Callable[..., Any] | None = None,
        constant: bool = False,
    ) -> None:
        self._run, self._kept, self._packed = run, kept, tuple(packed)
        self._dense, self._constant = dense, constant
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        if not all(weight.current(args) for weight in self._packed):
            self._refresh(args)
        if not all(weight.good for weight in self._packed):
            assert self._dense is not None
            return self._dense(*args)
        return self._run(*(args if self._kept is None else [args[i] for i in self._kept]))

    def _refresh(self, args: Sequence[Any]) -> None:
        with self._lock:
            for weight in self._packed:
                if self._constant:
                    weight.good = False
                elif not weight.current(args):
                    weight.pack_again(args)


_Remark = tuple["weakref.ref[Program]", "weakref.ref[PackedWeight] | None", str]

# weight -> what was compiled of it: (the program, as long as it lives; its packed form; words)
_REMARKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember(weight: Tensor, program: Program, packed: PackedWeight | None, text: str) -> None:
    """Notes for reports what a program does with a weight."""
    form = None if packed is None else weakref.ref(packed)
    _REMARKS[weight] = [*_alive(weight), (weakref.ref(program), form, text)]


def _alive(weight: Tensor) -> list[_Remark]:
    return [entry for entry in _REMARKS.get(weight, ()) if entry[0]() is not None]


def remarks(weight: Tensor) -> str:
    """What the programs that are alive do with a weight, in words; "" if there are none."""
    texts = []
    for _, form, text in _alive(weight):
        packed = None if form is None else form()
        texts.append(text + ("" if packed is None else packed.remark()))
    return "compiled: " + " | ".join(dict.fromkeys(texts)) if texts else ""
