"""Models that run on several processes at once."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import Call, run_calls

TALKS = (
    "the whole model was not timed: it exchanges tensors with other processes when it runs, and "
    "these would have to run it as often"
)


def are_several() -> bool:
    """Whether this process is one of several of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def talks(model: nn.Module, calls: list[Call]) -> bool:
    """Whether a model exchanges tensors with other processes when it runs.

    Such a model must be run as often by all of them: none may decide by its own clock. Where there
    are several, the calls are run once to see it. What a forward does in other threads, or inside
    the branches of higher-order operators, is not seen.
    """
    if not are_several():
        return False
    with _Listening() as listening:
        run_calls(model, calls)
    return listening.heard


class _Listening(TorchDispatchMode):
    """Hears collectives, and DTensors, whose operators may contain some."""

    heard = False
    supports_higher_order_operators = True  # torch.cond, flex_attention; not inside them

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Told by torch: what is compiled runs as it does without this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = {t.__name__ for t in types}
        self.heard |= "c10d" in getattr(func, "namespace", "") or "DTensor" in names
        return func(*args, **(kwargs or {}))
