"""nmfx.Monitor: what masks do while a model trains, at a cost that is kept under a limit.

    monitor = nmfx.Monitor(model)
    for x in data:
        ...
        optimizer.step()
        for name, value in monitor.step().items():
            writer.add_scalar(name, value, step)

Of each mask two snapshots are kept, one bit per weight: the first and the latest.
"""

from __future__ import annotations

import csv
import os
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from .capture.refs import SiteRef, iter_sites, sites_of
from .capture.sharding import reshard
from .errors import NMError
from .mask_bits import count_ones, mask_bits
from .ops.sharded import groups_are_whole
from .schedule import masked_and_mask, weight_part

_VERSION = 1
_PIECE = 2**16
_LATEST = 0.5  # of what a measurement costs, the share of the newest one in the running mean


class Monitor:
    """Watches the masks of a sparsified model.

    Args:
        model: sparsified. Layers that are sparsified, frozen or lowered later are followed from
            then on, or no longer. Of sharded weights (DTensor), this process's part is counted, and
            where that cuts groups, all of them: `every` must be given then, on all ranks alike.
        every: steps between two measurements. None: as few as keep the time for measuring under
            `budget` of the whole.
        budget: share of the time between calls of `step` that measuring may take.
        history: how many measurements are kept; the oldest go first.

    Attributes:
        history: the latest measurements, oldest first: the dictionaries that `step` returned.

    Raises:
        NMError: no sparsified layer, a number out of range, or groups that lie on several ranks and
            no `every`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int | None = None,
        budget: float = 0.02,
        history: int = 1000,
    ) -> None:
        sites_of(model, "Monitor")
        if every is not None and (type(every) is not int or every < 1):
            raise NMError(f"every={every!r} is not a number of steps from 1 on, or None")
        if not isinstance(budget, (int, float)) or not 0 < budget <= 1:
            raise NMError(f"budget={budget!r} is not a share in (0, 1]")
        if type(history) is not int or history < 1:
            raise NMError(f"history={history!r} is not a number of measurements from 1 on")
        self._model, self._every, self._budget = model, every, float(budget)
        self.history: deque[dict[str, float]] = deque(maxlen=history)
        self._step = self._measured_at = 0
        self._start: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._cost_s: float | None = None
        self._begin = self._since = time.perf_counter()
        self._spent_s = 0.0
        self._first()

    def step(self) -> dict[str, float]:
        """Call it once after each optimizer step.

        Returns:
            The measurement, if this step is one that is measured, else an empty dictionary. Of
            all layers together, and with "/<parameter>" after it of each:

            nmfx/flips_per_step   mask entries that differ from the last measurement, per weight
                                  and step between them
            nmfx/sad_since_start  the same against the first masks, per weight
            nmfx/density          share of weights kept
            nmfx/kept_energy      share of the squared norm of the weights that the masks keep
            nmfx/lambda_w         strength of the decay in force; 0 for fixed masks

            and "nmfx/step", the number of the step.
        """
        self._step += 1
        return self.measure() if self._due() else {}

    def measure(self) -> dict[str, float]:
        """Measures now; see `step`. Empty if no sparsified layer is left."""
        begin = time.perf_counter()
        values = self._measure()
        if values:
            self.history.append(values)
        now = time.perf_counter()
        cost = now - begin
        self._spent_s += cost
        old = cost if self._cost_s is None else self._cost_s
        self._cost_s = _LATEST * cost + (1 - _LATEST) * old
        self._since, self._measured_at = now, self._step
        return values

    def _due(self) -> bool:
        if self._every is not None:
            return self._step - self._measured_at >= self._every
        assert self._cost_s is not None
        now = time.perf_counter()
        # Both: a long pause is no reason to measure at every step after it.
        return (
            now - self._since >= self._cost_s / self._budget
            and self._spent_s + self._cost_s <= self._budget * (now - self._begin)
        )

    def _refs(self) -> list[SiteRef]:
        reshard(self._model)
        return [ref for ref in iter_sites(self._model) if not ref.site.lowered]

    def _first(self) -> None:
        begin = time.perf_counter()
        refs = self._refs()
        if self._every is None:
            _check_alone(refs)
        for ref in refs:
            self._bits(ref, masked_and_mask(ref)[1])
        self._begin, self._since = begin, time.perf_counter()
        self._cost_s = self._spent_s = self._since - begin

    def _bits(self, ref: SiteRef, mask: Tensor) -> Tensor:
        """The mask in bits. A layer that is new, or was given another shape, starts here."""
        bits, name = mask_bits(mask), ref.name
        if name not in self._start or self._start[name].shape != bits.shape:
            self._start[name] = self._latest[name] = bits
        for table in (self._start, self._latest):
            table[name] = table[name].to(bits.device)  # where the model went
        return bits

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        steps = max(1, self._step - self._measured_at)
        counts: dict[str, list[Any]] = {}
        for ref in self._refs():
            masked, mask = masked_and_mask(ref)
            bits = self._bits(ref, mask)
            counts[ref.name] = [
                count_ones(bits ^ self._latest[ref.name]),
                count_ones(bits ^ self._start[ref.name]),
                count_ones(bits),
                _energy(masked),
                _energy(weight_part(ref)),
                mask.numel(),
                0.0 if ref.site.state == "frozen" else ref.site.lambda_w,
            ]
            self._latest[ref.name] = bits
        for gone in self._start.keys() - counts.keys():
            del self._start[gone], self._latest[gone]
        return _values(self._step, steps, counts) if counts else {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: plain values and tensors, safe for `torch.load`."""
        return {
            "version": _VERSION,
            "step": self._step,
            "measured_at": self._measured_at,
            "start": dict(self._start),
            "latest": dict(self._latest),
            "history": [dict(values) for values in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another monitor of this model was when it was asked for its state.

        Raises:
            NMError: a state that is none, or of other layers. Nothing is changed then.
        """
        try:
            if state["version"] != _VERSION:
                raise NMError(f"the state has version {state['version']!r}, not {_VERSION}")
            numbers = int(state["step"]), int(state["measured_at"])
            tables = [
                {name: _checked(bits) for name, bits in state[key].items()}
                for key in ("start", "latest")
            ]
            history = [
                {str(name): float(value) for name, value in values.items()}
                for values in state["history"]
            ]
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, NMError):
                raise
            raise NMError(f"the state is not that of a Monitor: {error!r}") from error
        shapes = [{name: tuple(bits.shape) for name, bits in table.items()} for table in tables]
        own = {name: tuple(bits.shape) for name, bits in self._start.items()}
        if shapes != [own, own]:
            raise NMError("the state is that of a monitor of other layers")
        devices = {name: bits.device for name, bits in self._start.items()}
        self._start, self._latest = (
            {name: bits.to(devices[name], copy=True) for name, bits in table.items()}
            for table in tables
        )
        self._step, self._measured_at = numbers
        self.history.clear()
        self.history.extend(history)
        self._since = time.perf_counter()

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the history as a table: one line per measurement."""
        names = list(dict.fromkeys(name for values in self.history for name in values))
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.history)


def _check_alone(refs: list[SiteRef]) -> None:
    """Refuses layers that ranks must measure together, if each chooses when by its own clock."""
    for ref in refs:
        weight, site = ref.parameter, ref.site
        if not groups_are_whole(weight, site.pattern.m, site.dim):
            raise NMError(
                f"{ref.name}: its groups of {site.pattern.m} lie on several ranks, which must "
                f"measure it at the same steps; say at which: nmfx.Monitor(model, every=100)"
            )


def _checked(bits: Any) -> Tensor:
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.ndim != 1:
        raise TypeError("masks are kept as uint8")
    return bits


def _energy(tensor: Tensor) -> Tensor:
    """The squared norm in float64, of float32 norms of pieces: five times as fast."""
    norm, wide = torch.linalg.vector_norm, torch.promote_types(tensor.dtype, torch.float32)
    flat = tensor.flatten()
    whole = flat.numel() // _PIECE * _PIECE
    pieces = norm(flat[:whole].view(-1, _PIECE), dim=1, dtype=wide).double().square().sum()
    return pieces + norm(flat[whole:], dtype=wide).double().square()


def _values(step: int, steps: int, counts: dict[str, list[Any]]) -> dict[str, float]:
    """The dictionary of a measurement; numbers leave their device here, all at once."""
    numbers = {name: [float(value) for value in values] for name, values in counts.items()}
    total = [sum(column) for column in zip(*numbers.values(), strict=True)]
    weights = [values[5] for values in numbers.values()]
    if total:
        total[6] = sum(
            values[6] * share for values, share in zip(numbers.values(), weights, strict=True)
        ) / max(1.0, sum(weights))
    found: dict[str, float] = {"nmfx/step": float(step)}
    for suffix, values in (("", total), *((f"/{name}", v) for name, v in numbers.items())):
        if values:
            flips, sad, kept, kept_energy, energy, size, lambda_w = values
            size = max(size, 1.0)
            found |= {
                f"nmfx/flips_per_step{suffix}": flips / size / steps,
                f"nmfx/sad_since_start{suffix}": sad / size,
                f"nmfx/density{suffix}": kept / size,
                f"nmfx/kept_energy{suffix}": kept_energy / energy if energy else 1.0,
                f"nmfx/lambda_w{suffix}": lambda_w,
            }
    return found
