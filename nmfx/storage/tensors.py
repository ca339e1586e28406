"""The tensors of a model, by the names that files use.

fc.weight                     parameters and buffers, as in the state_dict
nmfx.mask:fc.weight           bool: the fixed mask of a frozen layer
nmfx.buffer:rotary.inv_freq   a buffer that is not in the state_dict; a model that was built on
                              the meta device has no other way to get it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..capture.site import join
from ..errors import NMError
from .place import is_text

MASK = "nmfx.mask:"
BUFFER = "nmfx.buffer:"


@dataclass(frozen=True)
class Slot:
    """One place of a module for a parameter or buffer that is there."""

    table: dict[str, Any]
    key: str
    persistent: bool

    @property
    def tensor(self) -> Tensor:
        """What is in it."""
        return self.table[self.key]


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """All places of a model, under every name that each has; shared modules have several."""
    return dict(_slots(model))


def _slots(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if nn.parameter.is_lazy(tensor):
                    name = join(prefix, key)
                    raise NMError(f"{name}: it is lazy; run one forward to give it a shape")
                if tensor is not None:
                    hidden = table is module._buffers and key in module._non_persistent_buffers_set
                    yield join(prefix, key), Slot(table, key, not hidden)


def file_name(name: str, slot: Slot) -> str:
    """The name of a tensor in a file."""
    return name if slot.persistent else BUFFER + name


def check_storable(name: str, tensor: Tensor) -> None:
    """Refuses tensors that a file cannot hold as they are.

    Raises:
        NMError: what it is, and what to do.
    """
    kind = type(tensor).__name__
    if name == "__metadata__" or not is_text(name):
        raise NMError(f"{name!r} cannot be the name of a tensor in a safetensors file")
    if tensor.is_meta:
        raise NMError(f"{name}: it is on the meta device, so there is nothing to save")
    if hasattr(tensor, "placements"):
        raise NMError(
            f"{name}: it is a {kind}, of which this process has a part; gather the model first "
            f"(get_model_state_dict of torch.distributed.checkpoint.state_dict, with "
            f"full_state_dict=True), or save it with torch.distributed.checkpoint"
        )
    wrapped = is_traceable_wrapper_subclass(tensor) or is_traceable_wrapper_subclass(tensor.data)
    if wrapped or tensor.layout != torch.strided or tensor.is_quantized:
        raise NMError(f"{name}: it is a {kind} ({tensor.layout}), which safetensors cannot hold")


def check_state_dict(model: nn.Module, slots: dict[str, Slot]) -> None:
    """Refuses models whose state_dict is more, or less, than their parameters and buffers.

    Raises:
        NMError: with the first name.
    """
    own = {name for name, slot in slots.items() if slot.persistent}
    odd = sorted(own ^ model.state_dict().keys())
    if odd:
        raise NMError(
            f"{type(model).__name__}: its state_dict is not just its parameters and buffers; "
            f"{odd[0]!r} is only in one of them (an extra state, or a hook that changes names)"
        )


def same_memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same elements of the same memory."""
    if not tensor.numel():
        return (id(tensor),)
    place = id(tensor) if tensor.is_meta else tensor.data_ptr()
    return place, tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()
