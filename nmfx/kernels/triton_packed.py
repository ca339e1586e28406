"""nmfx::linear_nm on GPUs for few rows: starts the kernels of `triton_linear.py`.

Sizes of tiles and parts are chosen by counting, as no GPU was at hand: see `_parts`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import index_bits
from . import triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_ROWS = 64  # of the input; more are for a dense product with the unpacked weight

_GATHERED_ROWS = 8
# Programs that keep every multiprocessor busy, with loads of one in flight while another adds.
_PROGRAMS_PER_PROCESSOR = 8
_FINISH = 256
_WARPS = 4
_SLOTS = 128  # of a tile of `gather`, for one row
_COLUMNS = 64  # of a tile of `expand`


def why_not(values: Tensor, m: int) -> str | None:
    """Why these kernels cannot serve a packed weight, or None when they can."""
    if values.dtype not in DTYPES:
        return f"the packed GPU kernels take float16, bfloat16 and float32, not {values.dtype}"
    return triton.why_not(values, m)


def status(device: torch.device) -> str:
    """One line for reports: what packed layers run on."""
    reason = triton.why_not_on(device)
    if reason is not None:
        return f"packed layers are unpacked at every call: {reason}"
    return (
        f"packed layers run Triton kernels for up to {MOST_ROWS} rows, and are unpacked at every "
        f"call for more (the kernels were not yet run on a GPU, so look at the outputs)"
    )


def linear(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    outputs: int,
    n: int,
    m: int,
    activation: str,
) -> Tensor:
    """activation(input W^T + bias), summed in float32.

    Args:
        input: (rows, columns), 1 to `MOST_ROWS` rows, the dtype of `values`.
        values, index: the packed (outputs, columns) weight, see `nmfx.packing`.
        bias: (outputs,) or None, any strides.
        outputs: rows of the dense weight.
        n, m: the pattern.
        activation: a key of `nmfx.ops.packed.ACTIVATIONS`.

    Returns:
        (rows, outputs), contiguous.
    """
    from . import triton_linear as kernels  # Triton takes a second to import

    rows, columns = input.shape
    blocks, slots, _ = values.shape
    words = index.shape[1]
    out = input.new_empty(rows, outputs)
    if not out.numel():
        return out
    name = "gather" if rows <= _GATHERED_ROWS else "expand"
    fixed = constants(name, n, m, rows)
    height = fixed["ROWS"]
    with torch.cuda.device_of(values):
        if name == "gather":
            # All rows of a column side by side; rows that only fill up are zeros.
            xt = F.pad(input.t(), (0, height - rows)) if rows < height else input.t()
            xt = xt.contiguous()  # no copy of a single row
            parts, per_part = _parts(values, blocks, words, fixed["WORDS"])
            sums = input.new_empty(parts, height, outputs, dtype=torch.float32)
            kernels.gather[(blocks, parts)](
                *(xt, values, index, sums, slots, words, outputs, per_part),
                **fixed,
                num_warps=_WARPS,
            )
        else:
            tiles = -(-blocks // fixed["BLOCKS"])
            parts, per_part = _parts(values, tiles, columns // m, fixed["GROUPS"])
            sums = input.new_empty(parts, height, outputs, dtype=torch.float32)
            kernels.expand[(tiles, parts)](
                *(input.contiguous(), values, index, sums),
                *(rows, slots, words, outputs, columns, per_part),
                **fixed,
                num_warps=_WARPS,
            )
        kernels.finish[(-(-outputs // _FINISH), rows)](
            *(sums, sums if bias is None else bias.contiguous(), out, parts, rows, outputs),
            ROWS=height,
            WIDE=_FINISH,
            BIAS=bias is not None,
            ACTIVATION=activation,
        )
    return out


def constants(name: str, n: int, m: int, rows: int) -> dict[str, int]:
    """What a kernel is compiled for, besides dtypes: the pattern and the sizes of a tile."""
    bits, places = index_bits(m), 1 << (m - 1).bit_length()
    fixed = {"N": n, "M": m, "BITS": bits, "ROWS": 1 << (rows - 1).bit_length()}
    if name == "gather":
        slots_of_a_word = 32 // bits
        return fixed | {"WORDS": max(1, _SLOTS // slots_of_a_word // fixed["ROWS"])}
    height = max(16, fixed["ROWS"])  # the least that tensor cores take
    groups = max(1, _COLUMNS // places)
    return fixed | {"ROWS": height, "PLACES": places, "BLOCKS": 2, "GROUPS": groups}


def _parts(values: Tensor, tiles: int, length: int, step: int) -> tuple[int, int]:
    """(into how many parts a sum over `length` is cut, a multiple of `step` that each has)."""
    wanted = -(-_PROGRAMS_PER_PROCESSOR * _processors(values.device) // tiles)
    steps = -(-length // step)
    per_part = -(-steps // max(1, min(wanted, steps // 4))) * step
    return -(-length // per_part), per_part


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter: a few parts, so that they are tested
    return torch.cuda.get_device_properties(device).multi_processor_count
