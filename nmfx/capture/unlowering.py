"""What `nmfx.lower` did, taken back from a model that it made or that was loaded.

    weight_values, weight_index (buffers)     becomes     weight (Parameter), bit for bit
    nn.Identity for a ReLU                                nn.ReLU
    nmfx_linear_nm in a graph                             linear, and the activation behind it

Batch norms that were folded stay so: their tensors are gone.

Ensures: the sites are gone, classes and graphs are not yet restored; `nmfx.sparsify.restore` does
that. Nothing is undone here; the caller has a `Snapshot`.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ..errors import NMError
from ..graph.densify import replace_with_dense
from ..kernels import semi_structured
from .forms import compressed_names, forms_of
from .fuse_activation import put_back
from .lowering import Target
from .packed import packed_weight_shapes
from .refs import SiteRef, iter_sites, weight_or_none
from .site import get_path, stored_names
from .tied import names_now, retie


def lowered_sites(model: nn.Module) -> list[SiteRef]:
    """The lowered sites of a model, checked.

    Raises:
        NMError: one whose weight cannot be read.
    """
    refs = [ref for ref in iter_sites(model) if ref.site.lowered]
    for ref in refs:
        site = ref.site
        stored = _stored(ref)
        if stored.is_meta:
            raise NMError(f"{ref.name}: it is on the meta device, so there is nothing to fold")
        if site.state != "semi_structured":
            continue
        if get_path(ref.host, compressed_names(site.path)[1]).numel():
            continue  # of CUTLASS, which can be read anywhere
        assert site.dtype is not None
        here, library = f"{stored.device}", semi_structured.CUSPARSELT
        if stored.device.type == "cuda":
            here += f", {semi_structured.format_of(library, site.dtype, stored.device)}"
        if not here.endswith(f", {site.format}"):
            raise NMError(
                f"{ref.name}: it was compressed as {site.format}, which only such a GPU can read, "
                f"and it is on {here}; move the model back there and fold it there"
            )
    return refs


def _stored(ref: SiteRef) -> Tensor:
    """The first of the tensors that hold a lowered weight; all of them are looked at."""
    site, tensors = ref.site, []
    for name in stored_names(site):
        tensor = weight_or_none(ref.host, name)
        if tensor is None:
            raise NMError(f"{ref.name}: its {name} is gone since it was lowered")
        tensors.append(tensor)
    if "packed" in forms_of(site.state):
        wanted = packed_weight_shapes(site.shape, site.dim, site.groups, site.pattern)
        found = [tuple(tensor.shape) for tensor in tensors[:2]]
        if found != list(wanted):
            raise NMError(f"{ref.name}: packed it has the shapes {wanted}, and here are {found}")
    return tensors[0]


def make_dense(model: nn.Module) -> None:
    """Gives all lowered layers of a model dense weights, and back what was moved into them.

    Raises:
        NMError: see `lowered_sites` and `put_back`.
    """
    refs = lowered_sites(model)
    leaves = {ref.name: ref.host for ref in refs if ref.site.activation != "none"}
    put_back(model, leaves)
    with torch.inference_mode(False):  # weights must be good for training
        for ref in reversed(refs):  # each knows the order of the parameters that were left then
            site = ref.site
            if site.capture == "graph":
                assert isinstance(ref.host, fx.GraphModule)
                stored = stored_names(site)[0]
                replace_with_dense(ref.host.graph, stored, site.path, site.kind, site.shape)
            Target.of_site(ref).restore_weight()
        retie(model, {ref.name: names_now(ref.name, ref.site.tied) for ref in refs})
