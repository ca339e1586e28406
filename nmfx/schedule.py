"""What may change while training: lambda, N (and M), and whether the masks move at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .capture.install import check_classes, refresh
from .capture.refs import SiteRef, check_parameter, sites_of
from .capture.sharding import reshard
from .capture.site import control_name, mask_name
from .errors import NMError
from .mask import as_bits, nm_mask
from .ops.sharded import gathered, is_sharded, local_part, on_parts, placed_like, with_whole_groups
from .ops.sr_ste import project
from .pattern import Pattern
from .policy import Rules, check_lambda, parse_rules


def set_lambda(model: nn.Module, lambda_w: float) -> None:
    """Sets the strength of the SR-STE decay everywhere; nothing is traced or compiled again.

    A backward whose forward has already run uses the value of that forward.

    Args:
        model: a sparsified model.
        lambda_w: finite, >= 0; 0 is plain STE.

    Raises:
        NMError: another value, or no sparsified layer.
    """
    lambda_w = check_lambda(lambda_w)
    for ref in sites_of(model, "set_lambda"):
        ref.site.lambda_w = lambda_w
        ref.refresh_control()


def set_pattern(model: nn.Module, rules: Rules) -> None:
    """Changes the pattern of sparsified layers. A new N at the same M recompiles nothing.

    Args:
        model: a sparsified model.
        rules: a pattern for all sparsified layers, or globs over module names to patterns, of
            which the first match counts; layers that none matches keep theirs.

    Raises:
        NMError: M does not divide a layer's axis, a layer is frozen, two patterns for a tied
            weight, a rule that is None or matches no sparsified layer. Nothing is changed then.
    """
    refs = sites_of(model, "set_pattern")
    parsed = parse_rules(rules)
    for rule in parsed:
        if rule.pattern is None:
            raise NMError(f"rule {rule.glob!r}: None would make a layer dense; use nmfx.unsparsify")
        if not any(rule.matches(ref.module_name) for ref in refs):
            raise NMError(f"rule {rule.glob!r} matches no sparsified layer")
    changes: list[tuple[SiteRef, Pattern]] = []
    for ref in refs:
        pattern = next((rule.pattern for rule in parsed if rule.matches(ref.module_name)), None)
        if pattern is not None and pattern != ref.site.pattern:
            _check_change(ref, pattern)
            changes.append((ref, pattern))
    _check_tied(refs, {ref.name: pattern for ref, pattern in changes})
    if any(pattern.m != ref.site.pattern.m for ref, pattern in changes):
        check_classes(model)
    for ref, pattern in changes:
        change_pattern(ref, pattern)


def change_pattern(ref: SiteRef, pattern: Pattern) -> None:
    """Gives a site another pattern, which fits."""
    new_code = pattern.m != ref.site.pattern.m
    ref.site.pattern = pattern
    ref.refresh_control()
    if new_code:
        refresh(ref.host, ref.store)


def _check_tied(refs: list[SiteRef], changes: dict[str, Pattern]) -> None:
    """Refuses two patterns for one parameter."""
    seen: dict[int, tuple[str, Pattern]] = {}
    for ref in refs:
        pattern = changes.get(ref.name, ref.site.pattern)
        name, other = seen.setdefault(id(ref.parameter), (ref.name, pattern))
        if other != pattern:
            raise NMError(
                f"{name} and {ref.name} are one tensor, which cannot be both {other} and "
                f"{pattern}; change both"
            )


def _check_change(ref: SiteRef, pattern: Pattern) -> None:
    where = ref.module_name or "model"
    if ref.site.state == "frozen":
        raise NMError(
            f"{where}: its mask is frozen at {ref.site.pattern}; call nmfx.unfreeze first"
        )
    size = ref.site.reduced
    if size % pattern.m:
        raise NMError(
            f"{where}: its reduced axis of {size} is not a multiple of {pattern.m}, so "
            f"{pattern.text} groups would straddle it; leave it out with a glob"
        )


def freeze(model: nn.Module) -> None:
    """Fixes all masks as they are now: pruned weights get no gradient and no decay.

    Costs one select per layer instead of a ranking. Layers frozen before keep their mask. Of
    sharded weights (DTensor) every rank keeps the whole mask, one byte a weight; all must call it.

    Raises:
        NMError: no sparsified layer, or weights on the meta device.
    """
    refs = [ref for ref in sites_of(model, "freeze") if ref.site.state == "sparse"]
    for ref in refs:
        if ref.parameter.is_meta:
            raise NMError(f"{ref.name}: it is on the meta device, so it has no mask yet")
    check_classes(model)
    reshard(model)
    with torch.inference_mode(False):  # autograd must be able to save them
        fix_masks([(ref, site_mask(ref)) for ref in refs])


def unfreeze(model: nn.Module) -> None:
    """Lets the masks follow the weights again; the inverse of `freeze`, no error if none is frozen.

    Raises:
        NMError: no sparsified layer.
    """
    refs = [ref for ref in sites_of(model, "unfreeze") if ref.site.state == "frozen"]
    check_classes(model)
    free_masks(refs)


def fix_masks(masks: list[tuple[SiteRef, Tensor]]) -> None:
    """Freezes sites with these masks."""
    for ref, mask in masks:
        ref.store.__dict__[mask_name(ref.index)] = mask
    _switch([ref for ref, _ in masks], "frozen")


def free_masks(refs: list[SiteRef]) -> None:
    """Makes frozen sites sparse again."""
    _switch(refs, "sparse")
    for ref in refs:
        del ref.store.__dict__[mask_name(ref.index)]


def _switch(refs: list[SiteRef], state: str) -> None:
    for ref in refs:
        ref.site.state = state
    for host, store in {(ref.host, ref.store) for ref in refs}:
        refresh(host, store)


def masks(model: nn.Module) -> dict[str, Tensor]:
    """A snapshot of all masks, for `nmfx.sad` and for looking at.

    Masks of sharded weights (DTensor) are gathered, so that they are those of one process: all
    ranks must call it.

    Returns:
        {parameter name: bool tensor of the weight's shape, True = kept}; new tensors.

    Raises:
        NMError: no sparsified layer.
    """
    refs = sites_of(model, "masks")
    reshard(model)
    return {ref.name: site_mask(ref).clone() for ref in refs}


def masked_and_mask(ref: SiteRef) -> tuple[Tensor, Tensor]:
    """The masked weight of a site and its mask, by the kernels that training uses.

    Of a sharded weight: of the part that this process has (and of all groups of which it has a
    part, for which all ranks must call). The mask is that of `site_mask`, which plain torch
    computes, many times slower.
    """
    check_parameter(ref)
    site, weight = ref.site, weight_part(ref)
    if site.state == "frozen":
        mask = _fixed_part(ref)
        return torch.where(mask, weight, 0.0), mask
    control = ref.store.__dict__[control_name(ref.index)]
    masked = project(weight, control, site.pattern.m, site.dim)
    kept = as_bits(masked) != 0
    # Every group keeps N, so if that many are not +0.0, none of those kept is.
    if int(kept.count_nonzero()) != weight.numel() // site.pattern.m * site.pattern.n:
        kept = nm_mask(weight, site.pattern, site.dim)
    return masked, kept


def weight_part(ref: SiteRef) -> Tensor:
    """The weight of a site, detached; of a sharded one, all groups that this process has part of.

    Where those lie on several ranks, all must call.
    """
    site = ref.site
    return local_part(with_whole_groups(ref.parameter.detach(), site.pattern.m, site.dim))


def _fixed_part(ref: SiteRef) -> Tensor:
    """The fixed mask of what `weight_part` returns."""
    site, mask = ref.site, ref.store.__dict__[mask_name(ref.index)]
    weight = ref.parameter.detach()
    if not is_sharded(weight):
        return mask
    return local_part(placed_like(mask, with_whole_groups(weight, site.pattern.m, site.dim)))


def site_mask(ref: SiteRef) -> Tensor:
    """The mask in force at a site: the fixed one if it is frozen, else that of the weight now.

    It is whole on every rank, also where the weight is sharded: all ranks must call then.
    """
    site = ref.site
    if site.state == "frozen":
        return ref.store.__dict__[mask_name(ref.index)]
    check_parameter(ref)

    def find(weight: Tensor) -> Tensor:
        return nm_mask(weight, site.pattern, site.dim)

    weight = ref.parameter.detach()
    if is_sharded(weight):
        return gathered(on_parts(find, site.pattern.m, site.dim, weight))
    return find(weight)
