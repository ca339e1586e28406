"""Milliseconds of a whole model: as it is called, or as a CUDA graph that is replayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..calls import Call, run_calls
from ..errors import NMError
from . import timer

_BUDGET_S = 1.0
_WARM_UPS = 3  # as torch's documentation of captures has it


def whole_ms(model: nn.Module, calls: list[Call], cuda_graph: bool) -> float | None:
    """Milliseconds of all calls together, or None without calls.

    Raises:
        NMError: `cuda_graph`, and the model cannot be captured.
    """
    if not calls:
        return None
    tensors = itertools.chain(model.parameters(), model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    if cuda_graph:
        return _captured_ms(model, calls, devices)

    def run() -> None:
        run_calls(model, calls)
        for device in devices:
            torch.cuda.synchronize(device)

    return timer.measure({"model": run}, budget_s=_BUDGET_S)["model"]


def _captured_ms(model: nn.Module, calls: list[Call], devices: set[torch.device]) -> float:
    if len(devices) != 1:
        raise NMError(
            f"cuda_graph=True: a CUDA graph is of one GPU, and the model is on "
            f"{', '.join(sorted(map(str, devices))) or 'none'}; leave cuda_graph=False"
        )
    (device,) = devices
    replay = capture(lambda: [model(*args, **kwargs) for args, kwargs in calls], device)
    return timer.measure({"model": replay}, budget_s=_BUDGET_S, device=device)["model"]


def capture(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """A function that replays what `run` does on a GPU.

    Raises:
        NMError: it does something that a CUDA graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            raise NMError(
                f"cuda_graph=True: the model cannot be captured "
                f"({next(iter(str(error).splitlines()), 'no reason')}); leave cuda_graph=False"
            ) from error
    return graph.replay
