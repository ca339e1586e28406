"""Whether a model turns rounding into another result, as routing, top-k and sorting can.

A lowered model multiplies the same weights in another order. Where a model compares numbers that
are nearly equal, the last bit decides which token goes to which expert, or which box suppresses
which; its outputs then differ by as much as two boxes do, and a difference says nothing about the
kernels. Products are then compared one by one; and the model's outputs are right once dense ones
take their place, or they move as far when its weights do by as much as rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, compare_outputs, output_error, run_calls
from .dense_products import DenseProducts
from .errors import NMError

# A sum of a few hundred float32 products is off by some 8 units in the last place.
_UNITS = {torch.float64: 8, torch.float32: 8}
_TRIES = 3  # a decision may hold under one nudge and not under another


def only_rounding_differs(
    model: nn.Module, calls: list[Call], expected: list[Any], outputs: list[Any]
) -> bool:
    """Whether nothing but rounding makes a lowered model's outputs differ.

    Every product is compared with the dense product of the same inputs. With these in their place
    the outputs are the expected ones, unless something else rounds otherwise too (a folded batch
    norm, one of torch's fused paths): then they must move about as far when weights do by rounding.

    Args:
        model: lowered; its floating-point parameters and buffers are changed and restored, bit for
            bit.
        calls: to run.
        expected: the folded model's outputs of these calls.
        outputs: the lowered model's.

    Returns:
        False also if the same calls give other outputs each time: a model that counts its calls,
        say, differs for another reason.

    Raises:
        NMError: a product that is wrong by more than rounding.
    """
    if _error(outputs, run_calls(model, calls)):
        return False
    names = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    with DenseProducts(names):
        exact = run_calls(model, calls)
    try:
        for number, pair in enumerate(zip(expected, exact, strict=True)):
            compare_outputs(*pair, number)
    except NMError:
        return _moves(model, calls, outputs, 0.1 * _error(expected, outputs))
    return True


def _moves(model: nn.Module, calls: list[Call], outputs: list[Any], enough: float) -> bool:
    """Whether some nudge of the weights changes the outputs by an error of `enough`."""
    for seed in range(_TRIES):
        with _nudged(model, seed):
            moved = run_calls(model, calls)
        if _error(outputs, moved) >= enough:
            return True
    return False


def _error(expected: list[Any], outputs: list[Any]) -> float:
    return max(map(output_error, expected, outputs), default=0.0)


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
