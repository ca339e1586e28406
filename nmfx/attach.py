"""The SR-STE decay once per optimizer step, instead of once per use inside backward.

Inside backward (the paper's form) the decay is multiplied by accumulation steps, by weight reuse
and by DDP ranks, divided by a loss scale and shrunk by gradient clipping. `attach` moves it to the
last moment before the update, where none of these reach it:

    backward ... backward -> unscale -> clip -> [ grad += lambda * (1 - mask) * weight ] -> update
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .capture.refs import SiteRef, sites_of
from .capture.sharding import fsdp_modules, reshard
from .capture.site import SITES
from .errors import NMError
from .ops.sharded import is_sharded, with_whole_groups
from .ops.sr_ste import add_decay_, make_control


class Attachment:
    """The decay of some layers, applied by one optimizer; made by `nmfx.attach`."""

    def __init__(
        self, refs: list[SiteRef], optimizer: torch.optim.Optimizer, sharded: list[Any]
    ) -> None:
        self._refs, self._sharded = refs, sharded
        for ref in refs:
            ref.site.attached = self
            ref.refresh_control()
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        # Without this, an optimizer that is thrown away would take the decay with it.
        weakref.finalize(optimizer, self.remove).atexit = False

    @property
    def parameters(self) -> list[str]:
        """Names of the weights whose decay this optimizer applies."""
        return [ref.name for ref in self._live()]

    def remove(self) -> None:
        """Moves the decay back inside backward. Calling it again does nothing."""
        self._hook.remove()
        for ref in self._live():
            ref.site.attached = None
            ref.refresh_control()
        self._refs = []

    def _live(self) -> list[SiteRef]:
        # Unsparsified, lowered, or attached to a later optimizer: no longer ours.
        return [
            ref
            for ref in self._refs
            if ref.site.attached is self
            and any(ref.site is site for site in ref.store.__dict__.get(SITES, ()))
        ]

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # torch passes the optimizer itself as args[0].
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._add_decay(optimizer)
            return None
        # The closure zeroes and refills the gradients after this hook, perhaps several times.
        wrapped = self._with_decay(closure, optimizer)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _with_decay(self, closure: Callable, optimizer: torch.optim.Optimizer) -> Callable:
        def wrapped() -> Any:
            loss = closure()
            self._add_decay(optimizer)
            return loss

        return wrapped

    @torch.no_grad()
    def _add_decay(self, optimizer: torch.optim.Optimizer) -> None:
        # Fused optimizers divide by the loss scale themselves; GradScaler lends it for the step.
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        controls: dict[tuple[float, int, torch.device], Tensor] = {}
        for module in self._sharded:  # FSDP2 may have been told to keep gathered weights
            module.reshard()
        tied = {id(ref.parameter): ref for ref in self._live()}
        for ref in tied.values():  # each weight once, also where several layers share it
            weight, site = ref.parameter, ref.site
            if weight.grad is None or site.state != "sparse" or site.lambda_w == 0.0:
                continue
            key = site.lambda_w, site.pattern.n, weight.device
            if key not in controls:
                controls[key] = make_control(*key)
                if scale is not None:
                    controls[key][0].mul_(scale.to(weight.device))
            if is_sharded(weight):
                _add_to_parts(weight, controls[key], site.pattern.m, site.dim)
            else:
                add_decay_(weight.grad, weight, controls[key], site.pattern.m, site.dim)


def _add_to_parts(weight: Any, control: Tensor, m: int, dim: int) -> None:
    """`add_decay_` to the gradient of a DTensor, by each rank for its part."""
    whole, grad = with_whole_groups(weight.detach(), m, dim), weight.grad
    placements = tuple(whole.placements)
    if placements == tuple(weight.placements) == tuple(grad.placements):
        add_decay_(grad.to_local(), whole.to_local(), control, m, dim)
        return
    # Groups that lie on several ranks, or a gradient that ranks have yet to sum.
    grad = grad.redistribute(placements=placements)
    add_decay_(grad.to_local(), whole.to_local(), control, m, dim)
    weight.grad = grad.redistribute(placements=weight.placements)


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, or the one that a wrapper (accelerate, Lightning) steps.

    Such a wrapper claims to be an Optimizer, but is without the hooks of one.

    Raises:
        NMError: it has none, and no optimizer inside.
    """
    while "_optimizer_step_pre_hooks" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or inner is optimizer:
            raise NMError(
                f"{type(optimizer).__name__} has no step hooks, and no torch optimizer as its "
                f".optimizer; attach the one that it steps"
            )
        optimizer = inner
    return optimizer


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> Attachment:
    """Applies the SR-STE decay once per step of `optimizer`, instead of inside every backward.

    The gradient that reaches the update holds `lambda_w * (1 - mask) * weight` exactly once, under
    gradient accumulation, clipping, `torch.amp.GradScaler` and a step with a closure. Momentum,
    weight decay and learning rate act on it as on the rest of the gradient. Weights that the
    optimizer does not own keep their decay inside backward. Copies of the model (deepcopy, pickle)
    are not attached.

    Attaching again, to this or another optimizer, replaces the earlier attachment. When the
    optimizer is deleted, the decay moves back inside backward.

    Args:
        model: a sparsified model.
        optimizer: any `torch.optim.Optimizer` that owns some of its sparsified weights, also as
            accelerate or Lightning wrap it.

    Returns:
        A handle; `handle.remove()` moves the decay back inside backward.

    Raises:
        NMError: no sparsified layer, no optimizer, or one that owns none of the weights.
    """
    refs = sites_of(model, "attach")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise NMError(f"nmfx.attach takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
    optimizer = innermost(optimizer)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    reshard(model)  # optimizers own shards
    refs = [ref for ref in refs if id(ref.parameter) in owned]
    if not refs:
        raise NMError(
            f"{type(optimizer).__name__} owns none of the sparsified weights; attach the optimizer "
            f"that was built from model.parameters()"
        )
    return Attachment(refs, optimizer, fsdp_modules(model))
