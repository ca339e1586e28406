"""What compilers make of nmfx::sr_ste: a call of the native kernels, or the formula, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import cpu, triton
from .sr_ste import backward_pointwise, forward_pointwise

# On an H200 a kernel outruns Inductor's loop at 4:8 already (0.11 ms against 0.25, 8192 x 8192),
# but each call passes through the host: whole steps were 2 to 5 % slower by calls at M = 4 and 8,
# and 1:16 cost 0 to 2 % by calls (benchmarks/results/train_step_nvidia-h200_202611.md).
GPU_KERNELS_FROM_M = 16

# One recomputation region for all weights (torch counts its own from 0): with one for each, the
# constants that several weights share would be saved as a boundary between regions.
_REGION = 1 << 20


def _outruns_inductor(weight: Tensor, m: int) -> bool:
    """Whether our kernels are there for this weight and beat the loop that Inductor makes.

    That loop compares all pairs of a group. On the CPU it takes 16 to 150 times as long as a copy
    of the weight, where the native kernels take 1.0 to 1.5 (benchmarks/results/mask_*.md).
    """
    if weight.device.type == "cpu":
        return cpu.isa() is not None
    return m >= GPU_KERNELS_FROM_M and triton.why_not(weight, m) is None


def _forward_kernel(
    weight: Tensor,
    control: Tensor,
    m: int,
    dim: int,
    abi: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`sr_ste`, called. Autograd is above: the op without a gradient is the faster call."""
    return torch.ops.nmfx.sr_ste_project.default(weight, control, m, dim, dtype)


def _backward_kernel(
    grad: Tensor, weight: Tensor, control: Tensor, m: int, dim: int, abi: int
) -> Tensor:
    """`sr_ste_backward`, called."""
    # A new tensor. In place (sr_ste_decay_ on a copy that Inductor drops) is not
    # safe in torch 2.13: where the gradient is a view into a larger buffer the op is handed the
    # start of that buffer, and where it is that of a convolution the scheduler has a KeyError.
    return torch.ops.nmfx.sr_ste_gradient.default(grad, weight, control, m, dim, abi)


def _install() -> str | None:
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

    def rule_for(
        formula: Callable[..., Tensor],
        kernel: Callable[..., Tensor],
        weight_position: int,
        recompute: bool,
    ) -> Any:
        def rule(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if torch.compiler.is_exporting():
                return mode.__torch_dispatch__(op, types, args, kwargs)
            # Tag the nodes of the forward so that the partitioner recomputes the mask in backward
            # and saves nothing, unless the user's own checkpointing has tagged them already.
            meta = traceback.current_meta
            tag = recompute and meta.get("recompute") is None
            if tag:
                meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                meta["ac_graph_id"] = _REGION
            try:
                called = _outruns_inductor(args[weight_position], args[weight_position + 2])
                with mode:
                    return (kernel if called else formula)(*args, **kwargs)
            finally:
                if tag:
                    del meta["recompute"], meta["ac_graph_id"]

        return rule

    rules = {
        "sr_ste": rule_for(forward_pointwise, _forward_kernel, 0, recompute=True),
        "sr_ste_backward": rule_for(backward_pointwise, _backward_kernel, 1, recompute=False),
    }
    for name, rule in rules.items():
        torch.library.register_torch_dispatch(f"nmfx::{name}", FunctionalTensorMode, rule)
    return None


# None, or the reason why compiled models call the eager kernel.
UNFUSED_REASON = _install()
