"""The dense weight of a packed layer, as others may read it: what they write to it would be lost.

    layer.weight.data += delta        PEFT's merge: without this a silent nothing, with it an error

It is unpacked anew on every access, so nobody writes to the layer by writing to it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import NMError

_HARMLESS = ("requires_grad_", "detach_", "share_memory_")  # no value changes


class _ReadOnly(Tensor):
    """A tensor whose methods refuse to write; what is computed from it are plain tensors.

    As of a Parameter, no torch function is overridden: fused paths step aside for tensors whose
    functions are, and what they compute for padding is not what the others do.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def detach(self) -> Tensor:
        return super().detach().as_subclass(_ReadOnly)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        _refuse()


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise NMError(
        "the weight of this lowered layer is made for reading, and what is written to it would be "
        "lost; nmfx.fold(model) makes the layer dense again"
    )


def _writes(name: str) -> bool:
    if name.startswith("__"):  # __iadd__, but not __init__ or __invert__
        return name == "__setitem__" or (name[2] == "i" and f"__{name[3:]}" in dir(Tensor))
    return name.endswith("_") and not name.startswith("_") and name not in _HARMLESS


for _name in filter(_writes, dir(Tensor)):
    setattr(_ReadOnly, _name, _refuse)


def read_only(weight: Tensor) -> Tensor:
    """`weight` as a tensor that refuses writes; as it is in compiled code, which merges nothing."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(_ReadOnly)
