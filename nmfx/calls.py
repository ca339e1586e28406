"""Example inputs: how they are written, run, and how two outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import NMError
from .ops.sharded import local_part

Call = tuple[tuple[Any, ...], dict[str, Any]]

# Relative, norm-wise, over a whole output: a lowered model multiplies the same weights in another
# order, layer after layer.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


# With TF32 a GPU multiplies float32 with 10 bits of mantissa, in dense layers only.
_TF32_TOLERANCE = 2e-3


def tolerance(expected: Tensor) -> float:
    """The relative error that a result may have."""
    found = TOLERANCE.get(expected.dtype, 5e-2)
    if expected.is_cuda and torch.get_float32_matmul_precision() != "highest":
        found = max(found, _TF32_TOLERANCE)
    return found


def parse_calls(example_inputs: Any) -> list[Call]:
    """Reads example inputs.

    A tuple is one call's arguments, a dict one call's keywords, a list several calls, None none.

    Raises:
        NMError: anything else, with what to write.
    """
    if example_inputs is None:
        return []
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise NMError("example_inputs=[] holds no call; leave it out or give a tuple")
        return [call for one in example_inputs for call in _parse_call(one)]
    return _parse_call(example_inputs)


def _parse_call(call: Any) -> list[Call]:
    if isinstance(call, tuple):
        return [(call, {})]
    if isinstance(call, Mapping):  # Hugging Face's BatchEncoding is one too
        return [((), dict(call))]
    raise NMError(
        f"example_inputs holds a {type(call).__name__}; write a tuple of arguments, (x,), a dict "
        f"of keywords, or a list of these for several calls"
    )


@contextmanager
def evaluation_mode(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Runs the block in eval mode without gradients, if there are calls; modes are restored."""
    training = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, mode in training:
            module.training = mode

    try:
        if calls:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        try:
            restore()
        except BaseException:  # Ctrl-C in it: all of it again
            restore()
            raise


def kept_random_state() -> AbstractContextManager[None]:
    """Restores torch's random state after the block; a GPU that nobody used is left asleep."""
    used = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return torch.random.fork_rng(range(used))


@contextmanager
def undisturbed(
    model: nn.Module, but: Callable[[str], bool] = lambda name: False
) -> Iterator[None]:
    """Restores torch's random state and the model's buffers after the block.

    Args:
        model: buffers that the block adds or deletes stay added or deleted.
        but: names of buffers that the model only reads, which need no copy.
    """
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not but(f"{prefix}.{name}" if prefix else name)
    ]
    try:
        with kept_random_state():
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in saved:
                if name in module._buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer


def run_calls(model: nn.Module, calls: list[Call]) -> list[Any]:
    """The outputs of all calls; each run of them starts from the same random state.

    What other ranks have yet to send is waited for, so that outputs may be dropped.
    """
    with kept_random_state():
        outputs = [model(*args, **kwargs) for args, kwargs in calls]
    for tensor in _tensors(outputs):
        if type(tensor).__name__ == "AsyncCollectiveTensor":
            tensor.wait()  # type: ignore[attr-defined]
    return outputs


def compare_outputs(expected: Any, actual: Any, number: int) -> None:
    """Compares all tensors of two outputs.

    Raises:
        NMError: their structure, shapes or values differ; `number` is the call's, from 0.
    """
    pairs = [_tensors(expected), _tensors(actual)]
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        raise NMError(f"call {number}: the lowered model's outputs have other shapes")
    for left, right in zip(*pairs, strict=True):
        if not left.is_floating_point():
            continue
        error, most = relative_error(left, right), tolerance(left)
        if not error <= most:
            raise NMError(
                f"call {number}: the lowered model's output differs from the folded model's by "
                f"{error:.1e} (relative norm), more than {most:.0e}. If something reads a weight "
                f"around its mask, nmfx.verify(model, ...) on the sparsified model names it: keep "
                f"that layer dense with a rule"
            )


def output_error(expected: Any, actual: Any) -> float:
    """The largest relative error of a floating-point tensor; inf if structure or shapes differ."""
    pairs = [_tensors(expected), _tensors(actual)]
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return float("inf")
    both = zip(*pairs, strict=True)
    return max((relative_error(a, b) for a, b in both if a.is_floating_point()), default=0.0)


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64.

    NaN and Inf are left out where both have them; the error is Inf where only one does.
    """
    expected, actual = expected.detach().double(), actual.detach().double()
    finite = expected.isfinite()
    odd = torch.where(finite, 0.0, expected).nan_to_num(nan=7.0)
    if not torch.equal(odd, torch.where(actual.isfinite(), 0.0, actual).nan_to_num(nan=7.0)):
        return float("inf")
    expected, actual = expected[finite], actual[finite]
    norm = float(expected.norm())
    difference = float((actual - expected).norm())
    return difference / norm if norm else difference


def _tensors(output: Any) -> list[Tensor]:
    return [local_part(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
