"""What a GPU is asked to do, as a CUDA graph: replaying it costs the host next to nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..errors import NMError

_WARM_UPS = 3  # as torch's documentation of captures has it


def capture(run: Callable[[], Any], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """A function that replays what `run` does on a GPU.

    Args:
        run: its result is dropped.
        device: the GPU.
        pool: memory of `torch.cuda.graph_pool_handle()`, for graphs of which none is replayed
            before another has ended; None takes new memory.

    Raises:
        NMError: it does something that a CUDA graph cannot hold.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream(device)
    users = torch.cuda.current_stream(device)
    try:
        # Around all: where a capture fails, torch leaves its stream the current one.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            stream.wait_stream(users)
            for _ in range(_WARM_UPS):
                run()
            # Other threads may allocate meanwhile: a loader that pins memory, say.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                run()
            stream.synchronize()
    except RuntimeError as error:
        raise NMError(
            f"it cannot be captured in a CUDA graph: "
            f"{next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from error
    return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)
