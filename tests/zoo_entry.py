"""What the zoo records about one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# Positional arguments, or keyword arguments (Hugging Face).
Inputs = tuple[Any, ...] | dict[str, Any]

# Pieces of the reasons in `nmfx.report`, for what most entries skip.
HEAD = "output layer"
STEM = "in_channels/groups=3 is not a multiple of 4"  # three colour channels
DEPTHWISE = "depthwise"
TIED = "tied to"


@dataclass(frozen=True)
class Entry:
    """A tiny random model and what nmfx owes it under the default policy at 2:4.

    Attributes:
        build: makes the model and inputs for one forward call; draws from the global generator.
        skipped: every parameter of a linear or conv module that stays dense -> a piece of the
            reason that the report must give. Nothing else may be skipped.
        findings: what `nmfx.verify` must report; empty when every read goes through the mask.
        functional: parameter -> reduced dimension, for those that only a graph shows are weights.
    """

    build: Callable[[], tuple[nn.Module, Inputs]]
    skipped: Mapping[str, str] = field(default_factory=dict)
    findings: Mapping[str, set[str]] = field(default_factory=dict)
    functional: Mapping[str, int] = field(default_factory=dict)
