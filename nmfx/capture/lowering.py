"""One layer of a folded model lowered, and made dense again: at once, or long after.

    weight (Parameter)    pack      weight_values, weight_index (buffers), linear_nm
                          compress  weight_compressed, weight_meta (buffers), linear_semi_structured
                          prepack   weight (Parameter) and a copy outside the state
                   <---   undo      bit for bit the folded weight

Packing and compressing delete the dense weight as their last step, so whatever interrupts them, the
weight is still there in one of its forms, and `undo` tells which. Of a model that was lowered, or
loaded, the sites tell what a dense weight needs besides its values: `Target.of_site`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..ops.weight_copy import WeightCopy
from ..pattern import Pattern
from .candidates import Candidate
from .install import refresh, remove
from .packed import compress_weight, decompress_weight, pack_weight, unpack_weight
from .site import (
    COPY,
    HOLDER,
    SITES,
    Holder,
    Site,
    SiteRef,
    compressed_names,
    format_name,
    format_tensor,
    get_path,
    holder_of,
    packed_names,
    stored_names,
)


@dataclass(eq=False)
class Target:
    """A layer of a folded model that may be lowered, or is, and what undoing it needs.

    Attributes:
        candidate: the layer.
        pattern: the pattern that its weight satisfies.
        bytes: of the dense weight.
        device: where it is.
    """

    candidate: Candidate
    pattern: Pattern
    bytes: int = field(init=False)
    device: torch.device = field(init=False)
    _dtype: torch.dtype = field(init=False)
    _format: str = field(init=False, default="")
    _order: list[str] = field(init=False)  # of the owner's parameters
    _requires_grad: bool = field(init=False)

    def __post_init__(self) -> None:
        owner, name = self.owner
        c, site = self.candidate, self.candidate.site
        if site is not None and site.lowered:
            stored = get_path(c.host, stored_names(site)[0])
            self._dtype, self._format = site.dtype or stored.dtype, site.format
            self._order = list(site.order) or [name, *owner._parameters]
            self._requires_grad = site.requires_grad
        else:
            stored = self.weight
            self._dtype, self._requires_grad = stored.dtype, stored.requires_grad
            self._order = list(owner._parameters)
        self.device, self.bytes = stored.device, math.prod(c.shape) * self._dtype.itemsize

    @classmethod
    def of_site(cls, ref: SiteRef) -> Target:
        """The layer of a lowered site."""
        site = ref.site
        candidate = Candidate(
            ref.name,
            ref.module_name,
            ref.host,
            site.path,
            site.kind,
            site.shape,
            site.dim,
            site.reduced,
            site.capture,
            site.groups,
            site=site,
        )
        return cls(candidate, site.pattern)

    @property
    def owner(self) -> tuple[nn.Module, str]:
        """(the module that holds the parameter, the parameter's name there)."""
        path, _, name = self.candidate.path.rpartition(".")
        host = self.candidate.host
        return (get_path(host, path) if path else host), name

    @property
    def weight(self) -> Tensor:
        """The weight as the model stores it."""
        return get_path(self.candidate.host, self.candidate.path)

    @property
    def state(self) -> str:
        """What it is now: the state of its site or, not lowered, "dense"."""
        c = self.candidate
        store = holder_of(c.host) if c.capture == "graph" else c.host
        sites = store.__dict__.get(SITES, ()) if store is not None else ()
        return next((site.state for site in sites if site.path == c.path), "dense")

    @torch.no_grad()
    def pack(self) -> None:
        """Swaps the weight for packed buffers; the dense weight is freed."""
        owner, name = self.owner
        weight = owner._parameters[name]
        assert weight is not None
        packed = pack_weight(weight, self.candidate.dim, self.candidate.groups, self.pattern)
        self._replace(dict(zip(packed_names(name), packed, strict=True)), "packed")

    @torch.no_grad()
    def compress(self) -> None:
        """Swaps the weight for the form that sparse tensor cores read; the dense weight is freed.

        Raises:
            NMError: the weight or its device has no such form.
        """
        owner, name = self.owner
        weight = owner._parameters[name]
        assert weight is not None
        *tensors, self._format = compress_weight(weight, self.candidate.dim)
        buffers = dict(zip(compressed_names(name), tensors, strict=True))
        buffers[format_name(name)] = format_tensor(self._format).to(weight.device)
        self._replace(buffers, "semi_structured")

    def adopt(self, state: str, tensors: tuple[Tensor, ...], format: str = "") -> None:
        """Swaps the weight for what a file holds of it: `pack`, `compress` or `prepack` done.

        Args:
            state: "packed", "semi_structured" or "prepacked".
            tensors: (values, index) or (compressed, meta), checked; none for "prepacked".
            format: of semi-structured tensors.
        """
        if state == "prepacked":
            return self.prepack()
        _, name = self.owner
        names = packed_names(name) if state == "packed" else compressed_names(name)
        buffers = dict(zip(names, tensors, strict=True))
        if state == "semi_structured":
            self._format = format
            buffers[format_name(name)] = format_tensor(format).to(self.device)
        self._replace(buffers, state)
        return None

    def _replace(self, buffers: dict[str, Tensor], state: str) -> None:
        owner, name = self.owner
        for buffer_name, tensor in buffers.items():
            owner.register_buffer(buffer_name, tensor)
        self._add_site(state)  # while the weight still exists: graph uses are found by its name
        del owner._parameters[name]

    def prepack(self) -> None:
        """Keeps the weight, and a copy of it in oneDNN's layout. For leaf capture only."""
        assert self.candidate.capture == "leaf", self.candidate
        self.candidate.host.__dict__[COPY] = WeightCopy()
        self._add_site("prepacked")

    def _add_site(self, state: str) -> None:
        c, store = self.candidate, self._make_store()
        site = Site(
            c.path,
            c.shape,
            c.dim,
            c.reduced,
            self.pattern,
            0.0,
            c.kind,
            c.capture,
            state,
            groups=c.groups,
            dtype=self._dtype if state == "semi_structured" else None,
            format=self._format if state == "semi_structured" else "",
            order=tuple(self._order),
            requires_grad=self._requires_grad,
        )
        store.__dict__[SITES] = [*store.__dict__.get(SITES, ()), site]
        refresh(c.host, store)

    def _make_store(self) -> nn.Module:
        host = self.candidate.host
        if self.candidate.capture != "graph":
            return host
        holder = holder_of(host)
        if holder is None:
            holder = Holder()
            holder.__dict__[SITES] = []
            host._modules[HOLDER] = holder
        return holder

    @torch.no_grad()
    def restore_weight(self) -> None:
        """Makes the weight a dense parameter again, if it is not, and forgets the site."""
        owner, name = self.owner
        c = self.candidate
        if name not in owner._parameters:
            dense = self._dense(owner._buffers, name)
            # Not just contiguous: of a 1x1 convolution the strides would mean channels-last.
            weight = nn.Parameter(dense.flatten().view(c.shape), self._requires_grad)
            owner._parameters[name] = weight
            for key in self._order:  # the order is that of state_dict and of optimizers
                if key in owner._parameters:  # the others are still to come
                    owner._parameters[key] = owner._parameters.pop(key)
        for key in (*packed_names(name), *compressed_names(name), format_name(name)):
            owner._buffers.pop(key, None)
        store = holder_of(c.host) if c.capture == "graph" else c.host
        if store is not None and SITES in store.__dict__:
            sites = [site for site in store.__dict__[SITES] if site.path != c.path]
            store.__dict__[SITES] = sites

    def _dense(self, buffers: dict[str, Tensor | None], name: str) -> Tensor:
        c = self.candidate
        packed, compressed = (
            [tensor for key in keys if (tensor := buffers.get(key)) is not None]
            for keys in (packed_names(name), compressed_names(name))
        )
        if packed:
            values, index = packed
            return unpack_weight(values, index, c.shape, c.dim, c.groups, self.pattern)
        data, meta = compressed
        return decompress_weight(data, meta, c.shape, c.dim, self._dtype)


class Undo:
    """Makes targets dense again, from whatever point lowering them was interrupted at."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self._targets = list(targets)
        hosts = dict.fromkeys(target.candidate.host for target in self._targets)
        # Packing replaces nodes of a graph for good.
        self._graphs = {
            host: copy.deepcopy(host.graph) for host in hosts if isinstance(host, fx.GraphModule)
        }

    def __call__(self) -> None:
        for target in self._targets:
            target.restore_weight()
        for gm, graph in self._graphs.items():
            gm.graph = graph
        for host in dict.fromkeys(target.candidate.host for target in self._targets):
            remove(host)
