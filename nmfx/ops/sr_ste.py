"""nmfx::sr_ste: the N:M projection of a weight with the SR-STE gradient.

    forward   w~ = w where the N:M mask holds, else +0.0
    backward  dL/dw = g + lambda_W * (1 - mask) * w         (g = dL/dw~, passed straight through)

lambda_W = 0 is the plain straight-through estimator (STE). Reference: arXiv 2102.04010.

The schedule lives in `control`, a float64 tensor [lambda_W, N]: a compiled graph takes it as an
input, so changing either recompiles nothing. A change *replaces* the tensor (see capture/site.py)
instead of writing into it, so the backward of an earlier forward still sees the values it ran with.

What each layer of torch sees:

    eager              one dispatch, kernels/rank.py
    fx, Dynamo, export one node nmfx::sr_ste
    AOTAutograd        the pointwise formula in place of the node (`_decompose`), so that Inductor
                       fuses it and recomputes the mask in backward instead of saving it
    functorch          an autograd.Function with a generated vmap rule (`_Functorch`)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..kernels.rank import rank_eager, rank_pointwise

# Compiled graphs are cached on disk by the calls they contain, not by what `_decompose` turns them
# into: raise this number whenever a formula below changes, or stale code is loaded.
ABI = 1

_library = torch.library.Library("nmfx", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "sr_ste(Tensor weight, Tensor control, int m, int dim, int abi) -> Tensor", tags=_tags
)
_library.define(
    "sr_ste_backward(Tensor grad, Tensor weight, Tensor masked, Tensor control, int abi) -> Tensor",
    tags=_tags,
)


def make_control(lambda_w: float, n: int, device: torch.device | str | None = None) -> Tensor:
    """The `control` tensor of `sr_ste`: float64 [lambda_W, N]. float64 holds both exactly."""
    with torch.inference_mode(False):  # autograd must be able to save it, wherever it was set
        return torch.tensor([lambda_w, n], dtype=torch.float64, device=device)


def sr_ste(weight: Tensor, control: Tensor, m: int, dim: int) -> Tensor:
    """The weight with all but the N largest magnitudes of every group of M replaced by +0.0.

    The gradient with respect to `weight` is `g + lambda_W * (1 - mask) * weight`, once per call;
    forward-mode derivatives pass the tangent straight through. Group rules as in `nmfx.mask`.

    Args:
        weight: float16/32/64 or bfloat16, any dense layout, `weight.shape[dim] % m == 0`.
        control: float64 [lambda_W, N], see `make_control`.
        m: group length M.
        dim: the grouped dimension.

    Returns:
        A new tensor with the shape, strides and dtype of `weight`.

    Reference: arXiv 2102.04010.
    """
    if has_torch_function_unary(weight):  # fx proxies record this call as one node
        return handle_torch_function(sr_ste, (weight,), weight, control, m, dim)
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        return _Functorch.apply(weight, control, m, dim)
    return torch.ops.nmfx.sr_ste(weight, control, m, dim, ABI)


# fx prints a function as module_name: this makes generated code read `nmfx_sr_ste(...)`, and the
# name is importable as such.
sr_ste.__module__ = "nmfx"


# --- the formulas ----------------------------------------------------------------------------


def _kept(ranks: Tensor, control: Tensor) -> Tensor:
    return ranks < control[1].to(torch.int8)


def _forward_eager(weight: Tensor, control: Tensor, m: int, dim: int, abi: int) -> Tensor:
    control = control.to(weight.device)  # no copy unless a wrapper moved the weight by itself
    kept = _kept(rank_eager(weight, m, dim), control)
    out = torch.empty_like(weight)
    return torch.where(
        kept, weight, torch.zeros((), dtype=weight.dtype, device=weight.device), out=out
    )


def _forward_pointwise(weight: Tensor, control: Tensor, m: int, dim: int, abi: int) -> Tensor:
    kept = _kept(rank_pointwise(weight, m, dim), control.to(weight.device))
    return torch.where(kept, weight, 0.0)


def _backward(grad: Tensor, weight: Tensor, masked: Tensor, control: Tensor, abi: int) -> Tensor:
    # No mask is needed: a kept weight that is exactly zero takes the decayed branch, where its
    # decay is lambda * 0. Half precision is rounded once, at the end.
    wide = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
    lambda_w = control[0].to(weight.device, wide)
    decayed = (grad.to(wide) + lambda_w * weight.to(wide)).to(weight.dtype)
    return torch.where(masked == 0, decayed, grad)


def _like_weight(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


_library.impl("sr_ste", _forward_eager, "CompositeExplicitAutograd")
_library.impl("sr_ste_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("nmfx::sr_ste", _like_weight, lib=_library)
torch.library.register_fake(
    "nmfx::sr_ste_backward", lambda grad, weight, *_: torch.empty_like(weight), lib=_library
)


# --- autograd: the backward is an op of its own, so that compilers see it whole ----------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, control, *_ = inputs
    ctx.save_for_backward(weight, output, control)  # `output` is held by the consumer anyway


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, masked, control = ctx.saved_tensors
    # Detached, because a graph of this gradient would lead back through `masked` into this very
    # function, with a gradient of zero, and count the decay again.
    result = torch.ops.nmfx.sr_ste_backward(grad, weight, masked.detach(), control, ABI)
    return result, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, masked, control, _ = inputs
    ctx.save_for_backward(masked, control)


def _grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    masked, control = ctx.saved_tensors
    wide = torch.promote_types(grad.dtype, torch.float32)
    scaled = (control[0].to(grad.device, wide) * grad.to(wide)).to(grad.dtype)
    return grad, torch.where(masked == 0, scaled, 0.0), None, None, None


torch.library.register_autograd("nmfx::sr_ste", _grad, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "nmfx::sr_ste_backward", _grad_backward, setup_context=_save_backward, lib=_library
)


# --- functorch ---------------------------------------------------------------------------------


class _Functorch(torch.autograd.Function):
    """The same op for torch.func transforms and forward-mode AD, which skip `register_autograd`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, control: Tensor, m: int, dim: int) -> Tensor:
        return torch.ops.nmfx.sr_ste(weight, control, m, dim, ABI)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, control, *_ = inputs
        ctx.save_for_backward(weight, output, control)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, masked, control = ctx.saved_tensors
        return _backward(grad, weight, masked, control, ABI), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return tangent.clone()  # straight through, like the backward


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    weight: Tensor,
    control: Tensor,
    m: int,
    dim: int,
    abi: int,
) -> tuple[Tensor, int]:
    weight_dim, control_dim = in_dims[:2]
    if control_dim is None and weight_dim is not None:
        dim %= weight.ndim - 1
        batched = torch.ops.nmfx.sr_ste(weight.movedim(weight_dim, 0), control, m, dim + 1, abi)
        return batched, 0
    # One schedule per model of an ensemble.
    weights = [weight] * info.batch_size if weight_dim is None else weight.unbind(weight_dim)
    controls = [control] * info.batch_size if control_dim is None else control.unbind(control_dim)
    calls = zip(weights, controls, strict=True)
    return torch.stack([torch.ops.nmfx.sr_ste(w, c, m, dim, abi) for w, c in calls]), 0


