"""A module's own forward on other weights, without touching the module.

A stand-in is a shallow copy made for one call: threads that run one model do not see each other's
weights (swapping the parameters in place would show them). Every way in which the forward reads a
weight, fused fast paths included, sees the masked one. Attributes that a forward sets are carried
back to the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from .generate import base_class
from .site import get_path


def run_with(
    module: nn.Module, method: Callable, weights: Mapping[str, Tensor], args: Any, kwargs: Any
) -> Any:
    """`method(module, *args, **kwargs)`, with other tensors at the given parameter paths."""
    if torch.compiler.is_compiling():
        # Dynamo of torch 2.11 cannot copy a module's attributes. It traces in one thread, and
        # nothing of the swap is left in the compiled code.
        with _swapped(module, weights):
            return method(module, *args, **kwargs)
    stand_in = _with_weights(module, weights)
    before = _attributes(stand_in)
    result = method(stand_in, *args, **kwargs)
    for name, value in _attributes(stand_in).items():
        if name not in before or before[name] is not value:
            setattr(module, name, value)
    return result


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


def _attributes(module: nn.Module) -> dict[str, Any]:
    # The stand-in shares its table of buffers with the module, but not these two.
    return {**module.__dict__, **module._parameters, **module._modules}


def _with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A shallow copy of `module` with other tensors at the given parameter paths."""
    fields = dict(module.__dict__)
    fields["_parameters"] = dict(module._parameters)
    fields["_modules"] = dict(module._modules)
    below: dict[str, dict[str, Tensor]] = {}
    own = False
    for path, tensor in weights.items():
        child, _, rest = path.partition(".")
        if rest:
            below.setdefault(child, {})[rest] = tensor
        else:
            own = True
            fields["_parameters"][child] = tensor
            fields.pop(child, None)  # FSDP and replicas set parameters as plain attributes
    for child, tensors in below.items():
        fields["_modules"][child] = _with_weights(fields["_modules"][child], tensors)
    # A module on the way to a weight still masks the weights that are its own.
    copy = object.__new__(base_class(module) if own else type(module))
    copy.__dict__.update(fields)
    if _FLAT in fields:
        copy.__dict__[_FLAT] = _flat_weights(copy)
    return copy


def masked_below(module: nn.Module, owners: tuple[str, ...]) -> dict[str, Tensor]:
    """The masked weights of those modules below `module` that are sparsified, by path."""
    masked = {}
    for path in owners:
        owner = get_path(module, path)
        if hasattr(type(owner), "nmfx_masked"):
            for name, weight in owner.nmfx_masked().items():
                masked[f"{path}.{name}"] = weight
    return masked
