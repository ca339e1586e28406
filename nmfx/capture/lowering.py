"""One layer of a folded model lowered, and made dense again: at once, or long after.

    weight (Parameter)    pack      weight_values, weight_index (buffers), linear_nm
                          compress  weight_compressed, weight_meta (buffers), linear_semi_structured
                          two forms both, or one beside the weight (Parameter): linear_by_rows
                          prepack   weight (Parameter) and a copy outside the state
                   <---   undo      bit for bit the folded weight

Packing and compressing delete the dense weight as their last step, so whatever interrupts them, the
weight is still there in one of its forms, and `undo` tells which. A dense weight that stays beside
another form is made constant instead: training it would leave the other form behind. Of a model
that was lowered, or loaded, the sites tell what a dense weight needs besides its values:
`Target.of_site`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..ops.weight_copy import WeightCopy
from ..pattern import Pattern
from .candidates import Candidate, as_layer
from .forms import compressed_names, form_names, format_name, format_tensor, forms_of, packed_names
from .holder import HOLDER, Holder, holder_of
from .install import refresh, remove
from .packed import compress_weight, decompress_weight, pack_weight, unpack_weight
from .refs import SiteRef
from .site import COPY, SITES, Site, get_path, place_of, stored_names
from .tied import retie


@dataclass(eq=False)
class Target:
    """A layer of a folded model that may be lowered, or is, and what undoing it needs.

    Attributes:
        candidate: the layer, as it is when it is lowered.
        pattern: the pattern that its weight satisfies.
        found: the layer, as `find_candidates` has it while it is dense.
        bytes: of the dense weight.
        device: where it is.
    """

    candidate: Candidate
    pattern: Pattern
    found: Candidate = field(init=False)
    bytes: int = field(init=False)
    device: torch.device = field(init=False)
    _dtype: torch.dtype = field(init=False)
    _format: str = field(init=False, default="")
    _order: list[str] = field(init=False)  # of the owner's parameters
    _requires_grad: bool = field(init=False)

    def __post_init__(self) -> None:
        self.found, self.candidate = self.candidate, as_layer(self.candidate)
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
            tied=site.tied,
            site=site,
        )
        return cls(candidate, site.pattern)

    @property
    def owner(self) -> tuple[nn.Module, str]:
        """(the module that holds the parameter, the parameter's name there)."""
        return place_of(self.candidate.host, self.candidate.path)

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
    def lower(self, state: str, threshold: int = 0, algorithms: tuple[int, ...] = ()) -> None:
        """Swaps the weight for what `state` says; where that is not dense too, the weight is freed.

        Args:
            state: "packed", "semi_structured", "prepacked" or one of `TWO_FORMS`.
            threshold: of two forms, see `Site`.
            algorithms: of a semi-structured one, see `semi_structured.algorithm_for`.

        Raises:
            NMError: the weight or its device has no such form.
        """
        tensors = {form: self._made(form) for form in forms_of(state)}
        self.adopt(state, tensors, self._format, algorithms, threshold)

    def _made(self, form: str) -> tuple[Tensor, ...]:
        weight, c = self.weight, self.candidate
        if form == "packed":
            return pack_weight(weight, c.dim, c.groups, self.pattern)
        if form == "semi_structured":
            *tensors, self._format = compress_weight(weight, c.dim)
            return tuple(tensors)
        return ()

    def adopt(
        self,
        state: str,
        tensors: Mapping[str, tuple[Tensor, ...]],
        format: str = "",
        algorithms: tuple[int, ...] = (),
        threshold: int = 0,
    ) -> None:
        """Swaps the weight for what is made of it, or what a file holds of it: `lower` done.

        Args:
            state, algorithms, threshold: see `lower`.
            tensors: by form (values, index) or (compressed, meta), checked; none for those that
                keep the weight.
            format: of semi-structured tensors.
        """
        if state == "prepacked":
            return self._prepack()
        self._format = format
        (owner, name), forms = self.owner, forms_of(state)
        for form in forms:
            if form != "dense":
                for key, tensor in zip(form_names(name, form), tensors[form], strict=True):
                    owner.register_buffer(key, tensor)
        if "semi_structured" in forms:
            owner.register_buffer(format_name(name), format_tensor(format).to(self.device))
        # While the weight still exists: graph uses are found by its name.
        self._add_site(state, algorithms, threshold)
        if "dense" in forms:
            self.weight.requires_grad_(False)
        else:
            del owner._parameters[name]
        return None

    def _prepack(self) -> None:
        """Keeps the weight, and a copy of it in oneDNN's layout. For leaf capture only."""
        assert self.candidate.capture == "leaf", self.candidate
        self.candidate.host.__dict__[COPY] = WeightCopy()
        self._add_site("prepacked")

    def _add_site(self, state: str, algorithms: tuple[int, ...] = (), threshold: int = 0) -> None:
        c, store = self.candidate, self._make_store()
        is_compressed = "semi_structured" in forms_of(state)
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
            dtype=self._dtype if is_compressed else None,
            format=self._format if is_compressed else "",
            algorithms=algorithms if is_compressed else (),
            threshold=threshold,
            order=tuple(self._order),
            requires_grad=self._requires_grad,
            tied=(c.name, *c.tied) if c.tied else (),
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
        elif self._requires_grad:
            owner._parameters[name].requires_grad_()  # type: ignore[union-attr]  # it was constant
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

    def __init__(self, model: nn.Module, targets: Iterable[Target]) -> None:
        self._model, self._targets = model, list(targets)
        hosts = dict.fromkeys(target.candidate.host for target in self._targets)
        # Packing replaces nodes of a graph for good.
        self._graphs = {
            host: copy.deepcopy(host.graph) for host in hosts if isinstance(host, fx.GraphModule)
        }

    def __call__(self) -> None:
        for target in self._targets:
            target.restore_weight()
        retie(self._model, {t.candidate.name: t.candidate.tied for t in self._targets})
        for gm, graph in self._graphs.items():
            gm.graph = graph
        for host in dict.fromkeys(target.candidate.host for target in self._targets):
            remove(host)
