"""What a training is to do with its sparse layers, and when."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ..capture.refs import iter_sites
from ..errors import NMError
from ..policy import Rules, check_lambda, parse_rules
from ..sparsify import DEFAULT_LAMBDA_W, sparsify


@dataclass(frozen=True)
class Plan:
    """Arguments of all trainers, checked before anything is trained.

    Attributes:
        rules: to sparsify the model with, unless a layer of it is sparse already. None: it is.
        lambda_w: of each step: a number, or a function of the step. None: as the model has it.
        pattern: function of the step, to what `nmfx.set_pattern` takes. None: as the model has it.
        freeze_at: the step before which all masks are fixed; `pattern` is not asked from then on.
        per_layer: whether measurements have the numbers of each layer, too.
        fixed: the models whose masks it fixed, see `Training`.

    Raises:
        NMError: an argument that is none of these.
    """

    rules: Rules | None = None
    lambda_w: float | Callable[[int], float] | None = None
    pattern: Callable[[int], Rules] | None = None
    freeze_at: int | None = None
    per_layer: bool = False
    fixed: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet, init=False)

    def __post_init__(self) -> None:
        if self.rules is not None:
            parse_rules(self.rules)
        if self.lambda_w is not None and not callable(self.lambda_w):
            check_lambda(self.lambda_w)
        if self.pattern is not None and not callable(self.pattern):
            raise NMError(
                f"pattern={self.pattern!r} is no function of the step, like lambda step: '2:4' if "
                f"step > 9 else '3:4'; a pattern for the whole training goes to nmfx.sparsify"
            )
        freeze_at = self.freeze_at
        if freeze_at is not None and (type(freeze_at) is not int or freeze_at < 0):
            raise NMError(f"freeze_at={freeze_at!r} is not a step from 0 on, or None")

    def lambda_at(self, step: int) -> float | None:
        """The lambda of a step, or None: as the model has it."""
        return self.lambda_w(step) if callable(self.lambda_w) else self.lambda_w

    def sparsify(self, model: nn.Module, step: int) -> None:
        """`nmfx.sparsify` with the lambda of a step, if there are rules and nothing is sparse yet.

        Raises:
            NMError: see there.
        """
        if self.rules is not None and not any(iter_sites(model)):
            lambda_w = self.lambda_at(step)
            sparsify(model, self.rules, lambda_w=DEFAULT_LAMBDA_W if lambda_w is None else lambda_w)
