"""The cost of one layer on this machine: timed once, remembered in the process and on disk."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..calls import relative_error, tolerance
from ..capture.forms import forms_of
from ..errors import NMError
from . import cache, timer
from .decide import DENSE, SEMI, Choice, Timing, decide
from .hardware import cache_bytes, kernel_digest, kernel_status, processor
from .layers import Layer, Run, candidates, multiply_adds, names, product_rows
from .shapes import Seen, make_input
from .two_forms import decide_two

# Twice the cache: replacement policies are not exactly least-recently-used.
_EVICT = 2


_KERNELS_ONLY = (
    "layers on a GPU: the time of their kernels, as in a CUDA graph; what the host needs to launch "
    "them shows in the whole model's time only"
)


_BUSY = (
    "{} of these were timed while something else used the processor: their shortest runs count, "
    "and are not remembered; measure again when it is idle"
)


@dataclass
class Bench:
    """Times the layers of one model.

    Attributes:
        model: whose size tells whether a layer finds its weights in the cache.
        timed, remembered: how many (layer, shape) pairs were timed now, and how many were known.
        busy: how many of them were timed while something else had the machine.
        dropped: what was no candidate because its result differed from dense, in words.
    """

    model: nn.Module
    timed: int = 0
    remembered: int = 0
    busy: int = 0
    dropped: list[str] = field(default_factory=list)
    _known: dict[tuple[object, ...], dict[str, float]] = field(default_factory=dict)
    _current: Tensor | None = None
    _bytes: Counter[torch.device] = field(default_factory=Counter)
    _evicts: dict[torch.device, Callable[[], object]] = field(default_factory=dict)
    _devices: dict[torch.device, None] = field(default_factory=dict)  # asked for, in order

    def __post_init__(self) -> None:
        for tensor in itertools.chain(self.model.parameters(), self.model.buffers()):
            self._bytes[tensor.device] += tensor.nbytes

    def is_cold(self, device: torch.device) -> bool:
        """Whether the model's layers on a device meet their weights outside its cache."""
        return self._bytes[device] > cache_bytes(device)

    def _evict(self, device: torch.device) -> Callable[[], object] | None:
        if not self.is_cold(device):
            return None
        if device not in self._evicts:
            size = _EVICT * cache_bytes(device)
            self._evicts[device] = timer.make_evict(self.model, size, lambda: self._current, device)
        return self._evicts[device]

    def choose(
        self,
        name: str,
        layer: Layer,
        shapes: Mapping[Seen, int],
        every: bool,
        keep: Sequence[str] | None = None,
    ) -> Choice:
        """The best candidate of a layer for inputs `shapes` ({input: how many calls have it}).

        Args:
            name: of the layer, for messages.
            layer: its weight is not changed.
            shapes: at least one.
            every: see `decide`.
            keep: two forms that a linear layer may hold, or None.
        """
        self._devices[layer.weight.device] = None
        # Made for the first shape that is not known, and only then: packing takes a while.
        made = functools.cache(
            lambda bias, rest, outputs: candidates(layer.part(outputs), bias, rest)
        )
        with torch.no_grad():
            found = [(self._ms(name, layer, seen, made), count) for seen, count in shapes.items()]
        # A candidate that failed at one shape is out at all.
        algorithms = _algorithms([ms for ms, _ in found], [product_rows(layer, s) for s in shapes])
        found = [(_without_algorithms(ms), count) for ms, count in found]
        common = [key for key in found[0][0] if all(key in ms for ms, _ in found)]
        timings = [
            Timing({key: ms[key] for key in common}, count, seen.rows)
            for (ms, count), seen in zip(found, shapes, strict=True)
        ]
        rows = tuple(sorted({seen.rows for seen in shapes}))
        work = sum(multiply_adds(layer, seen) * count for seen, count in shapes.items())
        choice = decide(timings, every=every)
        if keep is not None:
            choice = decide_two(timings, choice, keep, every=every)
        if SEMI in forms_of(choice.name):
            choice = replace(choice, algorithms=algorithms)
        return replace(choice, rows=rows, multiply_adds=work)

    def notes(self) -> list[str]:
        """For the report: where the numbers come from."""
        devices = list(self._devices) or [torch.device("cpu")]
        return [
            *(note for device in devices for note in self._notes(device)),
            f"(layer, shape) pairs timed now: {self.timed}, known before: {self.remembered}",
            *([_BUSY.format(self.busy)] if self.busy else []),
            *self.dropped,
        ]

    def _notes(self, device: torch.device) -> list[str]:
        cold = self.is_cold(device)
        state = "cold: the model is larger than" if cold else "warm: the model fits into"
        threads = f"threads: {torch.get_num_threads()}; " if device.type == "cpu" else ""
        return [
            f"{processor(device)}; {threads}torch {torch.__version__}",
            kernel_status(device),
            f"weights {state} the cache of {cache_bytes(device) / 2**20:g} MiB",
            *([] if device.type == "cpu" else [_KERNELS_ONLY]),
        ]

    def _ms(
        self, name: str, layer: Layer, seen: Seen, made: functools._lru_cache_wrapper
    ) -> dict[str, float]:
        key = self._key(layer, seen)
        identity = tuple(map(str, key.values()))
        known = self._known.get(identity) or cache.load(key)
        if known is not None:
            self.remembered += 1
        else:
            busy = self.busy
            known = self._measure(name, made(seen.bias, seen.rest, seen.outputs), seen, layer)
            self.timed += 1
            # A wrong candidate is looked at again next time, and so is what a busy machine took.
            if busy == self.busy and _without_algorithms(known).keys() == set(names(layer)):
                cache.store(key, known)
        self._known[identity] = known
        return known

    def _measure(
        self, name: str, runs: dict[str, Run], seen: Seen, layer: Layer
    ) -> dict[str, float]:
        device = layer.weight.device
        x = make_input(seen, device)
        dtype = None if seen.autocast is None else getattr(torch, seen.autocast[6:])
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            right = self._right(name, runs, x)
            self._current = layer.weight
            try:
                ms = timer.measure(
                    {key: functools.partial(runs[key], x) for key in right},
                    self._evict(device),
                    device=device,
                )
                self.busy += getattr(ms, "busy", False)
                return {_with_algorithm(key, runs[key]): value for key, value in ms.items()}
            finally:
                self._current = None

    def _right(self, name: str, runs: dict[str, Run], x: Tensor) -> list[str]:
        """The candidates that compute what dense computes."""
        expected = runs[DENSE](x)
        right = []
        for key, run in runs.items():
            try:
                error = relative_error(expected, run(x))
            except (RuntimeError, NMError) as why:  # what a library does not take; out of memory
                self.dropped.append(f"{name}: {key} failed and was not used: {_line(why)}")
                continue
            if error <= tolerance(expected):
                right.append(key)
            else:
                text = f"{name}: {key} differs from dense by {error:.1e} and was not used"
                self.dropped.append(text)
        return right

    def _key(self, layer: Layer, seen: Seen) -> dict[str, object]:
        """Everything that a timing depends on, as values that JSON holds."""
        return {
            "processor": processor(layer.weight.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "float32": torch.get_float32_matmul_precision(),
            "kernels": [kernel_status(layer.weight.device), kernel_digest(layer.weight.device)],
            "cold": self.is_cold(layer.weight.device),
            "candidates": names(layer),
            "kind": layer.kind,
            "weight": [list(layer.part(seen.outputs).weight.shape), str(layer.weight.dtype)],
            "pattern": layer.pattern.text,
            "input": [list(seen.shape), list(seen.strides), seen.dtype, seen.autocast],
            "bias": seen.bias,
            "rest": repr(seen.rest),
        }


# Which algorithm a time is that of is part of its name, so that it is remembered with it.
_AT = "@"


def _with_algorithm(key: str, run: Run) -> str:
    algorithm = getattr(run, "algorithm", None)
    return key if algorithm is None else f"{key}{_AT}{algorithm}"


def _without_algorithms(ms: Mapping[str, float]) -> dict[str, float]:
    return {key.partition(_AT)[0]: value for key, value in ms.items()}


def _algorithms(found: Iterable[Mapping[str, float]], rows: Iterable[int]) -> tuple[int, ...]:
    """Rows, algorithm, rows, algorithm ...: see `semi_structured.algorithm_for`."""
    by_rows = {
        count: int(number)
        for ms, count in zip(found, rows, strict=True)
        for _, at, number in (key.partition(_AT) for key in ms)
        if at
    }
    return tuple(value for pair in sorted(by_rows.items()) for value in pair)


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
