"""Scoped capture: modules whose forward does not trace run it on a stand-in with masked weights.

    def forward(self, *args, **kwargs):
        return base.forward(<self, with w replaced by sr_ste(w)>, *args, **kwargs)

So do modules that multiply with their own weights (own_weights.py).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.keep import keep
from ..ops.sr_ste import sr_ste
from .generate import base_class, generated_class
from .guards import owners_read
from .site import Site, control_name, get_path, mask_name
from .stand_in import masked_below, run_with


def scoped_class(module: nn.Module, sites: list[Site]) -> type[nn.Module]:
    """The generated class that runs `module`'s own forward with the weights of `sites` masked."""
    base = base_class(module)
    owners = owners_read(module)
    parts = tuple(
        (site.path, site.state, site.pattern.m, site.dim, control_name(i), mask_name(i))
        for i, site in enumerate(sites)
    )

    def nmfx_masked(self: Any) -> dict[str, Tensor]:
        masked = masked_below(self, owners)
        for path, state, m, dim, control, mask in parts:
            weight = get_path(self, path)
            if state == "frozen":
                masked[path] = keep(weight, getattr(self, mask))
            else:
                masked[path] = sr_ste(weight, getattr(self, control), m, dim)
        return masked

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_with(self, base.forward, nmfx_masked(self), args, kwargs)

    if isinstance(module, nn.RNNBase):
        # Dynamo leaves nn.LSTM and its like alone. (This imports it, in half a second.)
        forward = torch.compiler.disable(forward)
    key = "scoped", parts, owners
    return generated_class(base, key, lambda: forward, nmfx_masked=nmfx_masked)
