"""A module's own forward on other weights, without touching the module.

A stand-in is a shallow copy made for one call: threads that run one model do not see each other's
weights (swapping the parameters in place would show them). Every way in which the forward reads a
weight, fused fast paths included, sees the masked one. Attributes that a forward sets are carried
back to the module; what it writes to a weight would be lost, and is an error.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ..errors import NMError
from .generate import base_class
from .site import get_path


def run_with(
    module: nn.Module, method: Callable, weights: Mapping[str, Tensor], args: Any, kwargs: Any
) -> Any:
    """`method(module, *args, **kwargs)`, with other tensors at the given parameter paths.

    Raises:
        NMError: the method wrote to one of these.
    """
    if torch.compiler.is_compiling():
        # Dynamo of torch 2.11 cannot copy a module's attributes. It traces in one thread, and
        # nothing of the swap is left in the compiled code.
        with _swapped(module, weights):
            return method(module, *args, **kwargs)
    made: list[_Copy] = []
    real = {id(tensor): get_path(module, path) for path, tensor in weights.items()}
    stand_in = _with_weights(module, weights, made, real)
    handed = [
        (path, tensor, _version(tensor))
        for path, tensor in weights.items()
        if isinstance(tensor, Tensor)  # or a proxy, while torch.fx traces
    ]
    try:
        result = method(stand_in, *args, **kwargs)
    finally:
        for copy in made:
            copy.carry_back()
    for path, tensor, version in handed:
        if get_path(stand_in, path) is not tensor or _version(tensor) != version:
            raise NMError(
                f"{path}: {base_class(module).__name__} wrote to this weight while it ran, where a "
                f"masked copy stands for it, so what was written is lost; keep this layer dense "
                f"with a rule, or write to the weight outside of it"
            )
    return result


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _swapped(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    flat = module.__dict__.get(_FLAT)
    with _reparametrize_module(module, dict(weights)):
        if flat is not None:
            module.__dict__[_FLAT] = _flat_weights(module)
        try:
            yield
        finally:
            if flat is not None:
                module.__dict__[_FLAT] = flat


# nn.LSTM and its like read their weights from this list, which follows `setattr` alone.
_FLAT = "_flat_weights"


def _flat_weights(module: Any) -> list[Any]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


class _Copy:
    """A shallow copy of a module that stands for it during one call."""

    def __init__(
        self, module: nn.Module, copy: nn.Module, replaced: set[str], real: dict[int, Any]
    ) -> None:
        self._module, self._copy, self._replaced, self._real = module, copy, replaced, real
        self._before = self._attributes()

    def _attributes(self) -> dict[str, Any]:
        # The copy shares its table of buffers with the module, but not these two.
        fields = {**self._copy.__dict__, **self._copy._parameters, **self._copy._modules}
        return {name: value for name, value in fields.items() if name not in self._replaced}

    def carry_back(self) -> None:
        """Sets on the module what a forward set on the copy, real weights in place of masked ones.

        All but what a cached property keeps: it may be made of masked weights, which change.
        """
        for name, value in self._attributes().items():
            kept = isinstance(getattr(type(self._copy), name, None), functools.cached_property)
            if kept or (name in self._before and self._before[name] is value):
                continue
            if id(value) in self._real:  # not by `setattr`, which would make it a parameter
                self._module.__dict__[name] = self._real[id(value)]
            else:
                setattr(self._module, name, value)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _with_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    made: list[_Copy],
    real: dict[int, Any],
    hooks: bool = False,
) -> nn.Module:
    """A shallow copy of `module` with other tensors at the given parameter paths.

    Args:
        module, weights: see `run_with`.
        made: gets this copy and those below it.
        real: by the identity of such a tensor, what it stands for.
        hooks: whether hooks may run on the copy; they are told of the module itself.
    """
    fields = dict(module.__dict__)
    fields["_parameters"] = dict(module._parameters)
    fields["_modules"] = dict(module._modules)
    below: dict[str, dict[str, Tensor]] = {}
    replaced = {"_parameters", "_modules", _FLAT, *_HOOKS}
    own = False
    for path, tensor in weights.items():
        child, _, rest = path.partition(".")
        replaced.add(child)
        if rest:
            below.setdefault(child, {})[rest] = tensor
        else:
            own = True
            fields["_parameters"][child] = tensor
            fields.pop(child, None)  # FSDP and replicas set parameters as plain attributes
    for child, tensors in below.items():
        old = fields["_modules"][child]
        fields["_modules"][child] = _with_weights(old, tensors, made, real, hooks=True)
    for table in _HOOKS if hooks else ():
        if fields.get(table):
            told = ((key, _told(module, hook)) for key, hook in fields[table].items())
            fields[table] = OrderedDict(told)
    # A module on the way to a weight still masks the weights that are its own.
    copy = object.__new__(base_class(module) if own else type(module))
    copy.__dict__.update(fields)
    if _FLAT in fields:
        copy.__dict__[_FLAT] = _flat_weights(copy)
    made.append(_Copy(module, copy, replaced, real))
    return copy


def _told(module: nn.Module, hook: Callable) -> Callable:
    def told(copy: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return hook(module, *args, **kwargs)

    return told


def masked_below(module: nn.Module, owners: tuple[str, ...]) -> dict[str, Tensor]:
    """The masked weights of those modules below `module` that are sparsified, by path."""
    masked: dict[str, Tensor] = {}
    for path in owners:
        for host_path, below in hosts_of(path):
            host = get_path(module, host_path)
            if not hasattr(type(host), "nmfx_masked"):
                continue
            found = {
                f"{host_path}.{name}": weight
                for name, weight in host.nmfx_masked().items()
                if name.startswith(below)
            }
            if found:
                masked |= found
                break
    return masked


def hosts_of(path: str) -> Iterator[tuple[str, str]]:
    """("a.b", ""), ("a", "b."): the modules that may mask the weights of module `path`."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count]), "".join(f"{part}." for part in parts[count:])
