"""nmfx::sr_ste: the N:M projection of a weight with the SR-STE gradient.

    forward   w~ = w where the N:M mask holds, else +0.0
    backward  dL/dw = g + lambda_W * (1 - mask) * w         (g = dL/dw~, passed straight through)

lambda_W = 0 is the plain straight-through estimator (STE). Reference: arXiv 2102.04010.

The schedule lives in `control`, a float64 tensor [lambda_W, N]: a compiled graph takes it as an
input, so changing either recompiles nothing. A change *replaces* the tensor (see capture/site.py)
instead of writing into it, so the backward of an earlier forward still sees the values it ran with.

The backward finds the mask again from the weight, which is there anyway: nothing else is kept.

What each layer of torch sees:

    eager              one autograd node; native kernels on CPU, Triton's on GPUs (ops/cuda.py),
                       else plain torch (kernels/rank.py)
    fx, Dynamo, export one node nmfx::sr_ste
    AOTAutograd        on CPU the ops, as the native kernels outrun what Inductor generates; on
                       other devices the pointwise formulas in their place, which Inductor fuses
                       (compiled.py). The mask is computed again in backward, never saved
    functorch          an autograd.Function with a generated vmap rule (`_Functorch`)
    DTensor            nothing: each rank calls the op for its part (sharded.py)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..kernels.rank import rank_eager, rank_pointwise
from .forward_mode import in_forward_mode
from .sharded import is_sharded, on_parts

# Compiled graphs are cached on disk by the calls they contain, not by what `_decompose` turns them
# into: raise this number whenever a formula below changes, or stale code is loaded.
ABI = 4

_PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("nmfx", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "sr_ste(Tensor weight, Tensor control, int m, int dim, int abi, ScalarType? dtype=None)"
    " -> Tensor",
    tags=_tags,
)
# The same without a gradient: the autograd kernel of the other takes 4 us, wanted or not.
_library.define(
    "sr_ste_project(Tensor weight, Tensor control, int m, int dim, ScalarType? dtype=None)"
    " -> Tensor",
    tags=_tags,
)
_library.define(
    "sr_ste_backward(Tensor grad, Tensor weight, Tensor control, int m, int dim, int abi)"
    " -> Tensor",
    tags=_tags,
)
_library.define(  # without a gradient
    "sr_ste_gradient(Tensor grad, Tensor weight, Tensor control, int m, int dim, int abi)"
    " -> Tensor",
    tags=_tags,
)
_library.define(
    "sr_ste_decay_(Tensor(a!) grad, Tensor weight, Tensor control, int m, int dim, int abi) -> ()",
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
    if type(weight) not in _PLAIN and is_sharded(weight):
        return on_parts(lambda part: sr_ste(part, control, m, dim), m, dim, weight)
    if not torch.compiler.is_compiling() and in_transform():
        return _Functorch.apply(weight, control, m, dim)
    if (
        torch.compiler.is_compiling()
        or type(weight) not in _PLAIN
        or torch._C._get_tracing_state() is not None  # torch.jit.trace records operators only
    ):
        return torch.ops.nmfx.sr_ste.default(weight, control, m, dim, ABI)
    if weight.requires_grad and torch.is_grad_enabled():
        return _Eager.apply(weight, control, m, dim)
    return project(weight, control, m, dim)


def project(
    weight: Tensor, control: Tensor, m: int, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    """`sr_ste` without autograd. Arguments as there.

    Args:
        dtype: of the result: that of the weight, or a narrower one to which kept float32 values
            are rounded in the same pass.
    """
    return torch.ops.nmfx.sr_ste_project.default(weight, control, m, dim, dtype)


def add_decay_(grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int) -> None:
    """Adds `lambda_W * (1 - mask) * weight` to `grad` in place: one pass, no autograd.

    Arguments as in `sr_ste`; `grad` has the shape of `weight`.
    """
    torch.ops.nmfx.sr_ste_decay_.default(grad, weight, control, m, dim, ABI)


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode AD is running, which need other rules."""
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


# fx prints a function as module_name: this makes generated code read `nmfx_sr_ste(...)`, and the
# name is importable as such.
sr_ste.__module__ = "nmfx"


# --- the formulas ----------------------------------------------------------------------------


def _kept(ranks: Tensor, control: Tensor) -> Tensor:
    # No copy unless a wrapper moved the weight by itself.
    return ranks < control[1].to(ranks.device, torch.int8)


def _decayed(grad: Tensor, weight: Tensor, control: Tensor) -> Tensor:
    """Grad + lambda * weight. Half precision is rounded once, at the end."""
    wide = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
    lambda_w = control[0].to(weight.device, wide)
    return (grad.to(wide) + lambda_w * weight.to(wide)).to(weight.dtype)


