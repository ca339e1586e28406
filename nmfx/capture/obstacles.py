"""What stands in the way of masking a weight, told by its module and its tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..mask import DTYPES
from .generate import base_class, is_generated
from .refs import GONE
from .site import SITES, Site, place_of


def class_obstacle(module: nn.Module) -> str | None:
    """Why no generated class can run a module, or None."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, which a rewritten class would not run"
    if SITES in module.__dict__ and not is_generated(type(module)):
        return f"its class became {type(module).__name__} after it was sparsified"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule; sparsify before torch.jit.script"
    if base_class(module).forward is nn.Module.forward:
        return f"{type(module).__name__} has no forward"
    return None


def weight_obstacle(owner: nn.Module, name: str) -> str | None:
    """Why a parameter of a module cannot be masked, whatever its shape, or None."""
    weight = owner._parameters.get(name)
    if weight is None:
        return _computed(owner, name) if hasattr(owner, name) else "it has no weight"
    return tensor_obstacle(weight)


def _computed(owner: nn.Module, name: str) -> str:
    """What makes a weight that is no parameter, and how to make it one again."""
    if name in getattr(owner, "parametrizations", {}):
        return (
            "its weight is parametrized (torch.nn.utils.parametrize); remove_parametrizations "
            "makes it a parameter again"
        )
    for made_of, what, undo in _COMPUTED:
        if hasattr(owner, f"{name}_{made_of}"):
            return f"its weight is computed by {what}; {undo} makes it a parameter again"
    return _SOMEHOW


def computed_since(host: nn.Module, site: Site) -> str | None:
    """What became of the weight of a site that is no parameter any more; None if it is one.

    `fold` would write to what the next forward computes anew.
    """
    owner, name = place_of(host, site.path)
    if site.lowered or owner._parameters.get(name) is not None:
        return None
    weight = getattr(owner, name, None)
    if not isinstance(weight, Tensor):
        return GONE
    reason = _computed(owner, name)
    if reason == _SOMEHOW and weight._is_view():  # as FSDP1 shows parts of what it flattened
        return None
    return f"since it was sparsified, {reason}"


_SOMEHOW = "its weight is not a parameter but computed"

# What torch.nn.utils leaves beside a weight that its hooks compute before every forward.
_COMPUTED = (
    ("mask", "torch.nn.utils.prune", "prune.remove"),
    ("g", "torch.nn.utils.weight_norm", "remove_weight_norm"),
    ("u", "torch.nn.utils.spectral_norm", "remove_spectral_norm"),
)


def tensor_obstacle(weight: Tensor) -> str | None:
    """The same, of the tensor itself."""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is lazy: run one forward to give it a shape"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, which has no N:M order here (integer or quantized)"
    # DTensor (FSDP2, tensor parallel) is a wrapper too, but one that nmfx works through.
    wrapped = is_traceable_wrapper_subclass(weight) or is_traceable_wrapper_subclass(weight.data)
    if wrapped and not type(weight.data).__module__.startswith("torch.distributed"):
        return f"its weight is a {type(weight.data).__name__} (quantized or otherwise wrapped)"
    return None
