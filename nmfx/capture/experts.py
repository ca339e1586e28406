"""Mixtures of experts of `transformers` on lowered weights: its grouped forward, nmfx's products.

    gate_up_proj, up_proj, down_proj (experts, out, in)     ..._values, ..._index     experts_nm

Classes that its `use_experts_implementation` decorates share one forward, which sorts tokens by
expert and hands them to `_grouped_linear` twice; that runs here with this helper replaced. What the
model asks for of its own (`experts_implementation`: eager, batched, grouped) makes no difference.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..ops.experts_nm import experts_nm
from ..packing import BLOCK
from .forms import packed_names
from .generate import base_class, generated_class
from .packed import dense_property
from .renamed import with_helpers
from .site import Site

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_MODULE = "transformers.integrations.moe"
# They compute the same.
_IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe")
_FORWARD = "grouped_mm_experts_forward"
_HELPER = "_grouped_linear"

Product = Callable[[Tensor, Tensor], Tensor]  # of rows sorted by expert, and where each one's end


def why_not_lowered(module: nn.Module, path: str, weight: Tensor) -> str | None:
    """Why a weight of a mixture of experts cannot be lowered, or None.

    Args:
        module: the mixture, with its class or a generated one.
        path: of the weight, in it.
        weight: that one.
    """
    base = base_class(module)
    code = getattr(base.forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars or "forward" in module.__dict__:
        return f"{base.__name__} has a forward of its own"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in _IMPLEMENTATIONS:
        return f"experts_implementation={implementation!r} is none of those of transformers"
    if path not in _WEIGHTS or getattr(module, "is_transposed", True):
        return f"{base.__name__} does not hold it as (experts, out, in)"
    if weight.is_cuda:
        return "packed experts run on the CPU"
    if weight.shape[1] % BLOCK:
        return f"its {weight.shape[1]} outputs per expert do not fill packed blocks of {BLOCK}"
    function = getattr(sys.modules.get(_MODULE), _FORWARD, None)
    if function is None or _HELPER not in function.__code__.co_names:
        return "this version of transformers computes experts in a way that nmfx does not know"
    return None


def experts_class(module: nn.Module, sites: Sequence[Site]) -> type[nn.Module]:
    """The class that runs a mixture of experts with packed weights.

    Args:
        module: `why_not_lowered` found nothing.
        sites: of its weights, all packed; the others stay dense.
    """
    base = base_class(module)
    packed = {site.path: site for site in sites}
    grouped = _grouped_forward()

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return grouped(_Products(self, packed), *args, **kwargs)

    key = "experts", tuple((site.path, site.shape, site.pattern) for site in sites)
    members: dict[str, Any] = {path: dense_property(site) for path, site in packed.items()}
    return generated_class(base, key, lambda: forward, **members)


class _Products:
    """A mixture whose weights are functions: what `grouped_mm_experts_forward` takes for `self`."""

    def __init__(self, module: Any, packed: dict[str, Site]) -> None:
        self._module, self._packed = module, packed

    def __getattr__(self, name: str) -> Any:
        module = self._module
        site = self._packed.get(name)
        if site is not None:
            return _packed_product(module, site)
        value = getattr(module, name)
        return _dense_product(value) if name in _WEIGHTS else value


def _packed_product(module: Any, site: Site) -> Product:
    values, index = (getattr(module, name) for name in packed_names(site.path))
    constants = *site.shape[1:], site.pattern.n, site.pattern.m
    # To the weight's dtype as `_grouped_linear` does: hidden states may be float32 there.
    return lambda x, offsets: experts_nm(x.to(values.dtype), values, index, offsets, *constants)


def _dense_product(weight: Tensor) -> Product:
    return lambda x, offsets: getattr(sys.modules[_MODULE], _HELPER)(x, weight, offsets)


def _grouped_linear(
    input: Tensor,
    weight: Product,
    offsets: Tensor,
    bias: Tensor | None = None,
    is_transposed: bool = False,
) -> Tensor:
    y = weight(input, offsets)
    return y if bias is None else y + bias


@functools.cache
def _grouped_forward() -> Any:
    return with_helpers(getattr(sys.modules[_MODULE], _FORWARD), **{_HELPER: _grouped_linear})
