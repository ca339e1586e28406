"""What a GPU is asked to do, as a CUDA graph: replaying it costs the host next to nothing."""

from __future__ import annotations

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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph, pool=pool):
                run()
        except RuntimeError as error:
            raise NMError(
                f"it cannot be captured in a CUDA graph: "
                f"{next(iter(str(error).splitlines()), type(error).__name__)}"
            ) from error
    return graph.replay
