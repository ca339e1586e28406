"""DistributedDataParallel puts "module." before every name: told where only one side has it."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import NMError

_PREFIX = "module."
_BY = "wrapped (DistributedDataParallel, DataParallel)"


def refuse_wrapped(model: Iterable[str], saved: Iterable[str], what: str) -> None:
    """Refuses a wrapped model for what was saved of a plain one, and the other way round.

    Args:
        model: names of the model's tensors.
        saved: names of what was saved.
        what: that is, for the message.

    Raises:
        NMError: all names of one of the two have the prefix, and without it are names of the other.
    """
    here, there = set(model), set(saved)
    for name in _inner(here, there):
        raise NMError(
            f"{what}: the model is {_BY}, what was saved was not: {name} is {_PREFIX}{name} in the "
            f"model; pass ddp.module"
        )
    for name in _inner(there, here):
        raise NMError(
            f"{what}: what was saved was {_BY}, the model is not: {name} is {_PREFIX}{name} there; "
            f"pass ddp.module when you save, and here a wrapped model, if only "
            f"nn.ModuleDict({{'module': model}})"
        )


def _inner(wrapped: set[str], plain: set[str]) -> list[str]:
    """The names that both have, once the prefix of one is gone."""
    if not all(name.startswith(_PREFIX) for name in wrapped):
        return []
    return sorted(plain & {name.removeprefix(_PREFIX) for name in wrapped})
