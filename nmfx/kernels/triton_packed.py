"""nmfx::linear_nm on GPUs for few rows: chooses and starts the kernels.

    2:4, 1:4 of 16 bits, NVIDIA 8.0 and later    up to 64 rows    sparse (triton_sparse.py)
    any N:M                                      up to 16 rows    gather (triton_linear.py)
    more rows                                    unpack, then a dense product

Sizes of tiles and parts are those that were fastest on an H200, see `_warps` and `_parts`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import packing
from ..pattern import Pattern
from . import triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Of the input; more are for a dense product with the unpacked weight.
_SPARSE_ROWS = 64
_GATHERED_ROWS = 16

_ROWS_AT_ONCE = 8
_FINISH = 256
_UNPACKED_GROUPS = 32
_MOST_UNROLLED = 64  # steps of `unpack`, which its compiler takes seconds for


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
        f"packed layers run Triton kernels for up to {_GATHERED_ROWS} rows (2:4 and 1:4 of 16 "
        f"bits for up to {_SPARSE_ROWS}, on sparse tensor cores), and are unpacked at every call "
        f"for more"
    )


def most_rows(values: Tensor, n: int, m: int) -> int:
    """For how many rows `linear` is; more are for `unpack` and a dense product."""
    return _SPARSE_ROWS if uses_sparse_cores(values, n, m) else _GATHERED_ROWS


def uses_sparse_cores(values: Tensor, n: int, m: int) -> bool:
    """Whether a packed weight on a GPU is multiplied by `triton_sparse.py`."""
    return m == 4 and n <= 2 and values.dtype in (torch.float16, torch.bfloat16) and _has_mma()


@functools.cache
def _has_mma() -> bool:
    return torch.version.hip is None


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
        input: (rows, columns), 1 to `most_rows` rows, the dtype of `values`.
        values, index: the packed (outputs, columns) weight, see `nmfx.packing`.
        bias: (outputs,) or None, any strides.
        outputs: rows of the dense weight.
        n, m: the pattern.
        activation: a key of `nmfx.ops.packed.ACTIVATIONS`.

    Returns:
        (rows, outputs), contiguous.
    """
    rows, columns = input.shape
    out = input.new_empty(rows, outputs)
    if not out.numel() or not columns:
        return out
    if uses_sparse_cores(values, n, m):
        kernel, sizes = _sparse, sparse_constants(n, rows)
    else:
        kernel, sizes = _gather, gather_constants(n, m, rows)
    vector = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(values):
        kernel(input, values, index, vector, out, sizes, activation)
    return out


