"""The dense weight of a packed layer, as others may read it: what they write to it would be lost.

    layer.weight.data += delta        PEFT's merge: without this a silent nothing, with it an error

It is unpacked anew on every access, so nobody writes to the layer by writing to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import NMError

_HARMLESS = ("requires_grad_", "detach_", "share_memory_")  # no value changes


class _ReadOnly(Tensor):
    """A tensor that refuses to be written to; what is computed from it are plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(kwargs.get("out"), cls) or (_writes(func) and isinstance(args[0], cls)):
            raise NMError(
                "the weight of this lowered layer is made for reading, and what is written to it "
                "would be lost; nmfx.fold(model) makes the layer dense again"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        alias = func == Tensor.detach or func == Tensor.data.__get__  # type: ignore[attr-defined]
        return result.as_subclass(cls) if alias else result


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name == "__setitem__" or func == Tensor.data.__set__  # type: ignore[attr-defined]
    return name.endswith("_") and name not in _HARMLESS


def read_only(weight: Tensor) -> Tensor:
    """`weight` as a tensor that refuses writes; as it is in compiled code, which merges nothing."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(_ReadOnly)
