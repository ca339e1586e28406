"""2:4 weights on the sparse tensor cores of NVIDIA GPUs: torch's, as plain tensors.

    weight (out, in)  --compress-->  compressed, meta  --multiply-->  x W^T + b

`torch.sparse.to_sparse_semi_structured` wraps the same two tensors in a subclass, which
safetensors, `.to(dtype)` and `torch.load(weights_only=True)` refuse. Two libraries stand behind it:

    cuSPARSELt   compute capability 8.0 and later; one tensor of values and metadata, `meta` is
                 empty. Only the library can read it.
    CUTLASS      8.x only; values (out, in / 2) and reordered metadata. Plain torch can read it on
                 any device, which is how all this is tested without a GPU.

Both are kept as bytes: `.half()` and `.float()` of a model would convert the metadata that
cuSPARSELt keeps among the values, like numbers, and DDP sends no 16-bit integers. `format_of` says
what the bytes are; a file that says something else is not loaded.

Neither looks at the pattern: [1, 9, 8, 7] becomes [1, 9, 0, 0] without a word, so `compress` does.
Both want shapes that divide; zeros fill up what does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from ..errors import NMError
from ..mask import is_nm, magnitude, same_values
from ..packing import matrix_shape
from ..pattern import Pattern
from . import cusparselt

PATTERN = Pattern(2, 4)
DTYPES = (torch.float16, torch.bfloat16)

# Columns that are decompressed at a time: a unit matrix of all would be larger than the weight.
_UNIT_ROWS = 1024


@dataclass(frozen=True)
class Backend:
    """A library, and what the shapes of 16-bit weights and inputs are filled up to.

    Attributes:
        name: in words.
        out, into: multiples that the weight's two sizes must be.
        rows: multiple that the number of rows of the input must be.
    """

    name: str
    out: int
    into: int
    rows: int


# The constraints of torch.sparse.SparseSemiStructuredTensor{CUSPARSELT,CUTLASS}.
CUSPARSELT = Backend("cuSPARSELt", 16, 16, 8)
CUTLASS = Backend("CUTLASS", 32, 64, 8)


# What no committed result of `benchmarks/` or run of `tests/test_gpu.py` has shown yet.
_UNTRIED = {
    CUTLASS.name: " (nmfx's use of it has not yet run on a GPU, so look at the outputs)",
    CUSPARSELT.name: " (called with less of the host's time since it last ran on a GPU)",
}


def backend_of(device: torch.device) -> Backend | str:
    """The library that serves a device, or why there is none.

    Where there are two, cuSPARSELt: torch's default, and the only one that is still extended.
    """
    if device.type != "cuda":
        return f"sparse tensor cores are on NVIDIA GPUs, the weight is on {device.type}"
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs, where nmfx has not looked into 2:4"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} has no sparse tensor cores (8.0 and later have)"
    if torch.backends.cusparselt.is_available():
        return CUSPARSELT
    if major == 8:
        return CUTLASS
    return f"this torch comes without cuSPARSELt, which compute capability {major}.{minor} needs"


def why_not(weight: Tensor, dim: int, groups: int = 1) -> str | None:
    """Why a weight cannot become semi-structured, or None when it can.

    The values are looked at, not a name: 1:4, 2:8 and 1:16 weights qualify whenever no aligned
    four hold more than two nonzeros.

    Args:
        weight: of a linear layer or a convolution.
        dim: the dimension that is summed over, 1 of a convolution.
        groups: of a convolution.
    """
    backend = backend_of(weight.device)
    if isinstance(backend, str):
        return backend
    if groups > 1:
        return f"a convolution in {groups} groups is no one product"
    if weight.dtype not in DTYPES:
        return f"semi-structured weights are float16 or bfloat16, not {weight.dtype}"
    if not weight.numel() or weight.shape[dim] % PATTERN.m:
        return f"shape {tuple(weight.shape)} has no groups of {PATTERN.m} along its inputs"
    if compressed_bytes(*matrix_shape(weight.shape, dim), backend) >= weight.nbytes:
        return f"filled up to what {backend.name} takes, it would not be smaller"
    if not is_nm(weight, PATTERN, dim):
        return "a group of 4 has more than 2 nonzeros, which sparse tensor cores need"
    if not bool(weight.isfinite().all()):
        return "it holds NaN or Inf, which would not come back out of the compressed form"
    return None


def status(device: torch.device) -> str:
    """One line for reports: what semi-structured layers run on, or why there are none."""
    backend = backend_of(device)
    if isinstance(backend, str):
        return f"no semi-structured layers: {backend}"
    text = f"semi-structured layers run on {backend.name}" + _UNTRIED.get(backend.name, "")
    if backend is CUSPARSELT and (reason := cusparselt.why_not()) is not None:
        text += f", through torch, which takes the host longer at every call: {reason}"
    return text


def format_of(backend: Backend, dtype: torch.dtype, device: torch.device) -> str:
    """What the bytes of `compress` are: the library, what they were, and for whom."""
    text = f"{backend.name} {dtype}"
    if backend is CUSPARSELT:  # its layout is nobody else's business, and may change
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        text += f" {torch.backends.cusparselt.version()} for {capability}"
    return text


def compressed_bytes(out: int, into: int, backend: Backend) -> int:
    """Bytes of a compressed 16-bit weight: half of the values, and 4 bits for each group of 4."""
    return (out + -out % backend.out) * (into + -into % backend.into) * 9 // 8


def has_size(sizes: tuple[int, ...], out: int, into: int, backend: Backend) -> bool:
    """Whether tensors of so many bytes can be (compressed, meta) of an (out, into) weight.

    The libraries see addresses only, so less would be read past its end. What cuSPARSELt makes may
    be larger than what it holds.
    """
    whole = compressed_bytes(out, into, backend)
    if backend is CUSPARSELT:
        return sizes[0] >= whole and sizes[1] == 0
    return sizes == (whole * 8 // 9, whole // 9)


def compressed_shape(
    out: int, into: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, ...]:
    """The shape of what cuSPARSELt makes of an (out, into) weight here, as bytes.

    It is torch's choice, and tells torch's product how many rows there are: with another one it may
    read past the end. So it is looked at, on a weight of zeros.
    """
    zeros = torch.zeros(out, into, dtype=dtype, device=device)
    made = torch._cslt_compress(_filled(zeros, CUSPARSELT.out, CUSPARSELT.into))
    return tuple(made.contiguous().view(torch.uint8).shape)


def check_cutlass(
    compressed: Tensor, meta: Tensor, out: int, into: int, dtype: torch.dtype, pattern: Pattern
) -> None:
    """Checks bytes that claim to be (compressed, meta) of an (out, into) weight.

    Each group of 4 has two values and 4 bits: the place of the first, that of the second. Where a
    group stands in `meta` is shuffled, but all of them must be legal, and the values are in order.

    Raises:
        NMError: other dtypes or shapes; places that are not in order; a value where the weight is
            filled up; more nonzeros than `pattern` allows.
    """
    if dtype not in DTYPES or into % PATTERN.m:
        raise NMError(f"{dtype} of shape ({out}, {into}) has no semi-structured form")
    rows, columns = out + -out % CUTLASS.out, into + -into % CUTLASS.into
    for tensor, shape in ((compressed, (rows, columns)), (meta, (rows, columns // 8))):
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != shape:
            raise NMError(f"{tensor.dtype} {tuple(tensor.shape)} is not uint8 {shape}")
    low, high = meta & 15, meta >> 4
    if not all(bool(((pair & 3) < (pair >> 2)).all()) for pair in (low, high)):
        raise NMError("its metadata put a second value at or before the place of the first")
    nonzero = magnitude(compressed.contiguous().view(dtype)) != 0
    if bool(nonzero[out:].any()) or bool(nonzero[:, into // 2 :].any()):
        raise NMError("where it is filled up it is not zero")
    if pattern.m % PATTERN.m == 0:  # a group of the pattern is some groups of 4
        kept = nonzero[:out, : into // 2].unflatten(1, (-1, pattern.m // 2)).sum(2)
        fits = not bool((kept > pattern.n).any())
    else:
        fits = is_nm(decompress(compressed, meta, out, into, dtype), pattern, 1)
    if not fits:
        raise NMError(f"it has more nonzeros in a group than {pattern} allows")


def compress(weight: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
    """The two tensors of a weight (out, in) that `why_not` has nothing against.

    Returns:
        (compressed, meta), both uint8; `meta` is empty for cuSPARSELt.

    Raises:
        NMError: decompressed they are not the weight.
    """
    weight = weight.detach()
    out, into = weight.shape
    filled = _filled(weight, backend.out, backend.into)
    if backend is CUSPARSELT:
        compressed = torch._cslt_compress(filled)
        meta = torch.empty(0, dtype=torch.uint8, device=weight.device)
    else:
        compressed, meta = sparse_semi_structured_from_dense_cutlass(filled)
        meta = meta.contiguous().view(torch.uint8)
    compressed = compressed.contiguous().view(torch.uint8)
    if not same_values(decompress(compressed, meta, out, into, weight.dtype), weight):
        raise NMError(
            f"{backend.name} does not give back a ({out}, {into}) weight that it compressed"
        )
    return compressed, meta


def decompress(compressed: Tensor, meta: Tensor, out: int, into: int, dtype: torch.dtype) -> Tensor:
    """The dense (out, in) weight; `dtype` is what it had.

    Raises:
        NMError: compressed by cuSPARSELt and no longer on a GPU.
    """
    if meta.numel():
        values, places = compressed.view(dtype), meta.view(torch.int16)
        return sparse_semi_structured_to_dense_cutlass(values, places)[:out, :into]
    # The library multiplies, and there is no other way to read it. Products with 0 and 1 are exact.
    dense = compressed.new_empty(out, into, dtype=dtype)
    for begin in range(0, into, _UNIT_ROWS):
        rows = min(_UNIT_ROWS, into - begin)
        unit = dense.new_zeros(rows, into)
        unit[:, begin : begin + rows].fill_diagonal_(1.0)
        dense[:, begin : begin + rows] = multiply(unit, compressed, meta, None, out).t()
    return dense


def multiply(
    input: Tensor,
    compressed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    out: int,
    algorithm: int = 0,
) -> Tensor:
    """`F.linear(input, weight, bias)`.

    Args:
        input: (rows, in), the dtype of the weight.
        compressed, meta: from `compress`.
        bias: (out,) or None, any strides.
        out: rows of the dense weight.
        algorithm: of cuSPARSELt, one of `algorithms`; CUTLASS has none.

    Returns:
        (rows, out), contiguous.

    Raises:
        NMError: compressed by cuSPARSELt and no longer on a GPU, or too few bytes for the sizes.
    """
    rows, into = input.shape
    if not _on_gpu(input):
        if meta.numel():
            return F.linear(input, decompress(compressed, meta, out, into, input.dtype), bias)
        raise NMError(
            f"a weight that cuSPARSELt compressed runs on the GPU it was compressed on, and is now "
            f"on {input.device}: move the model back; there, nmfx.fold(model) makes it dense again"
        )
    compressed = _aligned(compressed)
    backend = CUTLASS if meta.numel() else CUSPARSELT
    if not rows:
        return input.new_empty(0, out)
    x = _aligned(_filled(input, backend.rows, backend.into))
    if bias is not None:
        bias = F.pad(bias, (0, -out % backend.out)) if out % backend.out else _aligned(bias)
    if backend is CUSPARSELT and cusparselt.why_not() is None:
        least = compressed_bytes(out, into, backend)
        if compressed.numel() < least:  # it would be read past its end
            raise NMError(
                f"{compressed.numel()} bytes are no compressed ({out}, {into}) weight, which takes "
                f"{least}"
            )
        filled = out + -out % backend.out
        y = cusparselt.product(x, compressed, bias, filled, algorithm)
        return y if filled == out and x.shape[0] == rows else y[:rows, :out].contiguous()
    compressed = compressed.view(input.dtype)
    if backend is CUSPARSELT:
        y = torch._cslt_sparse_mm(
            compressed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm
        )
    elif bias is None:
        y = torch._sparse_semi_structured_mm(compressed, meta.view(torch.int16), x.t()).t()
    else:
        places = meta.view(torch.int16)
        y = torch._sparse_semi_structured_addmm(bias, compressed, places, x.t()).t()
    return y[:rows, :out].contiguous()


# More than any cuSPARSELt has: 0.8 refused 21 on an H200.
_MOST_ALGORITHMS = 64


def algorithms(input: Tensor, compressed: Tensor, meta: Tensor, out: int) -> Iterator[int]:
    """The algorithms that the library has for a product; arguments as for `multiply`.

    Which is fastest depends on the sizes. On an H200 number 0, torch's default, was slower than
    dense at 2048 rows and more, wherever it was tried; the best was up to 1.5 times as fast.
    """
    if meta.numel() or not _on_gpu(input):
        yield 0
        return
    for number in range(_MOST_ALGORITHMS):
        try:
            multiply(input, compressed, meta, None, out, number)
        except RuntimeError:  # what the library answers to numbers that it does not have
            if number == 0:
                raise
            return
        yield number


def algorithm_for(rows: int, algorithms: Sequence[int]) -> int:
    """The algorithm for so many rows.

    Args:
        rows: of the input.
        algorithms: rows, algorithm, rows, algorithm ... as measured, rows increasing; or empty.

    Returns:
        That of the nearest number of rows, in ratio; 0 if there is none.
    """
    if len(algorithms) == 2:
        return algorithms[1]
    best, found = 0.0, 0
    for at in range(0, len(algorithms), 2):
        low, high = sorted((max(1, rows), max(1, algorithms[at])))
        if low / high > best:
            best, found = low / high, algorithms[at + 1]
    return found


def check_algorithms(algorithms: Sequence[int]) -> None:
    """Checks what claims to be the second argument of `algorithm_for`.

    Raises:
        NMError: not pairs, rows that do not increase, or a number that no library has.
    """
    rows, numbers = algorithms[::2], algorithms[1::2]
    fits = len(rows) == len(numbers) and list(rows) == sorted(set(rows))
    if not fits or not all(0 <= number < _MOST_ALGORITHMS for number in numbers):
        raise NMError(f"algorithms={list(algorithms)} are not rows, algorithm, rows, algorithm ...")


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous and aligned to 16 bytes: all that the libraries see is its address."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _on_gpu(input: Tensor) -> bool:
    return input.is_cuda


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """`matrix`, contiguous, with zeros up to multiples; no copy of one that fits."""
    below, right = -matrix.shape[0] % rows, -matrix.shape[1] % columns
    return (F.pad(matrix, (0, right, 0, below)) if below or right else matrix).contiguous()
