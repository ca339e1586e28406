"""Whether a model turns rounding into another result, as routing, top-k and sorting can.

A lowered model multiplies the same weights in another order. Where a model compares numbers that
are nearly equal, the last bit decides which token goes to which expert, or which box suppresses
which; its outputs then differ by as much as two boxes do, and a difference says nothing about the
kernels. Such a model shows the same when its own weights move by as much as rounding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, output_error, run_calls

# A sum of a few hundred float32 products is off by some 8 units in the last place.
_UNITS = {torch.float64: 8, torch.float32: 8}
_TRIES = 3  # a decision may hold under one nudge and not under another


def turns_rounding_into(
    model: nn.Module, calls: list[Call], outputs: list[Any], gap: float
) -> bool:
    """Whether the model's outputs move about as far when its weights move by rounding.

    Args:
        model: its floating-point parameters and buffers are changed and restored, bit for bit.
        calls: to run.
        outputs: of these calls.
        gap: the relative error to be explained; inf for another shape, or NaN.

    Returns:
        True if some nudge makes an error of at least a tenth of the gap, and the same call twice
        makes none: a model that counts its calls, say, differs for another reason.
    """
    again = run_calls(model, calls)
    if any(output_error(one, other) for one, other in zip(outputs, again, strict=True)):
        return False
    for seed in range(_TRIES):
        with _nudged(model, seed):
            moved = run_calls(model, calls)
        own = max(output_error(one, other) for one, other in zip(outputs, moved, strict=True))
        if own >= 0.1 * gap:
            return True
    return False


@contextmanager
def _nudged(model: nn.Module, seed: int) -> Iterator[None]:
    """Multiplies every weight by 1 + a few units in the last place, at random."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    saved: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    try:
        for tensor in held.values():
            saved.append((tensor, tensor.detach().clone()))
            size = torch.finfo(tensor.dtype).eps * _UNITS.get(tensor.dtype, 1)
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            tensor.detach().mul_((1 + size * noise).to(tensor.dtype))
        yield
    finally:
        for tensor, value in saved:
            tensor.detach().copy_(value)
