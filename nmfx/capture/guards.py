"""Parents that read their children's weights around their forward, made to read masked ones.

    class Parent:                                     class NMParent(Parent):
        def forward(self, x):                             def forward(self, x):
            w = self.key.weight              ->               <self, with key.weight masked>
            return F.conv2d(x, w[..., None])                  runs Parent.forward

The layer itself keeps its site and its own masked forward, for everybody else who calls it. A
packed layer needs none of this: whoever reads its `weight` gets it unpacked. A parent may be a
whole model, whose name and signature others go by (Hugging Face writes the one into config.json
and chooses the columns of a data set by the other), so it keeps both.

nn.TransformerEncoderLayer reads them in its fused inference path, and asks its own attribute
`activation_relu_or_gelu` first; there the guard's class answers 0, and the value that the module
itself holds stays what it was. nn.TransformerEncoder asks its first layer's weights whether they
are plain tensors, before it makes a nested one of what is padded: packed ones are shown to it
without their values, which would have to be unpacked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .attention import attention_class
from .generate import base_class, generated_class
from .readers import weights_read
from .site import SITES, get_path, is_lowered, stored_names
from .stand_in import hosts_of, masked_below, run_with

# Class attribute overrides that make a parent call its children.
OVERRIDES: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": property(lambda self: 0)},
}


def guard_class(module: nn.Module) -> type[nn.Module] | None:
    """The generated class of a parent that would read raw weights, or None if it would not."""
    base = base_class(module)
    if _runs(base, nn.MultiheadAttention) and is_lowered(module._modules.get("out_proj")):
        return attention_class(module, ())
    if _runs(base, nn.TransformerEncoder):
        forward = _glancing(base.forward)
        return generated_class(base, ("glances",), lambda: forward, base.__name__)
    overrides = next((o for kind, o in OVERRIDES.items() if issubclass(base, kind)), {})
    owners = owners_read(module)
    if not owners and not overrides:
        return None
    entries = sorted(weights_read(module, base).entries) if owners else []
    members = overrides | {name: _guarded(getattr(base, name), owners) for name in entries}
    forward = members.pop("forward", base.forward)
    return generated_class(base, ("reads", owners), lambda: forward, base.__name__, **members)


def _runs(base: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a class runs the forward of `kind`; what one of its own reads counts as anywhere."""
    return issubclass(base, kind) and base.forward is kind.forward


def guards(module: nn.Module, hosts: set[nn.Module]) -> bool:
    """Whether `module` reads the weights of any of `hosts`."""
    base = base_class(module)
    if _runs(base, nn.MultiheadAttention):
        return module._modules.get("out_proj") in hosts
    if _runs(base, nn.TransformerEncoder):
        return any(host in hosts and is_lowered(host) for host in module.modules())
    if isinstance(module, tuple(OVERRIDES)):
        return not hosts.isdisjoint(module.modules())
    paths = (host for path in owners_read(module) for host, _ in hosts_of(path))
    return any(module.get_submodule(path) in hosts for path in paths)


def owners_read(module: nn.Module) -> tuple[str, ...]:
    """Paths of the modules below `module` whose weights it reads itself."""
    reads = weights_read(module, base_class(module)).read
    return tuple(sorted({path.rpartition(".")[0] for path in reads}))


def _guarded(method: Callable, owners: tuple[str, ...]) -> Callable:
    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        masked = masked_below(self, owners)
        if not masked:  # not sparse, or packed
            return method(self, *args, **kwargs)
        return run_with(self, method, masked, args, kwargs)

    return guarded


def _glancing(method: Callable) -> Callable:
    @functools.wraps(method)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # then it makes no nested tensors
            return method(self, *args, **kwargs)
        stand_in: Any = object.__new__(base_class(self))
        layers = {"layers": _Layers(self.layers)}
        stand_in.__dict__.update(self.__dict__, _modules={**self._modules, **layers})
        return method(stand_in, *args, **kwargs)

    return forward


class _Layers:
    """The layers of an encoder: called they are themselves, asked for by number a `_Glance`."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers)

    def __getitem__(self, index: int) -> _Glance:
        return _Glance(self._layers[index])


class _Glance:
    """A module whose lowered weights have a shape, a dtype and a device, and no values."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        module = self._module
        for site in module.__dict__.get(SITES, ()):
            if site.path == name and site.lowered and name not in module._parameters:
                stored = get_path(module, stored_names(site)[0])
                dtype = site.dtype or stored.dtype
                return torch.empty((), dtype=dtype, device=stored.device).expand(site.shape)
        value = getattr(module, name)
        return _Glance(value) if isinstance(value, nn.Module) else value
