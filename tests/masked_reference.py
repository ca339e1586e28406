"""What a sparsified model must compute, worked out in plain torch without importing nmfx.

Masks follow their definition: a weight is kept when fewer than N of its group beat it, where a
larger magnitude beats a smaller one and the lower index beats an equal. The model itself is an
ordinary dense model whose weights were overwritten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from zoo import Inputs, call, outputs, probe_loss

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Site:
    """One weight of a linear or conv module.

    Attributes:
        module: the module whose calls use the weight.
        dim: the dimension of the weight that the module sums over.
        length: how many elements it sums over; with groups, fewer than `dim` has in a transposed
            convolution.
    """

    module: nn.Module
    dim: int
    length: int


@dataclass(frozen=True)
class Expected:
    """What one forward and backward of the masked model gives.

    Attributes:
        outputs: every floating-point output.
        grads: parameter name -> gradient with the SR-STE term, or None where autograd gave none.
        decays: parameter name -> the SR-STE term alone, for masked parameters that were used.
        uses: parameter name -> calls of its module, for masked parameters.
    """

    outputs: list[Tensor]
    grads: dict[str, Tensor | None]
    decays: dict[str, Tensor]
    uses: dict[str, int]


def nm_mask(weight: Tensor, n: int, m: int, dim: int) -> Tensor:
    """The N:M mask by its definition: True where fewer than `n` of the group beat the weight."""
    groups = weight.detach().abs().movedim(dim, -1).unflatten(-1, (-1, m))
    mine, other = groups.unsqueeze(-1), groups.unsqueeze(-2)
    earlier = torch.ones(m, m).tril(-1).bool()  # [i, j]: j stands before i
    beaten = (other > mine) | ((other == mine) & earlier)
    return (beaten.sum(-1) < n).flatten(-2).movedim(-1, dim)


def sites(model: nn.Module, functional: Mapping[str, int] | None = None) -> dict[str, Site]:
    """Every weight of a linear, conv or attention module by name, whether it can be masked or not.

    Args:
        model: a dense model.
        functional: further weights that belong to the root module, parameter name -> dimension.
    """
    found: dict[str, Site] = {}
    for fqn, module in model.named_modules():
        for name, dim in _weights(module).items():
            path = f"{fqn}.{name}" if fqn else name
            # An out_proj was found through its attention module, whose calls are what counts.
            if path not in found:
                size = attrgetter(path)(model).shape[dim]
                groups = module.groups if isinstance(module, TRANSPOSED) else 1
                found[path] = Site(module, dim, size // groups)
    for name, dim in (functional or {}).items():
        found[name] = Site(model, dim, attrgetter(name)(model).shape[dim])
    return found


def _weights(module: nn.Module) -> dict[str, int]:
    """Names of the weights in a module -> the dimension that is summed over."""
    if isinstance(module, nn.MultiheadAttention):
        held = [name for name in ATTENTION_WEIGHTS if getattr(module, name) is not None]
        return dict.fromkeys([*held, "out_proj.weight"], 1)
    if isinstance(module, (nn.Linear, *CONVS)):
        return {"weight": 1}
    if isinstance(module, TRANSPOSED) or _is_hf_conv1d(module):
        return {"weight": 0}
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return {name: 1 for name, p in module.named_parameters() if name.startswith("weight")}
    if isinstance(module, nn.Bilinear):
        return {"weight": 2}
    if hasattr(module, "is_transposed"):  # experts of `transformers`, (experts, out, in) or not
        dim = 1 if module.is_transposed else 2
        return {name: dim for name, p in module.named_parameters() if p.ndim == 3}
    return {}


def _is_hf_conv1d(module: nn.Module) -> bool:
    where = "transformers.pytorch_utils"
    return any((c.__module__, c.__name__) == (where, "Conv1D") for c in type(module).__mro__)


def eligible(model: nn.Module, m: int) -> set[str]:
    """Names of the weights that N:M with groups of `m` can apply to, the head included.

    A weight drops out when `m` does not divide the summed length (depthwise convolutions among
    them), when two modules hold it (tied), or when it is no parameter (parametrized).
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    parameters = dict(model.named_parameters())
    return {
        name
        for name, site in sites(model).items()
        if site.length % m == 0 and name in parameters and owners[id(parameters[name])] == 1
    }


def mask_(model: nn.Module, where: Mapping[str, Site], n: int, m: int) -> dict[str, Tensor]:
    """Zeroes the pruned weights of a model in place.

    Returns:
        parameter name -> the pruned weights themselves, zero at the kept ones.
    """
    pruned = {}
    for name, site in where.items():
        weight = model.get_parameter(name).data
        kept = nm_mask(weight, n, m, site.dim)
        pruned[name] = torch.where(kept, 0.0, weight)
        weight.masked_fill_(~kept, 0.0)
    return pruned


def expected(
    model: nn.Module,
    inputs: Inputs,
    names: Iterable[str],
    pattern: tuple[int, int],
    lambda_w: float,
    functional: Mapping[str, int] | None = None,
    train: bool = False,
) -> Expected:
    """Runs the masked model forward and backward.

    Args:
        model: a freshly built dense model; its weights are overwritten.
        inputs: for one call.
        names: the parameters to mask.
        pattern: (N, M).
        lambda_w: strength of the SR-STE term, which counts once per use of the weight.
        functional: see `sites`.
        train: the mode to run in.
    """
    found = sites(model, functional)  # in eval mode: reading a spectral-normed weight changes it
    where = {name: found[name] for name in names}
    pruned = mask_(model, where, *pattern)
    model.train(train)
    with _counted({id(site.module): site.module for site in where.values()}) as calls:
        result = call(model, inputs)
    probe_loss(result).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    uses = {name: calls[id(site.module)] for name, site in where.items()}
    decays = {}
    for name, rest in pruned.items():
        grad = grads[name]
        if grad is not None:
            decays[name] = uses[name] * lambda_w * rest
            grads[name] = grad + decays[name]
    return Expected([out.detach() for out in outputs(result)], grads, decays, uses)


@contextmanager
def _counted(modules: Mapping[int, nn.Module]) -> Iterator[Counter[int]]:
    """Counts the calls of modules, by id."""
    calls: Counter[int] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, key=key: calls.update([key]))
        for key, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
