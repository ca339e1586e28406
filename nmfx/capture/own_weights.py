"""The weights that a module multiplies with itself, instead of calling a linear or conv module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .site import SITES, is_lowered


@dataclass(frozen=True)
class Own:
    """How a module consumes one of its weights.

    Attributes:
        path: the parameter, relative to the module.
        kind: "linear", "recurrent", "bilinear", "experts" or "embedding".
        dim: the dimension that one output sums over.
        obstacle: why it stays dense, or None.
    """

    path: str
    kind: str
    dim: int = 1
    obstacle: str | None = None


# Of an nn.Embedding whose weight is that of an output layer too, see tied.py: (rows, features).
EMBEDDING = Own("weight", "embedding")

EXPERTS = "experts"  # the kind of a mixture's weights

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def own_weights(module: nn.Module) -> list[Own] | None:
    """The weights that `module` consumes itself; None if it is none of the kinds known here."""
    if isinstance(module, nn.MultiheadAttention):  # (out, in)
        sites = [site.path for site in module.__dict__.get(SITES, ())]
        paths = [name for name in _ATTENTION if name in sites or getattr(module, name) is not None]
        # Lowered, the output projection is a layer of its own: attention.py.
        paths += [] if is_lowered(module._modules.get("out_proj")) else ["out_proj.weight"]
        return [Own(path, "linear") for path in paths]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):  # (gates * hidden, in)
        return [Own(name, "recurrent") for name in _matrices(module)]
    if isinstance(module, nn.Bilinear):  # (out, in1, in2)
        return [Own("weight", "bilinear", 2)]
    return _experts(module)


def _matrices(module: nn.Module) -> list[str]:
    return [name for name, p in module._parameters.items() if p is not None and p.ndim == 2]


# Mixtures of experts of `transformers` keep the weights of all experts in one tensor. Those that
# its `use_experts_implementation` decorates say themselves which way it lies; these do not:
_EXPERTS = {
    "Llama4TextExperts": 1,  # (experts, in, out)
    "JetMoeParallelExperts": 2,  # (experts, out, in)
    "Step3p7Experts": 2,
    "InklingSharedExperts": 2,
}


def _experts(module: nn.Module) -> list[Own] | None:
    linear = isinstance(module, nn.Linear) and "weight" in _matrices(module)
    if linear or isinstance(module, nn.modules.conv._ConvNd):
        return None  # a layer of its own kind, whatever attributes a subclass has
    stacked = [
        name
        for name, p in module._parameters.items()
        if p is not None and p.ndim == 3 and 1 not in p.shape[1:] and "bias" not in name.lower()
    ]
    sites = [site for site in module.__dict__.get(SITES, ()) if site.kind == EXPERTS]
    for site in reversed([site for site in sites if site.lowered]):
        # Each knows the order of the parameters that were left before it.
        stacked = [name for name in site.order if name == site.path or name in stacked]
    if not stacked:
        return None
    transposed = getattr(module, "is_transposed", None)
    dim = None
    if isinstance(transposed, bool):
        dim = 1 if transposed else 2
    for base in type(module).__mro__:
        if dim is None and base.__module__.startswith("transformers."):
            dim = _EXPERTS.get(base.__name__)
    if dim is not None:
        return [Own(name, EXPERTS, dim) for name in stacked]
    name = type(module).__name__
    if not any(part in name.lower() for part in ("expert", "moe")):
        return None
    reason = f"nmfx does not know which dimension {name} sums over"
    return [Own(path, EXPERTS, obstacle=reason) for path in stacked]
