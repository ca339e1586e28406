"""torch.compile for inference, at its best: frozen weights, static shapes, cheap guards."""

from __future__ import annotations

import contextlib
import os
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def compiled(
    module: nn.Module, x: tuple[Tensor, ...], mode: str | None
) -> tuple[Callable[[], Any] | None, str]:
    """torch.compile with freezing, which is checked: else dense would look slower than it is.

    Returns (callable, what the compiled code calls), or (None, why it is not frozen).
    """
    from torch._inductor.utils import run_and_get_code

    with _freezing():
        call = torch.compile(_own_code(module), mode=mode)
        _, code = run_and_get_code(call, *x)
    text = "\n".join(code)
    inputs = re.findall(r"^ +(.*?),? = args$", text, re.MULTILINE)
    if any(len(line.split(",")) > len(x) for line in inputs):
        return None, "freezing did not happen: the weights are inputs of the compiled code"
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
