"""nmfx.fold: exact zeros in the weights, original classes, nothing of nmfx left."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .capture.copied import copied
from .capture.install import check_classes
from .capture.linear_part import has_parts
from .capture.parts import join_parts
from .capture.refs import SiteRef, check_parameter, iter_sites, sites_of
from .capture.sharding import refuse_copy, reshard
from .capture.site import MADE_ON, NOTES, marks_of
from .capture.tied import refuse_tied_since
from .capture.unlowering import lowered_sites, make_dense
from .errors import NMError
from .mask import nm_project
from .ops.keep import keep
from .ops.sharded import is_sharded, on_parts
from .schedule import site_mask
from .sparsify import restore, taken_over, unchanged_if_refused
from .storage.snapshot import Snapshot


def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Bakes the masks into the weights and returns a vanilla dense model.

    Pruned weights become exactly +0.0, kept ones stay bit for bit; classes and graphs are the
    original ones, so ONNX, TensorRT, Hugging Face and torch.export see an ordinary model. ONNX
    needs that: sparsified and lowered models hold operators of nmfx, which torch.onnx.export
    refuses by name ("No ONNX function found for ... nmfx.sr_ste").

    A lowered model is taken back: packed and compressed weights become dense parameters again, bit
    for bit, and activations that moved into layers stand behind them once more (in a graph as
    functions of torch.nn.functional, as do the layers whose weights the graph reads itself). So
    `nmfx.lower(nmfx.fold(fast), x)` tunes a lowered or loaded model again, and `nmfx.fold(fast)`
    goes to any device. Batch norms that were folded into convolutions stay folded: their tensors
    are gone, and the `nn.Identity` in their place remains.

    A sharded model (DTensor) is folded shard by shard, on all ranks at once.

    Args:
        model: a sparsified model, a lowered one, or one that is both in parts.
        inplace: fold `model` itself, reusing its memory; its parameters stay the same objects. An
            error or interruption leaves it as it was, or folded.

    Returns:
        The folded model: a deep copy, or `model`.

    Raises:
        NMError: no sparsified or lowered layer; one that is on the meta device; one that cuSPARSELt
            compressed, away from its GPU; a part of a lowered model, whose activations are in
            another part; a copy of a model that `fully_shard` works on, or of a
            layer that copies itself as a dense one; a weight that was tied to
            an unmasked one, replaced or computed since it was sparsified; in place, one that was
            made under torch.inference_mode. Nothing is changed then.
    """
    with unchanged_if_refused(model):
        model, inplace = _ready(model, inplace)
    model = model if inplace else copied(model, "fold")
    snapshot, begun = Snapshot(model), list[str]()
    try:
        make_dense(model)
        for key in (NOTES, MADE_ON):
            marks_of(model).pop(key, None)
        bake(model, begun)
        join_parts(model)
    except BaseException:  # Ctrl-C too
        if begun:  # pruned weights are lost, so the way out is forward
            bake(model)
            join_parts(model)
        else:
            snapshot.restore()
        raise
    return model


def check_weights(model: nn.Module, inplace: bool) -> None:
    """Refuses what `bake` could not write, before it writes anything.

    Raises:
        NMError: a weight that M does not divide any more, of another kind or of another shape than
            its fixed mask, or, `inplace`, an inference tensor.
    """
    for ref in iter_sites(model):
        site = ref.site
        if site.lowered:
            continue
        check_parameter(ref)
        if inplace and ref.parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise NMError(
                f"{ref.name}: it was made under torch.inference_mode, so nothing may write to it; "
                f"leave out inplace=True, or call this under torch.inference_mode too"
            )


def _ready(model: nn.Module, inplace: bool) -> tuple[nn.Module, bool]:
    """The model to be folded, with nothing against it, and whether that one may be changed."""
    if isinstance(model, nn.Module):
        given, model = model, taken_over(model, inplace)
        inplace |= model is not given
    if not isinstance(model, nn.Module) or not (any(iter_sites(model)) or _was_lowered(model)):
        sites_of(model, "fold")  # tells what is wrong
    if not inplace:
        refuse_copy(model, "fold")
    reshard(model)
    check_classes(model)
    refuse_tied_since(model)
    check_weights(model, inplace)
    lowered_sites(model)  # refuse before a copy is made
    for ref in iter_sites(model):
        if not ref.site.lowered and ref.parameter.is_meta:
            raise NMError(f"{ref.name}: it is on the meta device, so there is nothing to fold")
    return model, inplace


def _was_lowered(model: nn.Module) -> bool:
    """Whether `lower` made it, perhaps with all layers dense."""
    return has_parts(model) or NOTES in marks_of(model)


@torch.no_grad()
def bake(model: nn.Module, begun: list[str] | None = None) -> None:
    """Writes the masks into all weights that are not lowered, and restores their modules.

    Called again after an interruption, it does the rest.

    Args:
        model: to be changed.
        begun: gets the names of weights before they are written to.
    """
    refs = [ref for ref in iter_sites(model) if not ref.site.lowered]
    # The largest first: if memory for its mask is there, so it is for all others.
    for ref in sorted(refs, key=lambda ref: ref.parameter.nbytes, reverse=True):
        # A DTensor that is none of inference mode cannot be detached in it.
        with torch.inference_mode(ref.parameter.is_inference()), torch.no_grad():
            masked = masked_weight(ref)
            if begun is not None:
                begun.append(ref.name)
            ref.parameter.copy_(masked)
        del masked  # before the next one is made
    restore(model)


def masked_weight(ref: SiteRef) -> Tensor:
    """The weight that a site computes with, detached: its mask applied, +0.0 elsewhere."""
    weight, site = ref.parameter.detach(), ref.site
    if site.state == "frozen":
        return keep(weight, site_mask(ref))

    def project(part: Tensor) -> Tensor:
        return nm_project(part, site.pattern, site.dim)

    if is_sharded(weight):
        return on_parts(project, site.pattern.m, site.dim, weight)
    return project(weight)
