"""A model written down: its tensors, and the specification without their digests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.candidates import Candidate, find_candidates
from ..capture.refs import SiteRef, iter_sites
from ..capture.site import (
    FOLDED,
    MADE_ON,
    MEASURED,
    NOTES,
    REPLACES,
    SKIPPED,
    get_path,
    join,
    marks_of,
    mask_name,
)
from ..packing import detect_pattern
from ..tuning.hardware import machine
from .graphs import graph_digests
from .spec import Layer
from .tensors import (
    BUFFER,
    MASK,
    check_state_dict,
    check_storable,
    file_name,
    same_memory,
    slots_of,
)


@dataclass(frozen=True)
class Description:
    """What a file will say.

    Attributes:
        tensors: by their names in the file; none twice.
        aliases: name -> name in `tensors`, for tensors with several names.
        fields: of `Spec`, all but nmfx, torch and tensors.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    fields: dict[str, Any]


def describe(model: nn.Module) -> Description:
    """Describes a model; copies and changes nothing.

    Raises:
        NMError: a tensor that a file cannot hold.
    """
    slots = slots_of(model)
    check_state_dict(model, slots)
    named = {file_name(name, slot): slot.tensor for name, slot in slots.items()}
    refs = {ref.name: ref for ref in iter_sites(model)}
    for name, ref in refs.items():
        if ref.site.state == "frozen":
            named[MASK + name] = ref.store.__dict__[mask_name(ref.index)]
    tensors, aliases = _distinct(named)
    candidates = find_candidates(model)
    layers = {name: _site_layer(ref) for name, ref in refs.items()}
    for candidate in candidates:
        if candidate.name not in layers and candidate.obstacle is None:
            layer = _folded_layer(candidate)
            if layer is not None:
                layers[candidate.name] = layer
    modules = dict(model.named_modules(remove_duplicate=False))
    lowered = any(ref.site.lowered for ref in refs.values())
    norms = tuple(
        join(prefix, path)
        for prefix, module in model.named_modules()
        for path in marks_of(module).get(FOLDED, ())
    )
    reasons, measured = {}, {}
    for candidate in candidates:
        fields = marks_of(candidate.host)
        if candidate.path in fields.get(SKIPPED, {}):
            reasons[candidate.name] = fields[SKIPPED][candidate.path]
        if candidate.path in fields.get(MEASURED, {}):
            rows, *ms = fields[MEASURED][candidate.path]
            measured[candidate.name] = (tuple(map(int, rows)), *map(float, ms))
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    return Description(
        tensors,
        aliases,
        {
            "made_on": marks_of(model).get(MADE_ON, machine(device)) if lowered else "",
            "layers": layers,
            "norms": norms,
            "identities": {
                name: module.__dict__[REPLACES]
                for name, module in modules.items()
                if REPLACES in module.__dict__
            },
            "graphs": graph_digests(model) if lowered or norms else {},
            "reasons": reasons,
            "measured": measured,
            "notes": tuple(marks_of(model).get(NOTES, ())),
        },
    )


def _distinct(named: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the other names of those that have several."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in named.items():
        check_storable(name, tensor)
        key = (*same_memory(tensor), name.startswith(BUFFER))
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor
    return tensors, aliases


def _site_layer(ref: SiteRef) -> Layer:
    site = ref.site
    return Layer(
        site.pattern,
        site.state,
        site.kind,
        site.capture,
        site.shape,
        site.dim,
        site.groups,
        site.lambda_w,
        site.activation,
        site.dtype,
        site.format,
        site.algorithms,
        site.threshold,
    )


def _folded_layer(candidate: Candidate) -> Layer | None:
    """A dense weight that satisfies a pattern, if it does."""
    weight = get_path(candidate.host, candidate.path)
    pattern = detect_pattern(weight, candidate.dim)
    if pattern is None:
        return None
    c = candidate
    return Layer(pattern, "folded", c.kind, "", c.shape, c.dim, c.groups)
