"""Where a model meets the forms of its weights: packed and compressed, back, and their bytes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NMError
from ..huge_pages import huge_cat, huge_copy
from ..kernels import semi_structured
from ..mask import same_values
from ..packing import (
    BLOCK,
    Shape,
    as_matrix,
    check_packed,
    from_matrix,
    matrix_shape,
    pack,
    pack_conv,
    packed_bytes,
    packed_shapes,
    unpack,
    unpack_conv,
)
from ..pattern import Pattern
from .forms import packed_names
from .read_only import read_only
from .site import Site


def pack_weight(weight: Tensor, dim: int, groups: int, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """(values, index) of a dense weight that is grouped along `dim`; checked bit for bit.

    Raises:
        NMError: the weight breaks the pattern.
    """
    weight = weight.detach()
    if dim == 2 and weight.shape[1] % BLOCK == 0:  # one by one: packing takes memory
        parts = [pack_weight(matrix, 1, 1, pattern) for matrix in weight]
        values, index = (huge_cat(tensors) for tensors in zip(*parts, strict=True))
        return values, index
    values, index = (
        pack(as_matrix(weight, dim), pattern)
        if weight.ndim == 2 or dim == 2
        else pack_conv(weight, groups, pattern)
    )
    again = unpack_weight(values, index, tuple(weight.shape), dim, groups, pattern)
    if not same_values(again, weight):
        raise AssertionError("packing is not exact, please report this")
    del again
    return huge_copy(values), huge_copy(index)


def unpack_weight(
    values: Tensor,
    index: Tensor,
    shape: tuple[int, ...],
    dim: int,
    groups: int,
    pattern: Pattern,
) -> Tensor:
    """The dense weight of shape `shape`; the inverse of `pack_weight`."""
    if len(shape) > 2 and dim != 2:
        return unpack_conv(values, index, shape, groups, pattern)
    return from_matrix(unpack(values, index, *matrix_shape(shape, dim), pattern), shape, dim)


def check_weight(
    values: Tensor,
    index: Tensor,
    shape: tuple[int, ...],
    dim: int,
    groups: int,
    pattern: Pattern,
) -> None:
    """Checks tensors that claim to be the packed form of a weight of `shape`.

    Raises:
        NMError: see `nmfx.packing.check_packed`.
    """
    rows, columns = matrix_shape(shape, dim)
    for v, i in zip(values.chunk(groups), index.chunk(groups), strict=True):
        check_packed(v, i, rows // groups, columns, pattern)


def check_same_weight(
    forms: Mapping[str, Sequence[Tensor]],
    shape: tuple[int, ...],
    dim: int,
    pattern: Pattern,
    dtype: torch.dtype | None,
) -> None:
    """Checks that several forms of a linear layer's weight hold the same values.

    What cuSPARSELt compressed is left out: only its GPU reads it.

    Args:
        forms: by name the tensors of each; packed ones are checked already.
        shape, dim, pattern: of the weight.
        dtype: of the weight, if one form is semi-structured.

    Raises:
        NMError: they do not.
    """
    dense = []
    for form, tensors in forms.items():
        try:
            if form == "packed":
                dense.append(unpack_weight(tensors[0], tensors[1], shape, dim, 1, pattern))
            elif form != "semi_structured":
                dense.append(tensors[0])
            elif tensors[1].numel():
                assert dtype is not None
                dense.append(decompress_weight(tensors[0], tensors[1], shape, dim, dtype))
        except RuntimeError as error:
            raise NMError(f"its {form} tensors are none: {error}") from error
    for one, other in itertools.pairwise(dense):
        kinds = [(tuple(weight.shape), weight.dtype) for weight in (one, other)]
        if kinds[0] != kinds[1] or not same_values(one, other.to(one.device)):
            raise NMError(f"its forms {' and '.join(forms)} are not of the same weight")


def packed_weight_shapes(
    shape: tuple[int, ...], dim: int, groups: int, pattern: Pattern
) -> tuple[Shape, Shape]:
    """Shapes of (values, index) of such a weight."""
    rows, columns = matrix_shape(shape, dim)
    values, index = packed_shapes(rows // groups, columns, pattern)
    return (groups * values[0], *values[1:]), (groups * index[0], *index[1:])


def packed_weight_bytes(
    shape: tuple[int, ...], dim: int, groups: int, pattern: Pattern, itemsize: int
) -> int:
    """Bytes of such a weight when it is packed."""
    rows, columns = matrix_shape(shape, dim)
    return groups * packed_bytes(rows // groups, columns, pattern, itemsize)


def compress_weight(weight: Tensor, dim: int) -> tuple[Tensor, Tensor, str]:
    """(compressed, meta, format) of a weight that is summed over along `dim`, as a matrix.

    Raises:
        NMError: its device has no sparse tensor cores, or the form does not hold the weight.
    """
    backend = semi_structured.backend_of(weight.device)
    if isinstance(backend, str):
        raise NMError(backend)
    tensors = semi_structured.compress(as_matrix(weight, dim), backend)
    return (*tensors, semi_structured.format_of(backend, weight.dtype, weight.device))


def check_compressed(
    compressed: Tensor,
    meta: Tensor,
    shape: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    pattern: Pattern,
    format: str,
) -> None:
    """Checks tensors that claim to be the compressed form of a weight of `shape`.

    Only cuSPARSELt can read what it made.

    Raises:
        NMError: see `nmfx.kernels.semi_structured.check_cutlass`.
    """
    if format.startswith(f"{semi_structured.CUTLASS.name} "):
        sizes = matrix_shape(shape, dim)
        semi_structured.check_cutlass(compressed, meta, *sizes, dtype, pattern)


def decompress_weight(
    compressed: Tensor, meta: Tensor, shape: tuple[int, ...], dim: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight of shape `shape`; the inverse of `compress_weight`."""
    rows = semi_structured.decompress(compressed, meta, *matrix_shape(shape, dim), dtype)
    return from_matrix(rows, shape, dim)


def dense_property(site: Site) -> property:
    """The dense weight of a packed one, for code that reads it; made anew every time."""

    def read(self: Any) -> Tensor:
        values, index = (getattr(self, name) for name in packed_names(site.path))
        weight = unpack_weight(values, index, site.shape, site.dim, site.groups, site.pattern)
        return read_only(weight)

    return property(read)
