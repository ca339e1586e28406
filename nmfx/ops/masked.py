"""Linear and convolution on a masked weight, for eager training: one autograd node for the pair.

    out = linear(x, sr_ste(w))      as two nodes the linear keeps the masked weight until backward:
                                    a copy of every weight, each in fresh memory
                                    as one node only `x` and `w` are kept, as in a dense model; the
                                    masked weight is a buffer that the next layer uses again, and
                                    the decay is added to the new gradient in place

Values and gradients are those of the two nodes. Graphs, compilers, torch.func transforms, tensor
subclasses and whoever watches torch functions get the two nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .keep import keep, keep_, project_kept
from .sharded import is_sharded
from .sr_ste import ABI, add_decay_, gradient, in_transform, project, sr_ste

_PLAIN = (Tensor, torch.nn.Parameter)
_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


def masked_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, side: Tensor, m: int, dim: int
) -> Tensor:
    """`F.linear(input, w~, bias)` with the masked `weight` (out, in).

    Args:
        input: (..., in).
        weight, m, dim: as in `nmfx.sr_ste`.
        bias: (out,) or None.
        side: the control tensor of `sr_ste`, or the bool mask of `keep` (m and dim do not count).
    """
    return _run(_Linear, F.linear, input, weight, bias, side, m, dim)


def masked_addmm(
    bias: Tensor, input: Tensor, weight: Tensor, side: Tensor, m: int, dim: int
) -> Tensor:
    """`torch.addmm(bias, input, w~)`, `weight` (in, out). Arguments as in `masked_linear`."""
    return _run(_Addmm, _addmm, input, weight, bias, side, m, dim)


def masked_conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    side: Tensor,
    m: int,
    dim: int,
) -> Tensor:
    """`F.conv{dims}d(input, w~, bias, stride, padding, dilation, groups)`.

    Arguments as in `masked_linear`; `weight` is (out, in / groups, *kernel).
    """
    conv, rest = _CONV[dims - 1], (stride, padding, dilation, groups)
    watched = has_torch_function_variadic(input, weight)
    if watched or isinstance(padding, str) or input.ndim != weight.ndim:
        return conv(input, _mask(weight, side, m, dim), bias, *rest)
    return _run(_Conv, conv, input, weight, bias, side, m, dim, *rest)


for _function in (masked_linear, masked_addmm, masked_conv):
    _function.__module__ = "nmfx"  # generated code reads `nmfx_masked_linear(...)`


def _mask(weight: Tensor, side: Tensor, m: int, dim: int) -> Tensor:
    return keep(weight, side) if side.dtype is torch.bool else sr_ste(weight, side, m, dim)


def _compiled_mask(weight: Tensor, side: Tensor, m: int, dim: int) -> Tensor:
    """The masked weight as a node of a compiled graph, in the dtype that autocast would ask for.

    So a kernel that the graph calls writes it in that dtype, and its gradient is read as it comes:
    the float32 of neither is ever in memory.
    """
    device = weight.device.type
    if (
        side.dtype is torch.bool
        or weight.dtype is not torch.float32
        or is_sharded(weight)
        or torch.compiler.is_exporting()  # the user's to see: as in eager, two nodes
        or not torch.is_autocast_enabled(device)
    ):
        return _mask(weight, side, m, dim)
    dtype = torch.get_autocast_dtype(device)
    return torch.ops.nmfx.sr_ste.default(weight, side, m, dim, ABI, dtype)


def _addmm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, input, weight)


def _run(
    node: type[_Masked],
    consume: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    side: Tensor,
    m: int,
    dim: int,
    *rest: Any,
) -> Tensor:
    if torch.compiler.is_compiling():
        return consume(input, _compiled_mask(weight, side, m, dim), bias, *rest)
    if (
        has_torch_function_variadic(input, weight)
        or in_transform()
        or type(weight) not in _PLAIN
        or type(input) not in _PLAIN
        or side.is_cpu is not weight.is_cpu  # a wrapper moved the weight by itself
        or torch._C._get_tracing_state() is not None  # torch.jit.trace records operators only
    ):
        return consume(input, _mask(weight, side, m, dim), bias, *rest)
    dtype = None
    if (
        torch._C._is_any_autocast_enabled()  # a tenth of the time of the question for one device
        and torch.is_autocast_enabled(weight.device.type)
        and weight.dtype is not torch.float64  # which autocast leaves alone
    ):
        # What autocast would do, but for the weight in the pass that masks it.
        target = torch.get_autocast_dtype(weight.device.type)
        if weight.dtype is torch.float32:
            dtype = target
        elif weight.dtype is not target:
            return consume(input, _mask(weight, side, m, dim), bias, *rest)
        input, bias = input.to(target), None if bias is None else bias.to(target)
    if (
        not torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()  # enable_grad changes nothing there
        or not (
            input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
    ):
        return consume(input, _masked(weight, side, m, dim, dtype), bias, *rest)
    return node.call(input, weight, bias, side, (node, consume, m, dim, dtype, rest))


def _masked(weight: Tensor, side: Tensor, m: int, dim: int, dtype: torch.dtype | None) -> Tensor:
    """The masked weight, without autograd."""
    if side.dtype is torch.bool:
        out = project_kept(weight, side, dtype)
    else:
        out = project(weight, side, m, dim, dtype)
    if weight.requires_grad:
        # torch.matmul, which is a linear without bias or of a transposed input, makes one product
        # of a batch's rows only if the weight says that it wants gradients, and one product rounds
        # unlike several. Nothing is recorded: gradients are off here.
        out.requires_grad_()
    return out


class _Masked(torch.autograd.Function):
    """Base of the nodes: they differ in how the gradients of a product are found."""

    call: Callable[..., Tensor]
    needs_input = False  # even where the weight asks for no gradient

    def __init_subclass__(cls) -> None:
        # `apply` without what it does for torch.func, which `_run` has ruled out: 2 us.
        cls.call = super(torch.autograd.Function, cls).apply  # type: ignore[misc]

    # Static, with the class among the constants: compiled autograd takes no class methods.
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        side: Tensor,
        constants: tuple[Any, ...],
    ) -> Tensor:
        node, consume, m, dim, dtype, rest = constants
        kept = input if weight.requires_grad or node.needs_input else None
        ctx.save_for_backward(kept, weight, side)
        ctx.constants = constants
        out: Tensor = consume(input, _masked(weight, side, m, dim, dtype), bias, *rest)
        if out._is_view():
            # F.linear of a batch with a bias, a convolution without one: what it is a view of is
            # nobody's, but autograd lets no one change a view from in here in place.
            out = torch.ops.aten._unsafe_view.default(out, out.shape)
        return out

    @staticmethod
    def gradients(
        ctx: Any, grad: Tensor, input: Tensor | None, masked: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the input, the masked weight and the bias, None where nobody asks for it."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight, side = ctx.saved_tensors
        node, _, m, dim, dtype, _ = ctx.constants
        again = torch.is_grad_enabled()  # create_graph: all must be differentiable
        masked = None
        if ctx.needs_input_grad[0] or node.needs_input:
            if again:
                masked = _mask(weight, _without_decay(side), m, dim)
                masked = masked if dtype is None else masked.to(dtype)
            else:
                masked = _masked(weight, side, m, dim, dtype)
        grad_input, grad_weight, grad_bias = node.gradients(ctx, grad, input, masked)
        del masked  # its memory may serve the next
        if ctx.needs_input_grad[1]:
            assert grad_weight is not None
            in_place = not again and not in_transform()  # tangents need operators that torch knows
            grad_weight = _through_mask(grad_weight, weight, side, m, dim, in_place)
        return grad_input, grad_weight, grad_bias, None, None


def _without_decay(side: Tensor) -> Tensor:
    """What a backward with `create_graph` masks the weight with once more.

    The decay belongs to the call: a second derivative finds it at the node of the forward.
    """
    return side if side.dtype is torch.bool else side * side.new_tensor([0.0, 1.0])


def _through_mask(
    grad: Tensor, weight: Tensor, side: Tensor, m: int, dim: int, in_place: bool
) -> Tensor:
    """The gradient of the weight from that of the masked weight, which nobody else refers to."""
    frozen = side.dtype is torch.bool
    if in_place and grad.dtype == weight.dtype:
        if frozen:
            keep_(grad, side)
        else:
            add_decay_(grad, weight, side, m, dim)
        return grad
    if frozen:
        return torch.where(side, grad.to(weight.dtype), 0.0)
    return gradient(grad, weight, side, m, dim)


class _Linear(_Masked):
    @staticmethod
    def gradients(ctx: Any, grad: Tensor, input: Any, masked: Any) -> Any:
        rows = grad.reshape(-1, grad.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = (rows @ masked).view(*grad.shape[:-1], masked.shape[1])
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ input.reshape(-1, input.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_input, grad_weight, grad_bias


class _Addmm(_Masked):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.bias_shape = args[2].shape
        return _Masked.forward(ctx, *args)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor, input: Any, masked: Any) -> Any:
        grad_input = grad @ masked.t() if ctx.needs_input_grad[0] else None
        grad_weight = input.t() @ grad if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias


class _Conv(_Masked):
    needs_input = True  # torch finds all gradients in one call

    @staticmethod
    def gradients(ctx: Any, grad: Tensor, input: Any, masked: Any) -> Any:
        stride, padding, dilation, groups = ctx.constants[-1]
        dims = masked.ndim - 2

        def each(value: Any) -> list[int]:
            return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))

        return torch.ops.aten.convolution_backward.default(
            grad,
            input,
            masked,
            [masked.shape[0]] if ctx.needs_input_grad[2] else None,
            each(stride),
            each(padding),
            each(dilation),
            False,
            [0] * dims,
            groups,
            list(ctx.needs_input_grad[:3]),
        )
