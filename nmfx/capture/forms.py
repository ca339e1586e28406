"""The forms that a lowered weight is held in, and the names of the tensors that hold it.

Of a parameter "weight":

    packed              weight_values, weight_index
    semi_structured     weight_compressed, weight_meta, weight_format
    dense, prepacked    weight
"""

from __future__ import annotations

import torch
from torch import Tensor

# A weight held twice: the form for few rows of input + the form for many. Packed reads the fewest
# bytes, so it is the one for few; which of the others serves few rows better is measured.
TWO_FORMS = (
    "packed+semi_structured",
    "packed+dense",
    "semi_structured+dense",
    "dense+semi_structured",
)


def packed_names(path: str) -> tuple[str, str]:
    """The buffers that replace a parameter when it is packed: (values, index)."""
    return f"{path}_values", f"{path}_index"


def compressed_names(path: str) -> tuple[str, str]:
    """The buffers that replace a semi-structured parameter: (compressed, meta)."""
    return f"{path}_compressed", f"{path}_meta"


def format_name(path: str) -> str:
    """The buffer that says in a file what those bytes are: `Site.format`."""
    return f"{path}_format"


def format_tensor(text: str) -> Tensor:
    """A site's format as the bytes of a buffer, so that files carry it."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def forms_of(state: str) -> tuple[str, ...]:
    """The forms that a weight in a state is held in: one, or two of `TWO_FORMS`."""
    return tuple(state.split("+"))


def form_names(path: str, form: str) -> tuple[str, ...]:
    """The tensors that hold a weight in a form."""
    if form == "packed":
        return packed_names(path)
    return compressed_names(path) if form == "semi_structured" else (path,)