def _forward_eager(
    weight: Tensor,
    control: Tensor,
    m: int,
    dim: int,
    abi: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    kept = _kept(rank_eager(weight, m, dim), control)
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    out = torch.where(kept, weight, zero, out=torch.empty_like(weight))
    return out if dtype is None else out.to(dtype)


def _project_eager(
    weight: Tensor, control: Tensor, m: int, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    return _forward_eager(weight, control, m, dim, ABI, dtype)


def forward_pointwise(
    weight: Tensor,
    control: Tensor,
    m: int,
    dim: int,
    abi: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`sr_ste` as operators that a compiler fuses into one loop."""
    out = torch.where(_kept(rank_pointwise(weight, m, dim), control), weight, 0.0)
    return out if dtype is None else out.to(dtype)


def _backward_eager(
    grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int, abi: int
) -> Tensor:
    kept, decayed = _kept(rank_eager(weight, m, dim), control), _decayed(grad, weight, control)
    return torch.where(kept, grad.to(weight.dtype), decayed, out=torch.empty_like(weight))


def backward_pointwise(
    grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int, abi: int
) -> Tensor:
    """`sr_ste_backward` as operators that a compiler fuses into one loop."""
    kept = _kept(rank_pointwise(weight, m, dim), control)
    return torch.where(kept, grad.to(weight.dtype), _decayed(grad, weight, control))


def _decay_eager(grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int, abi: int) -> None:
    grad.copy_(_backward_eager(grad, weight, control, m, dim, abi))


def _like_weight(
    weight: Tensor,
    control: Tensor,
    m: int,
    dim: int,
    abi: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


_library.impl("sr_ste", _forward_eager, "CompositeExplicitAutograd")
_library.impl("sr_ste_project", _project_eager, "CompositeExplicitAutograd")
_library.impl("sr_ste_backward", _backward_eager, "CompositeExplicitAutograd")
_library.impl("sr_ste_gradient", _backward_eager, "CompositeExplicitAutograd")
_library.impl("sr_ste_decay_", _decay_eager, "CompositeExplicitAutograd")
torch.library.register_fake("nmfx::sr_ste", _like_weight, lib=_library)
torch.library.register_fake(
    "nmfx::sr_ste_project",
    lambda weight, control, m, dim, dtype=None: torch.empty_like(weight, dtype=dtype),
    lib=_library,
)
for _name in ("sr_ste_backward", "sr_ste_gradient"):
    torch.library.register_fake(
        f"nmfx::{_name}", lambda grad, weight, *_: torch.empty_like(weight), lib=_library
    )
torch.library.register_fake("nmfx::sr_ste_decay_", lambda *_: None, lib=_library)


# --- autograd: the backward is an op of its own, so that compilers see it whole ----------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, control, ctx.m, ctx.dim, *_ = inputs
    ctx.save_for_backward(weight, control)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, control = ctx.saved_tensors
    return gradient(grad, weight, control, ctx.m, ctx.dim), None, None, None, None, None


def gradient(grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int) -> Tensor:
    """The gradient of `weight` from that of `sr_ste(weight, ...)`, itself differentiable."""
    if in_forward_mode():
        return _composed(grad, weight, control, m, dim)
    return torch.ops.nmfx.sr_ste_backward.default(grad, weight, control, m, dim, ABI)


def _composed(grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int) -> Tensor:
    kept = _kept(rank_pointwise(weight.detach(), m, dim), control)
    return torch.where(kept, grad.to(weight.dtype), _decayed(grad, weight, control))


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, control, ctx.m, ctx.dim, _ = inputs
    ctx.grad_dtype = grad.dtype
    ctx.save_for_backward(weight, control)


def _grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, control = ctx.saved_tensors
    kept = _kept(rank_eager(weight.detach(), ctx.m, ctx.dim), control)
    wide = torch.promote_types(grad.dtype, torch.float32)
    scaled = (control[0].to(grad.device, wide) * grad.to(wide)).to(grad.dtype)
    return grad.to(ctx.grad_dtype), torch.where(kept, 0.0, scaled), None, None, None, None


torch.library.register_autograd("nmfx::sr_ste", _grad, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "nmfx::sr_ste_backward", _grad_backward, setup_context=_save_backward, lib=_library
)


class _Eager(torch.autograd.Function):
    """The same once more, for calls that no compiler and no transform is watching."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, control: Tensor, m: int, dim: int) -> Tensor:
        ctx.save_for_backward(weight, control)
        ctx.m, ctx.dim = m, dim
        return project(weight, control, m, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _grad(ctx, grad)[:4]


# --- functorch ---------------------------------------------------------------------------------


class _Functorch(torch.autograd.Function):
    """The same op for torch.func transforms and forward-mode AD, which skip `register_autograd`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, control: Tensor, m: int, dim: int) -> Tensor:
        return torch.ops.nmfx.sr_ste(weight, control, m, dim, ABI)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, control, ctx.m, ctx.dim = inputs
        ctx.save_for_backward(weight, control)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, control = ctx.saved_tensors
        return _composed(grad, weight, control, ctx.m, ctx.dim), None, None, None

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
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, int]:
    weight_dim, control_dim = in_dims[:2]
    if control_dim is None and weight_dim is not None:
        dim %= weight.ndim - 1
        weight = weight.movedim(weight_dim, 0)
        return torch.ops.nmfx.sr_ste(weight, control, m, dim + 1, abi, dtype), 0
    # One schedule per model of an ensemble.
    weights = [weight] * info.batch_size if weight_dim is None else weight.unbind(weight_dim)
    controls = [control] * info.batch_size if control_dim is None else control.unbind(control_dim)
    calls = zip(weights, controls, strict=True)
    return torch.stack([torch.ops.nmfx.sr_ste(w, c, m, dim, abi, dtype) for w, c in calls]), 0


torch.library.register_vmap("nmfx::sr_ste", _vmap, lib=_library)
