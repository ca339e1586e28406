"""Which kernels find the mask of a weight: native ones on CPU, Triton on GPUs, else plain torch."""

from __future__ import annotations

from torch import Tensor

from . import cpu, triton


def why_plain(weight: Tensor, m: int) -> str | None:
    """Why plain torch computes the masks of a weight, or None if kernels of our own do.

    Args:
        weight: any tensor; what is to become of one on the meta device is not known.
        m: group length M.
    """
    if weight.is_cuda:
        return triton.why_not(weight, m)
    if weight.is_cpu:
        return cpu.why_not()
    return None if weight.is_meta else f"nmfx has no kernels for {weight.device.type}"
