"""Masks in bits: an eighth of their memory, and counted eight bytes at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# Eight bytes of 0 or 1, times this, have them as the bits of the highest byte, the first lowest.
_GATHER = 0x0102040810204080


def mask_bits(mask: Tensor) -> Tensor:
    """A bool mask of any shape as uint8 of shape (ceil(n / 64) * 8,), in its logical order.

    The bits after the last are 0.
    """
    flat = mask.reshape(-1)
    filled = torch.nn.functional.pad(flat, (0, -flat.numel() % 64)).view(torch.int64)
    return ((filled * _GATHER) >> 56).to(torch.uint8)


def count_ones(bits: Tensor) -> Tensor:
    """How many bits are 1 in what `mask_bits` returned, an int64 scalar on its device."""
    x = bits.view(torch.int32)
    x = (x & 0x55555555) + ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x & 0x0F0F0F0F) + ((x >> 4) & 0x0F0F0F0F)
    x = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
    return ((x & 0xFFFF) + ((x >> 16) & 0xFFFF)).sum()