def unpack(values: Tensor, index: Tensor, outputs: int, columns: int, n: int, m: int) -> Tensor:
    """The dense (outputs, columns) weight; `nmfx.packing.unpack`, bit for bit."""
    if n * -(-m // 4) > _MOST_UNROLLED:
        return packing.unpack(values, index, outputs, columns, Pattern(n, m))
    from . import triton_linear as kernels

    out = values.new_empty(outputs, columns)
    if out.numel():
        groups = columns // m
        with torch.cuda.device_of(values):
            kernels.unpack[(len(values), -(-groups // _UNPACKED_GROUPS))](
                *(values, index, out, values.shape[1], index.shape[1], outputs, columns),
                N=n,
                M=m,
                BITS=packing.index_bits(m),
                GROUPS=_UNPACKED_GROUPS,
                EVEN=groups % _UNPACKED_GROUPS == 0,
            )
    return out


def sparse_constants(n: int, rows: int) -> dict[str, int]:
    """What `sparse` is compiled for; its warps are for `_sparse` to choose."""
    return {"N": n, "TILES": 1 << (-(-rows // 8) - 1).bit_length()}


def gather_constants(n: int, m: int, rows: int) -> dict[str, int]:
    """What `gather` is compiled for: the pattern, and 8 values per thread of 8 warps."""
    bits = packing.index_bits(m)
    height = min(_ROWS_AT_ONCE, 1 << (rows - 1).bit_length())
    sizes = {"N": n, "M": m, "BITS": bits, "ROWS": height}
    return sizes | {"WORDS": 8 * 32 * 8 // (16 * (32 // bits)), "num_warps": 8, "num_stages": 1}


def _sparse(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sizes: dict[str, int],
    activation: str,
) -> None:
    from . import triton_sparse as kernels  # Triton takes a second to import

    rows, columns = input.shape
    slots, words = values.shape[1], index.shape[1]
    # A thread reads 8 columns at once, of any row.
    x = F.pad(input, (0, -columns % 8)) if columns % 8 else input.contiguous()
    x, values = _aligned(x), _aligned(values)
    tiles = -(-len(values) // 2)
    warps = _warps(tiles, words, sizes, values.device)
    parts, per_part = _parts(tiles * warps, words, warps, values.device)
    # Outputs that only fill up a block have no legal metadata.
    even = slots == 16 * words and words % warps == 0 and out.shape[1] % 16 == 0
    grid, end = (tiles, parts), _Ending(out, bias, activation, parts, 8 * sizes["TILES"])
    kernels.sparse[grid](
        *(x, values, index, end.bias, out, end.sums),
        *(rows, x.shape[1], slots, words, out.shape[1], columns, per_part),
        **sizes,
        WARPS=warps,
        EVEN=even,
        BF16=values.dtype == torch.bfloat16,
        **end.constants,
        num_warps=warps,
    )
    end.finish()


def _gather(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sizes: dict[str, int],
    activation: str,
) -> None:
    from . import triton_linear as kernels

    rows, columns = input.shape
    slots, words = values.shape[1], index.shape[1]
    heights = -(-rows // sizes["ROWS"])
    parts, per_part = _parts(8 * len(values) * heights, words, sizes["WORDS"], values.device)
    end = _Ending(out, bias, activation, parts, heights * sizes["ROWS"])
    kernels.gather[(len(values), parts, heights)](
        *(input.contiguous(), values, index, end.bias, out, end.sums),
        *(rows, slots, words, out.shape[1], columns, per_part),
        **sizes,
        EVEN=slots == words * (32 // sizes["BITS"]) and words % sizes["WORDS"] == 0,
        **end.constants,
    )
    end.finish()


class _Ending:
    """How a product ends: in its own kernel, or with parts that `finish` adds.

    Attributes:
        bias, sums: the kernel's arguments; any tensor where it reads none.
        constants: what the kernel is compiled for.
    """

    def __init__(
        self, out: Tensor, bias: Tensor | None, activation: str, parts: int, height: int
    ) -> None:
        self._out, self._parts, self._height = out, parts, height
        self._last: dict[str, Any] = {"BIAS": bias is not None, "ACTIVATION": activation}
        self.bias = out if bias is None else bias
        self.sums = out
        self.constants: dict[str, Any] = {"SPLIT": False, **self._last}
        if parts > 1:
            self.sums = out.new_empty(parts, height, out.shape[1], dtype=torch.float32)
            self.constants = {"SPLIT": True, "BIAS": False, "ACTIVATION": "none"}

    def finish(self) -> None:
        """Adds the parts, if there are several."""
        if self._parts == 1:
            return
        from . import triton_linear as kernels

        rows, outputs = self._out.shape
        kernels.finish[(-(-outputs // _FINISH), rows)](
            *(self.sums, self.bias, self._out, self._parts, rows, outputs),
            ROWS=self._height,
            WIDE=_FINISH,
            **self._last,
        )


def _warps(tiles: int, words: int, sizes: dict[str, int], device: torch.device) -> int:
    """Warps of a program of `sparse`: twice as many where there are few programs.

    For one row of 11008 outputs and 4096 columns on an H200: 2:4 in 15.0 us with 16 warps (8: 15.1,
    32: more), 1:4, which computes more for a byte, in 12.0 us with 8 (16: 14.1). Accumulators of
    many rows leave registers for few warps.
    """
    most = 16 if sizes["N"] == 2 and sizes["TILES"] == 1 else 8
    if tiles < 2 * _processors(device) - 16 and sizes["TILES"] <= 2:
        most *= 2
    while most > 4 and most > words:
        most //= 2
    return most


def _parts(warps: int, length: int, step: int, device: torch.device) -> tuple[int, int]:
    """(into how many parts a sum over `length` is cut, a multiple of `step` that each has).

    Parts cost another kernel, about 2 us, so they are only for products whose `warps` leave most
    of a GPU idle.
    """
    wanted = max(1, min(4, 32 * _processors(device) // max(1, warps)))
    steps = -(-length // step)
    per_part = -(-steps // max(1, min(wanted, steps // 4))) * step
    return -(-length // per_part), per_part


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, at an address that 16 divides."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter: a few parts, so that they are tested
    return torch.cuda.get_device_properties(device).multi_processor_count
