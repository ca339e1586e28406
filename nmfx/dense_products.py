"""The products of a lowered model computed from dense weights instead, each compared with its own.

It shows whether kernels are right where their rounding changes what a model does next: every
product gets the inputs that the dense model would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import relative_error, tolerance
from .errors import NMError
from .kernels.semi_structured import decompress
from .ops.conv_nm import unpacked_conv
from .ops.linear_nm import unpacked_linear


def _decompressed_linear(
    input: Tensor,
    compressed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    out: int,
    into: int,
    dtype: torch.dtype,
    algorithms: object = (),
) -> Tensor:
    return F.linear(input, decompress(compressed, meta, out, into, dtype), bias)


_DENSE: dict[object, Callable[..., Tensor]] = {
    torch.ops.nmfx.linear_nm.default: unpacked_linear,
    torch.ops.nmfx.conv_nm.default: unpacked_conv,
    torch.ops.nmfx.linear_semi_structured.default: _decompressed_linear,
}


class DenseProducts(TorchDispatchMode):
    """In the block, products return what dense weights make of their inputs.

    Args:
        names: of the stored tensors, for messages.

    Raises:
        NMError: from the model, a product that differs from the dense one by more than rounding.
    """

    def __init__(self, names: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in names.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs `func`, and its dense form where it has one."""
        result = func(*args, **(kwargs or {}))
        if func not in _DENSE:
            return result
        expected = _DENSE[func](*args, **(kwargs or {}))
        error, most = relative_error(expected, result), tolerance(expected)
        if not error <= most:
            name = self._names.get(id(args[1]), f"a layer of {tuple(expected.shape)} outputs")
            raise NMError(
                f"{name}: {func} differs from the dense product of the same inputs by {error:.1e} "
                f"(relative norm), more than {most:.0e}; keep this layer dense with a rule"
            )
        return expected
