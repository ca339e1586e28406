"""Milliseconds of a whole model: as it is called, or as a CUDA graph that is replayed."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from ..calls import Call, run_calls
from ..errors import NMError
from . import timer
from .cuda_graph import capture

_BUDGET_S = 1.0


def check_cuda_graph(model: nn.Module, calls: list[Call], tune: bool) -> None:
    """Checks the argument `cuda_graph=True` of `nmfx.lower`.

    Raises:
        NMError: nothing is timed, or not on one GPU.
    """
    if not (calls and tune):
        raise NMError(
            "cuda_graph=True times a CUDA graph of the example inputs: give some, and tune=True"
        )
    gpus = sorted(map(str, _gpus(model)))
    if len(gpus) != 1:
        raise NMError(
            f"cuda_graph=True: a CUDA graph is of one GPU, and the model is on "
            f"{', '.join(gpus) or 'none'}; leave cuda_graph=False"
        )


def _gpus(model: nn.Module) -> set[torch.device]:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return {tensor.device for tensor in tensors if tensor.is_cuda}


def whole_ms(model: nn.Module, calls: list[Call], cuda_graph: bool) -> float | None:
    """Milliseconds of all calls together, or None without calls.

    Raises:
        NMError: `cuda_graph`, and the model cannot be captured.
    """
    if not calls:
        return None
    devices = _gpus(model)
    if cuda_graph:
        return _captured_ms(model, calls, devices)

    def run() -> None:
        run_calls(model, calls)
        for device in devices:
            torch.cuda.synchronize(device)

    return timer.measure({"model": run}, budget_s=_BUDGET_S)["model"]


def _captured_ms(model: nn.Module, calls: list[Call], devices: set[torch.device]) -> float:
    (device,) = devices
    try:
        replay = capture(lambda: [model(*args, **kwargs) for args, kwargs in calls], device)
    except NMError as error:
        raise NMError(f"cuda_graph=True: {error}; leave cuda_graph=False") from error
    runs = {"model": replay}
    return timer.measure(runs, budget_s=_BUDGET_S, device=device, captured=False)["model"]
