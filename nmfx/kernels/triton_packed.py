"""nmfx::linear_nm on GPUs for few rows: chooses and starts the kernels.

    2:4 of 16 bits, NVIDIA 8.0 and later    up to 64 rows        sparse (triton_sparse.py)
    1:4, 1:8, 1:16 of 16 bits, as there     up to 64 rows        single (triton_single.py)
    any N:M; 1:16 of one row                up to 16 rows        gather (triton_linear.py)
    more rows                               unpack, then a dense product

Sizes of programs and parts are those that were fastest on an H200, see `_SIZES` and `_parts`.
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
        f"packed layers run Triton kernels for up to {_GATHERED_ROWS} rows (2:4, 1:4, 1:8 and 1:16 "
        f"of 16 bits for up to {_SPARSE_ROWS}, on sparse tensor cores, but 1:16 of one row), and "
        f"are unpacked at every call for more"
    )


def most_rows(values: Tensor, n: int, m: int) -> int:
    """For how many rows `linear` is; more are for `unpack` and a dense product."""
    return _SPARSE_ROWS if uses_sparse_cores(values, n, m) else _GATHERED_ROWS


def uses_sparse_cores(values: Tensor, n: int, m: int) -> bool:
    """Whether a packed weight on a GPU is multiplied by sparse tensor cores."""
    taken = (n, m) == (2, 4) or (n == 1 and m in (4, 8, 16))
    return taken and values.dtype in (torch.float16, torch.bfloat16) and _has_mma()


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
    if uses_sparse_cores(values, n, m) and (m < 16 or rows > 1):
        few = len(values) // 2 < 2 * _processors(values.device) - 16
        kernel, sizes = _sparse, sparse_constants(n, m, rows, few)
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


def sparse_constants(n: int, m: int, rows: int, few: bool) -> dict[str, int]:
    """What `sparse` or `single` is compiled for.

    Args:
        n, m: the pattern.
        rows: of the input, up to 64.
        few: whether there are so few outputs that their programs do not fill the GPU twice.
    """
    tiles = 1 << (-(-rows // 8) - 1).bit_length()
    kind = "1:M" if m > 4 else f"{n}:{m}"
    pairs, warps, stages = _SIZES[kind, tiles][0 if few else 1]
    sizes = {"PAIRS": pairs} if kind == "2:4" else {"M": m}
    return sizes | {"TILES": tiles, "WARPS": warps, "STAGES": stages}


# (pattern, tiles of 8 rows) -> pairs of blocks that a program computes, its warps, its stages: for
# few outputs, and for many. The fastest of 4 to 11 for 4096 x 4096, 4096 x 11008 (128 pairs) and
# 11008 x 4096 (344 pairs) on an H200, see `benchmarks/results/gpu_sweep_...md`. Accumulators of
# many rows leave registers for few warps.
_SIZES = {
    ("2:4", 1): ((1, 32, 2), (1, 16, 1)),
    ("2:4", 2): ((1, 16, 2), (1, 8, 2)),
    ("2:4", 4): ((2, 8, 1), (2, 8, 1)),
    ("2:4", 8): ((2, 8, 1), (1, 4, 1)),
    ("1:4", 1): ((1, 32, 1), (1, 8, 2)),
    ("1:4", 2): ((1, 16, 2), (1, 8, 2)),
    ("1:4", 4): ((1, 8, 2), (1, 8, 1)),
    ("1:4", 8): ((1, 8, 1), (1, 4, 1)),
    ("1:M", 1): ((1, 16, 2), (1, 8, 1)),
    ("1:M", 2): ((1, 16, 2), (1, 4, 2)),
    ("1:M", 4): ((1, 8, 2), (1, 4, 1)),
    ("1:M", 8): ((1, 8, 1), (1, 4, 1)),
}

# Warps of a GPU's processor that parts may fill, by tiles of 8 rows, so that there are as many
# parts as were fastest in the same sweep: one, but for 32 and 64 rows of 2:4.
_PART_WARPS = {
    "2:4": {1: 32, 2: 24, 4: 16, 8: 8},
    "1:M": {1: 24, 2: 24, 4: 8, 8: 8},
}


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
    from . import triton_single, triton_sparse  # Triton takes a second to import

    kernel = triton_sparse.sparse if "PAIRS" in sizes else triton_single.single
    rows, columns = input.shape
    slots, words = values.shape[1], index.shape[1]
    # A thread reads 8 columns at once, of any row.
    x = F.pad(input, (0, -columns % 8)) if columns % 8 else input.contiguous()
    x, values = _aligned(x), _aligned(values)
    tiles = -(-len(values) // (2 * sizes.get("PAIRS", 1)))
    warps = sizes["WARPS"]
    while warps > 4 and warps > words:
        warps //= 2
    per_processor = _PART_WARPS["2:4" if "PAIRS" in sizes else "1:M"][sizes["TILES"]]
    parts, per_part = _parts(tiles * warps, words, warps, per_processor, values.device)
    # Outputs that only fill up a block have no legal metadata in `sparse`.
    per_word = 8 if sizes.get("M", 4) > 4 else 16
    even = slots == per_word * words and words % warps == 0 and out.shape[1] % 16 == 0
    end = _Ending(out, bias, activation, parts, 8 * sizes["TILES"])
    kernel[tiles, parts](
        *(x, values, index, end.bias, out, end.sums),
        *(rows, x.shape[1], slots, words, out.shape[1], columns, per_part),
        **(sizes | {"WARPS": warps}),
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
    warps = 8 * len(values) * heights
    parts, per_part = _parts(warps, words, sizes["WORDS"], 32, values.device)
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


def _parts(
    warps: int, length: int, step: int, per_processor: int, device: torch.device
) -> tuple[int, int]:
    """(into how many parts a sum over `length` is cut, a multiple of `step` that each has).

    Parts cost another kernel, about 2 us, so they are only for products whose `warps` are at most
    half of `per_processor` on all of them.
    """
    wanted = max(1, min(4, per_processor * _processors(device) // max(1, warps)))
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
