"""A zoo of tiny models: every architecture and trap that nmfx promises to handle.

    model, inputs = build("hf_llama")       # the same weights and inputs every time, eval mode
    output = call(model, inputs)
    loss = probe_loss(output)

The entries live in zoo_hf.py, zoo_vision.py, zoo_attention.py and zoo_odd.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from zoo_attention import ATTENTION_MODELS
from zoo_entry import Entry, Inputs
from zoo_hf import HF_MODELS
from zoo_odd import ODD_MODELS
from zoo_vision import VISION_MODELS

ZOO: dict[str, Entry] = {**HF_MODELS, **VISION_MODELS, **ATTENTION_MODELS, **ODD_MODELS}


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A fresh model in eval mode and its inputs; bit-identical in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = ZOO[name].build()
    return model.eval(), inputs


def call(model: Any, inputs: Inputs) -> Any:
    """Runs a model, or a function of the same signature, on its inputs."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def outputs(result: Any) -> list[Tensor]:
    """Every floating-point tensor in a result, in order; caches and other objects are left out."""
    return list(_floats(result))


def _floats(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _floats(item)
    elif isinstance(result, Mapping):
        for item in result.values():
            yield from _floats(item)


def probe_loss(result: Any) -> Tensor:
    """A scalar whose gradient reaches every output element with a weight of its own.

    A mean of squares would not do: it is constant after a layer norm.
    """
    total = torch.zeros(())
    for tensor in outputs(result):
        weights = torch.arange(tensor.numel()).cos().to(tensor.dtype)
        total = total + (tensor.flatten() * weights).sum()
    return total
