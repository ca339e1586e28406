"""Everything that can run a module, behind one call: `build(name, module, x, threads)`.

Each peer gives back a callable without arguments, or raises `Unavailable` with the reason that
the tables show. The engines outside torch are in `engines.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from compiling import compiled
from torch import Tensor, nn

import nmfx
import nmfx.packing
from nmfx import Pattern
from nmfx.huge_pages import huge_copy

Call = Callable[[], Any]
# What a user of torch has without other engines: "best dense" is the best of these.
DENSE = ("eager", "compile", "max-autotune", "onednn", "mkl")


class Unavailable(Exception):
    """This peer cannot run this module here; the text says why."""


def packed_linear(
    weight: Tensor, bias: Tensor | None, pattern: str, scales: list[float]
) -> list[Callable[[Tensor], Tensor]]:
    """Linear layers of nmfx with the weights `scale * weight`, each in memory of its own.

    In huge pages, as `nmfx.lower` stores them. The only place that knows the signature of the
    kernel. Packed once, because that is slow.
    """
    parsed = Pattern.parse(pattern)
    values, index = nmfx.packing.pack(weight, parsed)
    shape = tuple(weight.shape)

    def layer(scale: float) -> Callable[[Tensor], Tensor]:
        own = huge_copy(values * scale), huge_copy(index)
        return lambda x: nmfx.linear_nm(x, *own, bias, *shape, parsed.n, parsed.m)

    return [layer(scale) for scale in scales]


def packed_conv(conv: nn.Conv2d, pattern: str) -> Callable[[Tensor], Tensor]:
    """A convolution of nmfx. The only place that knows the signature of its kernel."""
    parsed = Pattern.parse(pattern)
    weight = conv.weight.detach()
    packed = nmfx.packing.pack_conv(weight, conv.groups, parsed)
    where = (conv.stride, conv.padding, conv.dilation, conv.groups, tuple(weight.shape))
    bias = None if conv.bias is None else conv.bias.detach()
    return lambda x: nmfx.conv_nm(x, *packed, bias, *where, parsed.n, parsed.m)


def build(name: str, module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    """(callable, note); the note says what the peer does inside, where that was looked up."""
    import engines

    known = {
        "eager": _eager,
        "compile": _compile,
        "max-autotune": _compile_max,
        "onednn": _onednn,
        "mkl": _mkl,
        **engines.ENGINES,
    }
    try:
        with torch.no_grad():
            return known[name](module, x, threads)
    except Unavailable:
        raise
    except Exception as error:  # a peer that fails becomes a line in the table
        text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
        raise Unavailable(text.replace("|", "/")[:160]) from error


def check(call: Call, expected: Tensor, dtype: torch.dtype) -> None:
    """Raises Unavailable if the output is not that of eager, within what the dtype allows."""
    with torch.no_grad():
        got = first_tensor(call())
    got, expected = got.detach().float(), expected.detach().float()
    if got.shape != expected.shape:
        raise Unavailable(f"output is {tuple(got.shape)}, not {tuple(expected.shape)}")
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    # fp32: sums of some thousand terms in another order. bf16: 8 bits, and engines differ in
    # whether they round between layers. Both are far below what a wrong mask would give.
    limit = 1e-3 if dtype == torch.float32 else 5e-2
    if not error < limit:
        raise Unavailable(f"wrong output: off by {error:.1e} of the largest value")


def first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        if isinstance(output, (tuple, list)):
            output = output[0]
        elif hasattr(output, "__array__"):
            output = torch.from_numpy(output.copy())
        else:  # the output class of a Hugging Face model
            output = output.to_tuple()[0]
    return output


def _eager(module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    return lambda: module(*x), ""


def _compile(module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    return _frozen(module, x, None)


def _compile_max(module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    return _frozen(module, x, "max-autotune")


def _frozen(module: nn.Module, x: tuple[Tensor, ...], mode: str | None) -> tuple[Call, str]:
    call, note = compiled(module, x, mode)
    if call is None:
        raise Unavailable(note)
    return call, note


def _onednn(module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    """oneDNN with prepacked weights, called as Inductor calls it but without Inductor."""
    layer, relu, (x0,) = *one_layer(module), x
    attr = "relu" if relu else "none"
    if x0.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Unavailable("oneDNN has no bf16 on this CPU")
    if isinstance(layer, nn.Linear):
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, x0.numel() // x0.shape[-1])
        run = torch.ops.mkldnn._linear_pointwise.default
        return lambda: run(x0, packed, layer.bias, attr, [], ""), ""
    where = (layer.padding, layer.stride, layer.dilation, layer.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *where, list(x0.shape))
    run = torch.ops.mkldnn._convolution_pointwise.default
    return lambda: run(x0, packed, layer.bias, *where, attr, [], ""), ""


def _mkl(module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    """MKL with prepacked weights: what freezing chooses for fp32 linear layers."""
    layer, relu, (x0,) = *one_layer(module), x
    if not isinstance(layer, nn.Linear) or relu or x0.dtype != torch.float32:
        raise Unavailable("MKL prepacks fp32 linear layers only")
    rows = x0.numel() // x0.shape[-1]
    packed = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight, rows)
    run = torch.ops.mkl._mkl_linear.default
    return lambda: run(x0, packed, layer.weight, layer.bias, rows), ""


def one_layer(module: nn.Module) -> tuple[nn.Linear | nn.Conv2d, bool]:
    """(the linear or conv, whether a ReLU follows)."""
    layers = list(module) if isinstance(module, nn.Sequential) else [module]
    relu = len(layers) == 2 and isinstance(layers[1], nn.ReLU)
    if len(layers) != 1 + relu or not isinstance(layers[0], (nn.Linear, nn.Conv2d)):
        raise Unavailable("only for one linear or conv layer")
    return layers[0], relu
