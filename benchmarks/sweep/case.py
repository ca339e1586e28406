"""What the sweep works on: a dense model, the inputs of one call, and how to compare results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any] | tuple[Any, ...]
SEED = 20


@dataclass
class Case:
    """A dense model that runs here.

    Attributes:
        model: in eval mode, with random weights.
        inputs: keywords or positional arguments of one call.
        train_inputs: of one call in train mode, where that takes others (detection: targets).
        recipe: how it was made, in words for the table.
        again: builds the model once more, for those that cannot be copied.
        masks: of its weights, as far as they were computed.
    """

    model: nn.Module
    inputs: Inputs
    train_inputs: Inputs | None = None
    recipe: str = ""
    again: Callable[[], nn.Module] | None = field(default=None, repr=False)
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def fresh(self) -> nn.Module:
        """Another copy of the dense model: same weights, no shared state."""
        if self.again is not None:  # a few models cannot be deep-copied
            model = self.again()
            model.load_state_dict(self.model.state_dict())
            return model.eval()
        return copy.deepcopy(self.model)

    def inputs_for(self, train: bool) -> Inputs:
        """The arguments of one call; torchvision's detectors change the lists they are given."""
        chosen = self.train_inputs if train and self.train_inputs is not None else self.inputs
        return copy.deepcopy(chosen)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """One call with the same random numbers every time."""
    torch.manual_seed(SEED)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def outputs(result: Any) -> list[Tensor]:
    """Every floating-point tensor in a result, in order; caches and other objects are left out."""
    return list(_floats(result))


def _floats(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.is_floating_point() and result.layout == torch.strided:
            yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _floats(item)
    elif isinstance(result, Mapping):
        for item in result.values():
            yield from _floats(item)


def probe_loss(result: Any) -> Tensor:
    """A scalar whose gradient reaches every output element with a weight of its own.

    A mean of squares would not do: it is constant after a layer norm.
    """
    total = torch.zeros(())
    for tensor in outputs(result):
        if tensor.requires_grad:
            weights = torch.arange(tensor.numel()).cos().to(tensor.dtype)
            kept = torch.where(tensor.isfinite(), tensor, 0)  # masked logits are -inf
            total = total + (kept.flatten() * weights).sum().float()
    return total


def liven(model: nn.Module) -> None:
    """Moves weights away from what hides a mistake: branches scaled by 0 or 1e-6, tiny signals."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() < 2:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(noise, alpha=0.1)
            elif parameter.ndim > 1:
                wanted = parameter[0].numel() ** -0.5
                std = float(parameter.float().std())
                if 0 < std < 0.5 * wanted:
                    parameter.mul_(wanted / std)


def finite(tensors: list[Tensor]) -> bool:
    """Whether there is something to compare: finite numbers that are not all the same."""
    values = [t.detach().flatten() for t in tensors if t.numel()]
    return bool(values) and any(bool(v.isfinite().any()) and bool((v != 0).any()) for v in values)