torch.library.register_vmap("nmfx::sr_ste", _vmap, lib=_library)


# --- compilers ---------------------------------------------------------------------------------


def _install_decompositions() -> str | None:
    """Lets AOTAutograd see the formulas instead of the ops; returns why not, if it cannot.

    `register_torch_dispatch` on FunctionalTensorMode is the one place that is after Dynamo and
    export (which keep one node) and before partitioning (which decides what backward saves).
    Without it the ops still compile, as opaque calls to the eager kernel.
    """
    try:
        import torch.fx.traceback as traceback
        from torch._subclasses.functional_tensor import FunctionalTensorMode
        from torch.utils.checkpoint import CheckpointPolicy
    except ImportError as error:  # private modules: they may move
        return f"torch {torch.__version__} has no {error.name}; nmfx::sr_ste compiles unfused"

    # One recomputation region for all weights (torch counts its own from 0): with one for each,
    # the constants that several weights share would be saved as a boundary between regions.
    region = 1 << 20

    def decompose(formula: Any, recompute: bool) -> Any:
        def rule(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.compiler.is_exporting():
                return mode.__torch_dispatch__(op, types, args, kwargs or {})
            # Tag the nodes of the forward so that the partitioner recomputes the mask in backward
            # and saves nothing, unless the user's own checkpointing has tagged them already.
            meta = traceback.current_meta
            tag = recompute and meta.get("recompute") is None
            if tag:
                meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                meta["ac_graph_id"] = region
            try:
                with mode:
                    return formula(*args, **(kwargs or {}))
            finally:
                if tag:
                    del meta["recompute"], meta["ac_graph_id"]

        return rule

    for name, formula, recompute in (
        ("nmfx::sr_ste", _forward_pointwise, True),
        ("nmfx::sr_ste_backward", _backward, False),
    ):
        torch.library.register_torch_dispatch(
            name, FunctionalTensorMode, decompose(formula, recompute), lib=_library
        )
    return None


# None, or the reason why compiled models call the eager kernel.
UNFUSED_REASON = _install_decompositions()
