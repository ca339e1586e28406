"""timm's models: one of each variety, at the smallest image that it runs on.

The 1,200 names are grouped by class and by the words of the name without sizes (vit_relpos, but
not vit_relpos_small and _medium); the member with the fewest parameters stands for its group.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import nn

from sweep.case import Case, call, finite, liven, outputs

SIZES = (64, 96, 128, 160, 192, 224, 256, 384)
# Words that say how large a model is, or on what it was trained, not what it is made of.
_SIZES = (
    "atto femto pico nano tiny small medium base large huge giant gigantic enormous mini micro "
    "xxtiny xtiny xsmall xxsmall xlarge xxlarge little pluslite supersmall zepto betwixt "
    "s m l t b g h n xs xxs xl xt xxl xxxs plus"
)
_SIZE_WORDS = frozenset(_SIZES.split())


def variety(name: str) -> str:
    """The words of a name, without numbers and sizes."""
    words = re.split(r"[_.]", name)
    kept = [re.sub(r"\d+.*", "", word) for word in words]
    return "_".join(word for word in kept if word and word not in _SIZE_WORDS)


def choose(parameters: dict[str, tuple[str, int]]) -> list[str]:
    """The smallest name of each (class, variety), smaller models first.

    Args:
        parameters: name -> (class, number of parameters).
    """
    best: dict[tuple[str, str], str] = {}
    for name in sorted(parameters):
        kind, size = parameters[name]
        key = (kind, variety(name))
        if key not in best or size < parameters[best[key]][1]:
            best[key] = name
    return sorted(best.values(), key=lambda name: (parameters[name][1], name))


def count_parameters() -> dict[str, tuple[str, int]]:
    """Class and number of parameters of every name, built on the meta device (minutes)."""
    import timm

    found = {}
    for name in timm.list_models():
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            model = timm.create_model(name)
        kind = f"{type(model).__module__}.{type(model).__name__}"
        found[name] = (kind, sum(p.numel() for p in model.parameters()))
    return found


def names() -> list[str]:
    """One name per variety; the first call in a work folder counts parameters for minutes."""
    from sweep.workspace import cached

    text = cached("timm_parameters.json", lambda: json.dumps(count_parameters()))
    return choose({name: (kind, size) for name, (kind, size) in json.loads(text).items()})


def build(name: str, recipe: str = "") -> Case:
    """A model of timm and an image batch; raises if none of the sizes runs."""
    tried: list[str] = []
    for size in SIZES:
        label = f"{size} pixels"
        if recipe and recipe != label:
            continue
        try:
            model, x = _at(name, size)
            with torch.no_grad():
                if not finite(outputs(call(model, (x,)))):
                    raise ValueError("the output is not finite, or zero")
        except Exception as error:  # noqa: BLE001 (the next size may do)
            tried.append(f"{label}: {type(error).__name__}: {error}"[:150])
            continue
        return Case(model, (x,), recipe=label)
    raise ValueError("; ".join(tried[:1] + tried[-1:]))


def _at(name: str, size: int) -> tuple[nn.Module, torch.Tensor]:
    import timm

    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_classes": 16}
    try:
        model = timm.create_model(name, img_size=size, **fields)
    except TypeError:
        model = timm.create_model(name, **fields)
    model.eval()
    channels = model.default_cfg["input_size"][0]
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    liven(model)
    return model, x
