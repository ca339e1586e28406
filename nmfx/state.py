"""nmfx.state_dict and nmfx.load_state_dict: what a plain state_dict does not hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .capture.install import check_classes
from .capture.refs import sites_of
from .capture.site import mask_name
from .errors import NMError
from .pattern import Pattern
from .policy import check_lambda
from .storage.content import check_mask
from .storage.restructure import schedule
from .storage.snapshot import Snapshot
from .storage.spec import Layer
from .storage.wrapped import refuse_wrapped

_VERSION = 1


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Patterns, lambda, and the masks of frozen layers, to be saved beside `model.state_dict()`.

        torch.save({"model": model.state_dict(), "nmfx": nmfx.state_dict(model), ...}, path)

    Args:
        model: a sparsified model.

    Returns:
        {"version": 1, "layers": {name: {"pattern", "lambda_w", "state"}}, "masks": {name: bool
        tensor}}: plain values and tensors, which `torch.load(weights_only=True)` reads. The masks
        are the model's own, not copies.

    Raises:
        NMError: no sparsified layer.
    """
    refs = sites_of(model, "state_dict")
    return {
        "version": _VERSION,
        "layers": {
            ref.name: {
                "pattern": ref.site.pattern.text,
                "lambda_w": ref.site.lambda_w,
                "state": ref.site.state,
            }
            for ref in refs
        },
        "masks": {
            ref.name: ref.store.__dict__[mask_name(ref.index)]
            for ref in refs
            if ref.site.state == "frozen"
        },
    }


def load_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Gives a sparsified model what `nmfx.state_dict` returned: patterns, lambda and fixed masks.

    Weights are not in it: load `model.state_dict()` too, in any order.

    Args:
        model: sparsified, with the same layers; their patterns may differ.
        state: from `nmfx.state_dict`.

    Raises:
        NMError: another model, or a state that is none. The model is unchanged then.
    """
    refs = {ref.name: ref for ref in sites_of(model, "load_state_dict")}
    check_classes(model)
    if not isinstance(state, dict) or state.get("version") != _VERSION:
        version = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise NMError(f"the state is not one of nmfx.state_dict (version {version!r})")
    given, masks = state.get("layers"), state.get("masks")
    if not isinstance(given, dict) or not isinstance(masks, dict):
        raise NMError("the state has no 'layers' and 'masks', as nmfx.state_dict returns them")
    refuse_wrapped(refs, map(str, given), "the state of nmfx.state_dict")
    odd = sorted(map(str, given.keys() ^ refs.keys()))
    if odd:
        raise NMError(f"{odd[0]}: sparsified either in the model or in the state, not in both")
    layers = {}
    for name, one in given.items():
        try:
            site, pattern = refs[name].site, Pattern.parse(one["pattern"])
            lambda_w, kind = check_lambda(one["lambda_w"]), one["state"]
            if site.reduced % pattern.m:
                raise NMError(f"{pattern} does not fit its axis of {site.reduced}")
            if kind not in ("sparse", "frozen"):
                raise NMError(f"its state is {kind!r}, neither 'sparse' nor 'frozen'")
            layers[name] = Layer(
                pattern, kind, site.kind, site.capture, site.shape, site.dim, site.groups, lambda_w
            )
            if kind == "frozen":
                check_mask(masks[name], layers[name])
        except (LookupError, TypeError, AttributeError, OverflowError, NMError) as error:
            raise NMError(f"{name}: {error}") from error
    snapshot = Snapshot(model)
    try:
        with torch.inference_mode(False):  # autograd must be able to save what it makes
            schedule(refs, layers, masks)
    except BaseException:  # Ctrl-C too
        snapshot.restore()
        raise
