"""The sites of a model, found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import NMError
from ..mask import DTYPES
from ..ops.sr_ste import make_control
from .holder import Holder, holder_of
from .site import SITES, Site, control_name, get_path, join, mask_name

GONE = "its weight is gone since it was sparsified; give the layer a parameter again"


def is_freed(weight: Tensor) -> bool:
    """Whether it is a view of memory that was given back: reading it would end the process."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.numel() > 0
    return plain and weight.untyped_storage().nbytes() == 0


@dataclass(frozen=True)
class SiteRef:
    """A site found in a model.

    Attributes:
        name: the parameter's fully qualified name in the model.
        host: the module that `site.path` starts from.
        store: the module whose `__dict__` holds the state (the host, or its holder in a graph).
        index: the number of the site in its store.
        site: the live `Site`.
    """

    name: str
    host: nn.Module
    store: nn.Module
    index: int
    site: Site

    @property
    def module_name(self) -> str:
        """The name of the module that owns the parameter: what rules match."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> nn.Parameter:
        """The raw, dense weight.

        Raises:
            NMError: FSDP1 holds it in another form, and what is here must not be read; or somebody
                took it away.
        """
        weight = weight_or_none(self.host, self.site.path)
        if weight is None:
            raise NMError(f"{self.name}: {GONE}")
        if weight.ndim != len(self.site.shape) or is_freed(weight):
            raise NMError(
                f"{self.name}: FullyShardedDataParallel flattened it and took its memory; call "
                f"this inside its summon_full_params, or use fully_shard (FSDP2)"
            )
        return weight

    def refresh_control(self) -> None:
        """Rebuilds the control tensor from the Python values.

        A new tensor replaces the old one, so a backward that is still to come sees the values its
        forward ran with, and autograd's version check is never tripped.
        """
        old = self.store.__dict__[control_name(self.index)]
        site = self.site
        new = make_control(site.lambda_in_backward, site.pattern.n, old.device)
        self.store.__dict__[control_name(self.index)] = new


def check_parameter(ref: SiteRef) -> None:
    """Refuses a weight that was replaced by one that has no N:M groups.

    Raises:
        NMError: M does not divide it any more, its dtype has no order, or its fixed mask has
            another shape.
    """
    site, weight = ref.site, ref.parameter
    size = weight.shape[site.dim]
    if size % site.pattern.m:
        raise NMError(
            f"{ref.name}: it was replaced since it was sparsified, and its dimension {site.dim} of "
            f"{size} is not a multiple of {site.pattern.m}; give it {site.shape} again"
        )
    if weight.dtype not in DTYPES:
        raise NMError(
            f"{ref.name}: it was replaced since it was sparsified, and {weight.dtype} has no N:M "
            f"order; give it a float weight again"
        )
    mask = ref.store.__dict__[mask_name(ref.index)] if site.state == "frozen" else weight
    if mask.shape != weight.shape:
        raise NMError(
            f"{ref.name}: it was replaced since its mask was fixed, and the mask has the shape "
            f"{tuple(mask.shape)}; give it such a weight again, or nmfx.unfreeze it"
        )


def weight_or_none(host: nn.Module, path: str) -> Any:
    """The tensor at a path below a host; None where it, or what held it, is gone."""
    try:
        weight = get_path(host, path)
    except AttributeError:
        return None
    return weight if isinstance(weight, Tensor) else None


def iter_sites(model: nn.Module) -> Iterator[SiteRef]:
    """All sites of a model, in the order of `named_modules`; each module once."""
    for fqn, module in model.named_modules():
        if isinstance(module, Holder):  # its sites belong to the GraphModule above it
            continue
        for store in (module, holder_of(module)):
            if store is None:
                continue
            for i, site in enumerate(store.__dict__.get(SITES, ())):
                yield SiteRef(join(fqn, site.path), module, store, i, site)


def sites_of(model: nn.Module, verb: str) -> list[SiteRef]:
    """All sites of a model that are not lowered.

    Raises:
        NMError: there are none; `verb` names the call for the message.
    """
    if not isinstance(model, nn.Module):
        raise NMError(f"nmfx.{verb} takes an nn.Module, got {type(model).__name__}")
    found = list(iter_sites(model))
    refs = [ref for ref in found if not ref.site.lowered]
    if found and not refs:
        raise NMError(
            f"nmfx.{verb}: {type(model).__name__} is lowered, and packed layers have no dense "
            f"weight; call it on the model that nmfx.lower was given"
        )
    if not refs:
        raise NMError(
            f"nmfx.{verb}: {type(model).__name__} has no sparsified layer; "
            f"call nmfx.sparsify(model, '2:4') first"
        )
    return refs
