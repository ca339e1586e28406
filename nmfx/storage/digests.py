"""What a tensor is in a file: its bytes and their digest."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from .spec import Stored


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 of such a tensor's bytes, in hex."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def stored_as(tensor: Tensor) -> Stored:
    """What such a tensor is in a file."""
    return Stored(tensor.dtype, tuple(tensor.shape), sha256_of(tensor))
