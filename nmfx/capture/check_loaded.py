"""What a state_dict may put into a lowered layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NMError
from .forms import compressed_names, form_names, format_name, forms_of, packed_names
from .packed import check_compressed, check_same_weight, check_weight, packed_weight_shapes
from .site import SITES, Site, stored_names


def check_loaded(store: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuses packed tensors that are none, before they are copied into a layer.

    Args:
        store: where the sites are.
        state_dict, prefix: with the names that the host of the sites has there.

    Raises:
        NMError: an index outside its group, and all else that `check_packed` and `check_cutlass`
            find.
    """
    for site in store.__dict__.get(SITES, ()):
        forms = forms_of(site.state)
        if "semi_structured" in forms:
            _check_format(site, state_dict, prefix)
        if "packed" in forms:
            _check_packed(site, state_dict, prefix)
        if len(forms) > 1:
            _check_forms(site, state_dict, prefix)


def _check_packed(site: Site, state_dict: dict[str, Any], prefix: str) -> None:
    names = packed_names(site.path)
    values, index = (state_dict.get(prefix + name) for name in names)
    own = packed_weight_shapes(site.shape, site.dim, site.groups, site.pattern)
    if not (isinstance(values, Tensor) and isinstance(index, Tensor)):
        return  # torch tells what is missing, and what has another size
    if (values.shape, index.shape) != own:
        return
    try:
        check_weight(values, index, site.shape, site.dim, site.groups, site.pattern)
    except NMError as error:
        raise NMError(f"{prefix}{site.path}: {error}; the file is damaged") from error


def _check_forms(site: Site, state_dict: dict[str, Any], prefix: str) -> None:
    """Both forms of a weight or none, as one alone would leave the other behind."""
    names = stored_names(site)
    given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
    if not given:
        return
    if len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise NMError(
            f"{prefix}{site.path}: this layer holds its weight as {site.state}, and what is to be "
            f"loaded has no {prefix}{missing}; load both forms, or lower the dense model again"
        )
    try:
        check_same_weight(
            {
                form: [given[name] for name in form_names(site.path, form)]
                for form in forms_of(site.state)
            },
            site.shape,
            site.dim,
            site.pattern,
            site.dtype,
        )
    except NMError as error:
        raise NMError(f"{prefix}{site.path}: {error}") from error


def _check_format(site: Site, state_dict: dict[str, Any], prefix: str) -> None:
    names = [prefix + name for name in compressed_names(site.path)]
    given = [state_dict[name] for name in names if name in state_dict]
    if not given:
        return  # torch tells what is missing
    found = state_dict.get(prefix + format_name(site.path))
    text = "something that it does not name"
    if found is not None and found.dtype == torch.uint8:
        text = bytes(found.flatten().tolist()).decode("latin1")
    if text != site.format or any(tensor.dtype != torch.uint8 for tensor in given):
        raise NMError(
            f"{prefix}{site.path}: this layer holds {site.format}, and what is to be loaded was "
            f"compressed as {text} ({', '.join(str(tensor.dtype) for tensor in given)}); lower the "
            f"dense model here"
        )
    if len(given) == len(names):
        assert site.dtype is not None
        own = site.shape, site.dim, site.dtype, site.pattern, site.format
        try:
            check_compressed(given[0], given[1], *own)
        except NMError as error:
            raise NMError(f"{prefix}{site.path}: {error}; the file is damaged") from error
