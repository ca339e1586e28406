"""Scoped capture: modules whose forward does not trace run it on a stand-in with masked weights.

    def forward(self, *args, **kwargs):
        return base.forward(<self, with w replaced by sr_ste(w)>, *args, **kwargs)

The stand-in is a shallow copy made for the call: the module itself is never touched, so threads
that run one model do not see each other's weights (swapping the parameters in place would show
them). Every way in which the forward reads the weight, fused fast paths included, sees the masked
one. Attributes that a forward sets are carried back to the module.

A *guard* is the other half: a parent that reads its children's weights around their forward is
told to call them. nn.TransformerEncoderLayer does so in its fused inference path, and asks its own
attribute `activation_relu_or_gelu` first; the guard's class answers 0, and the value that the
module itself holds stays what it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ..ops.keep import keep
from ..ops.sr_ste import sr_ste
from .generate import base_class, generated_class
from .site import Site, control_name, get_path, mask_name

# Class attribute overrides that make a parent call its children.
GUARDS: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": property(lambda self: 0)},
}

_ATTENTION_INPUTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def attention_paths(module: nn.MultiheadAttention) -> list[str]:
    """The projection weights that a MultiheadAttention reads itself, all (out, in)."""
    paths = [name for name in _ATTENTION_INPUTS if getattr(module, name) is not None]
    return [*paths, "out_proj.weight"]


def scoped_class(module: nn.Module, sites: list[Site]) -> type[nn.Module]:
    """The generated class that runs `module`'s own forward with the weights of `sites` masked."""
    base = base_class(module)
    parts = tuple(
        (site.path, site.state, site.pattern.m, site.dim, control_name(i), mask_name(i))
        for i, site in enumerate(sites)
    )

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        masked = {}
        for path, state, m, dim, control, mask in parts:
            weight = get_path(self, path)
            if state == "frozen":
                masked[path] = keep(weight, getattr(self, mask))
            else:
                masked[path] = sr_ste(weight, getattr(self, control), m, dim)
        if torch.compiler.is_compiling():
            # Dynamo of torch 2.11 cannot copy a module's attributes. It traces in one thread, and
            # nothing of the swap is left in the compiled code.
            with _reparametrize_module(self, masked):
                return base.forward(self, *args, **kwargs)
        stand_in = _with_weights(self, masked)
        before = _attributes(stand_in)
        result = base.forward(stand_in, *args, **kwargs)
        for name, value in _attributes(stand_in).items():
            if name not in before or before[name] is not value:
                setattr(self, name, value)
        return result

    return generated_class(base, ("scoped", parts), lambda: forward)


def _attributes(module: nn.Module) -> dict[str, Any]:
    # The stand-in shares its table of buffers with the module, but not these two.
    return {**module.__dict__, **module._parameters, **module._modules}


def _with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A shallow copy of `module` with other tensors at the given parameter paths."""
    copy = object.__new__(base_class(module))
    fields = dict(module.__dict__)
    fields["_parameters"] = dict(module._parameters)
    fields["_modules"] = dict(module._modules)
    below: dict[str, dict[str, Tensor]] = {}
    for path, tensor in weights.items():
        child, _, rest = path.partition(".")
        if rest:
            below.setdefault(child, {})[rest] = tensor
        else:
            fields["_parameters"][child] = tensor
            fields.pop(child, None)  # FSDP and replicas set parameters as plain attributes
    for child, tensors in below.items():
        fields["_modules"][child] = _with_weights(fields["_modules"][child], tensors)
    copy.__dict__.update(fields)
    return copy


def guard_class(module: nn.Module) -> type[nn.Module] | None:
    """The generated class that makes a parent with a fast path call its children, or None."""
    base = base_class(module)
    overrides = next((o for kind, o in GUARDS.items() if issubclass(base, kind)), None)
    if overrides is None:
        return None
    return generated_class(base, ("guard",), lambda: base.forward, **overrides)
