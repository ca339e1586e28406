"""What a sparsified model must compute, worked out in plain torch without importing nmfx.

The weights of the layers, and the dimension each sums over, are read off the model's structure;
masks follow their definition (a larger magnitude beats a smaller one, the lower index an equal).
The reference is an ordinary dense model whose weights were overwritten. Its gradients get the
SR-STE term by hand, once per call of the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sweep.case import Inputs, call, outputs, probe_loss

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class Measured:
    """What one call and its backward gave; `failed` tells why they gave nothing."""

    outputs: list[Tensor]
    grads: dict[str, Tensor | None]
    uses: dict[str, int]


def layer_weights(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Weight name -> (the module whose calls use it, the dimension it sums over).

    Of every linear, conv, attention, recurrent and bilinear layer, by the model's own structure.
    """
    found: dict[str, tuple[nn.Module, int]] = {}
    for fqn, module in model.named_modules():
        for name, dim in _weights(module).items():
            path = f"{fqn}.{name}" if fqn else name
            # An out_proj was found through its attention module, whose calls are what counts.
            found.setdefault(path, (module, dim))
    return found


def _weights(module: nn.Module) -> dict[str, int]:
    if isinstance(module, nn.MultiheadAttention):
        held = [name for name in ATTENTION_WEIGHTS if getattr(module, name) is not None]
        return dict.fromkeys([*held, "out_proj.weight"], 1)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        names = [name for name, p in module.named_parameters(recurse=False) if p.ndim > 1]
        return dict.fromkeys(names, 1)
    if isinstance(module, (nn.Linear, *CONVS)):
        return {"weight": 1}
    if isinstance(module, TRANSPOSED) or _is_hf_conv1d(module):
        return {"weight": 0}
    return {"weight": 2} if isinstance(module, nn.Bilinear) else {}


def _is_hf_conv1d(module: nn.Module) -> bool:
    where = "transformers.pytorch_utils"
    return any((c.__module__, c.__name__) == (where, "Conv1D") for c in type(module).__mro__)


def nm_mask(weight: Tensor, n: int, m: int, dim: int) -> Tensor:
    """The N:M mask by its definition: True where fewer than `n` of the group beat the weight."""
    groups = weight.detach().abs().movedim(dim, -1).unflatten(-1, (-1, m))
    beaten = torch.zeros(groups.shape, dtype=torch.uint8)
    for j in range(m):
        other = groups[..., j : j + 1]
        stands_before = torch.arange(m) > j
        beaten += (other > groups) | ((other == groups) & stands_before)
    return (beaten < n).flatten(-2).movedim(-1, dim)


def run(model: nn.Module, inputs: Inputs, watched: Mapping[str, nn.Module] | None = None) -> Any:
    """One call and its backward; `uses` counts the calls that a gradient comes back through."""
    model.zero_grad(set_to_none=True)
    with _counted(watched or {}) as uses:
        result = call(model, inputs)
        loss = probe_loss(result)
        if loss.requires_grad:
            loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return Measured([out.detach() for out in outputs(result)], grads, uses)


def masked(
    model: nn.Module,
    inputs: Inputs,
    pruned: Mapping[str, Tensor],
    lambda_w: float,
) -> Measured:
    """Outputs of a model that `mask_` changed, and its gradients with the SR-STE term.

    Args:
        model: in the mode to run in.
        inputs: of one call.
        pruned: what `mask_` returned.
        lambda_w: strength of the SR-STE term.
    """
    layers = layer_weights(model)
    watched = {name: layers[name][0] for name in pruned if name in layers}
    measured = run(model, inputs, watched)
    for name, rest in pruned.items():
        grad = measured.grads[name]
        if grad is not None:
            measured.grads[name] = grad + max(measured.uses[name], 1) * lambda_w * rest
    return measured


def mask_(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeroes the pruned weights in place; returns them by name, zero where a weight is kept."""
    pruned = {}
    for name, kept in masks.items():
        weight = model.get_parameter(name).data
        pruned[name] = torch.where(kept, 0.0, weight)
        weight.masked_fill_(~kept, 0.0)
    return pruned


@contextmanager
def _counted(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    calls: Counter[str] = Counter()

    def hook(name: str) -> Any:
        return lambda module, args, result: _watch(result, lambda: calls.update([name]))

    hooks = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _watch(result: Any, count: Callable[[], None]) -> None:
    """Counts a call when a gradient comes back through it: the decay belongs to the backward.

    Some calls have none: of iterations without gradients, or whose result is detached.
    """
    came = []

    def back(grad: Tensor) -> None:
        if not came:
            came.append(True)
            count()

    for tensor in outputs(result):
        if tensor.requires_grad:
            tensor.register_hook(back)
