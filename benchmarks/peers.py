"""Everything that can run a module, behind one call: `build(name, module, x, threads)`.

Each peer gives back a callable without arguments, or raises `Unavailable` with the reason that
the tables show. The engines outside torch are in `engines.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nmfx
import nmfx.packing
from nmfx import Pattern

Call = Callable[[], Any]
# What a user of torch has without other engines: "best dense" is the best of these.
DENSE = ("eager", "compile", "max-autotune", "onednn", "mkl")


class Unavailable(Exception):
    """This peer cannot run this module here; the text says why."""


def packed_linear(
    weight: Tensor, bias: Tensor | None, pattern: str, scales: list[float]
) -> list[Callable[[Tensor], Tensor]]:
    """Linear layers of nmfx with the weights `scale * weight`, each in memory of its own.

    The only place that knows the signature of the kernel. Packed once, because that is slow.
    """
    parsed = Pattern.parse(pattern)
    values, index = nmfx.packing.pack(weight, parsed)
    columns = weight.shape[1]

    def layer(scale: float) -> Callable[[Tensor], Tensor]:
        own = values * scale, index.clone()
        return lambda x: nmfx.linear_nm(x, *own, bias, columns, parsed.n, parsed.m)

    return [layer(scale) for scale in scales]


def packed_conv(conv: nn.Conv2d, pattern: str) -> Callable[[Tensor], Tensor]:
    """A convolution of nmfx. The only place that knows the signature of its kernel."""
    raise NotImplementedError("conv_nm not there yet")


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
    return compiled(module, x, None)


def _compile_max(module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    return compiled(module, x, "max-autotune")


def compiled(module: nn.Module, x: tuple[Tensor, ...], mode: str | None) -> tuple[Call, str]:
    """torch.compile with freezing, which is checked: else dense would look slower than it is."""
    from torch._inductor.utils import run_and_get_code

    with _freezing():
        call = torch.compile(_own_code(module), mode=mode)
        _, code = run_and_get_code(call, *x)
    text = "\n".join(code)
    inputs = re.findall(r"^ +(.*?),? = args$", text, re.MULTILINE)
    if any(len(line.split(",")) > len(x) for line in inputs):
        raise Unavailable("freezing did not happen: the weights are inputs of the compiled code")
    return lambda: call(*x), _what_it_calls(text)


def _what_it_calls(code: str) -> str:
    found = set(re.findall(r"torch\.ops\.(mkl\w*\.\w+)", code))
    found |= set(re.findall(r"extern_kernels\.(\w+)\(", code))
    if "micro_gemm" in code:
        found.add("cpp micro_gemm")
    return "frozen; calls " + (", ".join(sorted(found)) or "no matrix product of a library")


def _own_code(module: nn.Module) -> Callable[..., Any]:
    """`module` as a function with a code object of its own.

    Compiled entries hang on the code object: copies of one class would share it, and each call
    would then search the guards of all copies (and hit the recompile limit). Never reset dynamo
    instead: that silently undoes freezing.
    """

    def forward(*args: Tensor) -> Any:
        return module(*args)

    code = forward.__code__.replace(co_name=f"forward_{id(module)}")
    return types.FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)


@contextlib.contextmanager
def _freezing() -> Iterator[None]:
    os.environ.setdefault("TORCHINDUCTOR_MAX_AUTOTUNE_REPORT_CHOICES_STATS", "0")
    from torch._inductor import config, select_algorithm

    select_algorithm.PRINT_AUTOTUNE = False
    # No shapes as symbols: each cell has one shape, and automatic dynamic shapes would make the
    # second row count slower than the first.
    with (
        config.patch(freezing=True),
        torch._dynamo.config.patch(
            recompile_limit=4096,
            accumulated_recompile_limit=1 << 20,
            automatic_dynamic_shapes=False,
        ),
    ):
        yield


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
