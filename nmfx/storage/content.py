"""Checks of a file's content that need no model: do tensors and specification fit together?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..capture.forms import compressed_names, form_names, format_name, forms_of, packed_names
from ..capture.packed import check_compressed, check_same_weight, check_weight
from ..errors import NMError
from ..kernels.semi_structured import check_algorithms
from ..mask import is_nm
from .reading import Source
from .spec import Layer, Spec
from .tensors import MASK


def read_spec(source: Source) -> Spec | None:
    """The specification of opened files, which must name the same tensors; None in others' files.

    Raises:
        NMError: a specification that is none, or of other tensors.
    """
    if source.spec is None:
        return None
    spec = Spec.from_json(source.spec)
    odd = sorted(source.files.keys() ^ spec.tensors.keys())
    if odd:
        raise NMError(f"the file and its specification disagree about {odd[0]!r}")
    return spec


def check_content(spec: Spec, tensors: Mapping[str, Tensor]) -> None:
    """Checks every N:M layer that a specification names.

    Raises:
        NMError: the layer, and what does not fit.
    """
    for name, target in spec.aliases.items():
        if target not in spec.tensors or name in spec.tensors:
            raise NMError(f"the alias {name!r} of {target!r} is none")
    masks = {name for name in spec.tensors if name.startswith(MASK)}
    fixed = {MASK + name for name, layer in spec.layers.items() if layer.state == "frozen"}
    if masks != fixed - spec.aliases.keys():
        odd = sorted(masks ^ (fixed - spec.aliases.keys()))
        raise NMError(f"{odd[0]}: a fixed mask without its layer, or the other way round")
    named = all_names(spec, tensors)
    for name, layer in spec.layers.items():
        try:
            _check_layer(name, layer, named)
        except KeyError as error:
            raise NMError(f"{name}: the file has no {error.args[0]!r}") from None
        except NMError as error:
            raise NMError(f"{name}: {error}; the file is damaged") from error


def all_names(spec: Spec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under all of their names."""
    return {**tensors, **{name: tensors[target] for name, target in spec.aliases.items()}}


def _check_layer(name: str, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
    shape, state, forms = layer.shape, layer.state, forms_of(layer.state)
    if len(shape) < 2 or shape[layer.dim] % layer.pattern.m:
        raise NMError(f"{layer.pattern} does not fit shape {shape} along dim {layer.dim}")
    if layer.groups > 1 and (len(shape) == 2 or shape[0] % layer.groups):
        raise NMError(f"{layer.groups} groups do not fit shape {shape}")
    if (layer.dtype is None) == ("semi_structured" in forms):
        raise NMError(f"its dtype is {layer.dtype}, although it is {state}")
    if layer.activation != "none" and "packed" not in forms:
        raise NMError(f"its activation is {layer.activation}, although it is {state}")
    if (layer.format != "") != ("semi_structured" in forms):
        raise NMError(f"its format is {layer.format!r}, although it is {state}")
    if layer.algorithms and "semi_structured" not in forms:
        raise NMError(f"it has algorithms, although it is {state}")
    check_algorithms(layer.algorithms)
    if (layer.threshold > 0) != (len(forms) > 1):
        raise NMError(f"its threshold is {layer.threshold}, although it is {state}")
    for form in forms:
        _CHECKS.get(form, _check_weight)(name, layer, tensors)
    if len(forms) > 1:
        if len(shape) != 2:
            raise NMError(f"no weight of the shape {shape} has two forms")
        held = {form: [tensors[key] for key in form_names(name, form)] for form in forms}
        check_same_weight(held, shape, layer.dim, layer.pattern, layer.dtype)


def _check_packed(name: str, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
    values, index = (tensors[key] for key in packed_names(name))
    if values.ndim != 3 or len(values) % layer.groups or len(index) % layer.groups:
        raise NMError(f"packed values of shape {tuple(values.shape)} are none")
    check_weight(values, index, layer.shape, layer.dim, layer.groups, layer.pattern)


def _check_compressed(name: str, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
    if len(layer.shape) > 4 or layer.groups > 1 or (len(layer.shape) > 2 and layer.dim != 1):
        raise NMError(
            f"a weight of shape {layer.shape}, groups {layer.groups} and dim {layer.dim} has no "
            f"compressed form"
        )
    for key in (*compressed_names(name), format_name(name)):
        if tensors[key].dtype != torch.uint8:
            raise NMError(f"{key} is {tensors[key].dtype}, not uint8")
    text = bytes(tensors[format_name(name)].flatten().tolist()).decode("latin1")
    if text != layer.format:
        raise NMError(f"it is called {layer.format!r} and {text!r}")
    assert layer.dtype is not None  # see `_check_layer`
    compressed, meta = (tensors[key] for key in compressed_names(name))
    check_compressed(
        *(compressed, meta, layer.shape, layer.dim, layer.dtype, layer.pattern, layer.format)
    )


def _check_weight(name: str, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
    weight = tensors[name]
    if tuple(weight.shape) != layer.shape:
        raise NMError(f"its shape is {tuple(weight.shape)}, the specification says {layer.shape}")
    if layer.state == "folded" and not is_nm(weight, layer.pattern, layer.dim):
        raise NMError(f"it is called folded and breaks {layer.pattern}")
    if layer.state == "frozen":
        check_mask(tensors[MASK + name], layer)


_CHECKS = {"packed": _check_packed, "semi_structured": _check_compressed}


def check_mask(mask: Tensor, layer: Layer) -> None:
    """Checks a fixed mask.

    Raises:
        NMError: not a bool tensor of the layer's shape, or a group that keeps more than N.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) != layer.shape:
        raise NMError(f"its mask is {mask.dtype} {tuple(mask.shape)}, not bool {layer.shape}")
    kept = mask.unflatten(layer.dim, (-1, layer.pattern.m)).sum(layer.dim + 1)
    if (kept > layer.pattern.n).any():
        raise NMError(f"its mask keeps more than {layer.pattern} allows")
