"""Modules that sites are stored in: how they move, copy and load what nmfx added to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.sr_ste import make_control
from .check_loaded import check_loaded
from .site import SHARDS, SITES, control_name


class NMModule:
    """A mixin for every module that sites are stored in; it stands before the base."""

    nmfx_base: type[nn.Module]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        move_state(self, fn)  # type: ignore[arg-type]
        return result

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        check_loaded(self, state_dict, prefix)  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]


HOLDER = "_nmfx"  # the child of a GraphModule that is its Holder


class Holder(NMModule, nn.Module):
    """Stores the sites of a GraphModule; it has no parameters, buffers or forward of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return copied_state(self.__dict__)

    def check_host(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called when the GraphModule is about to load: `check_loaded` for its sites."""
        check_loaded(self, state_dict, prefix)


def holder_of(module: nn.Module) -> Holder | None:
    """The holder of a module, or None."""
    holder = None if isinstance(module, torch.jit.ScriptModule) else module._modules.get(HOLDER)
    return holder if isinstance(holder, Holder) else None


def move_state(store: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Follows `module.to(device)`, for any function that `nn.Module._apply` may be given.

    Control tensors and masks follow to the device that `fn` sends an empty probe to, and are never
    passed through `fn` themselves: `bfloat16()` would round them, `to_empty()` would erase them,
    and what sits on the meta device cannot come back.
    """
    for key, value in store.__dict__.items():
        if key.startswith("_nmfx_") and isinstance(value, Tensor):
            device = fn(torch.empty(0, dtype=torch.uint8, device=value.device)).device
            if device.type != "meta" and device != value.device:
                store.__dict__[key] = value.to(device)


def copied_state(state: dict[str, Any]) -> dict[str, Any]:
    """A host's `__dict__` for a copy, in which lambda is back inside: hooks do not follow."""
    state = dict(state)
    state.pop(SHARDS, None)
    sites = [replace(site, attached=None) for site in state.get(SITES, ())]
    for i, (old, new) in enumerate(zip(state.get(SITES, ()), sites, strict=True)):
        if old.attached is not None:
            device = state[control_name(i)].device
            state[control_name(i)] = make_control(new.lambda_w, new.pattern.n, device)
    if sites:
        state[SITES] = sites
    return state


def detach_copy(store: nn.Module) -> None:
    """Does the same to a copy that somebody else's code made of a host, item by item."""
    fields = store.__dict__
    fields.pop(SHARDS, None)
    if SITES in fields:  # it may share them with the original
        fields[SITES] = [replace(site, attached=None) for site in fields[SITES]]
    for i, site in enumerate(fields.get(SITES, ())):
        control = fields.get(control_name(i))
        if control is not None:
            new = make_control(site.lambda_w, site.pattern.n, control.device)
            fields[control_name(i)] = new
