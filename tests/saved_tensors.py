"""How many bytes a forward keeps for its backward, measured with saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(
    model: nn.Module, *inputs: Any, run: Callable | None = None, ignore: tuple[Tensor, ...] = ()
) -> int:
    """Bytes of the distinct storages saved for backward.

    Parameters, buffers, the inputs and `ignore` are alive anyway and do not count.

    Args:
        model: whose parameters and buffers do not count.
        *inputs: arguments of the call.
        run: what to call instead of `model`, say its compiled version.
        ignore: more tensors that do not count.
    """
    known = [*model.parameters(), *model.buffers(), *inputs, *ignore]
    alive = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, Tensor] = {}  # the tensors are held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in alive:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = (model if run is None else run)(*inputs)
    assert out.requires_grad, "nothing can be saved for a backward that is not there"
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
