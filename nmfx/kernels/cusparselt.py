"""cuSPARSELt's product with a plan that is kept.

    descriptors of x, weight, y --> matmul --> algorithm --> plan      once for each kind of product
    plan, addresses, stream     --> kernels                            every call

torch's `_cslt_sparse_mm` does all of it at every call, which took the host 0.45 to 0.6 ms beside
an H200, where a layer of BERT-large takes 0.04 to 0.15. The library is the one that torch has
loaded, called through its C interface, which did not change from 0.7 to 0.10 in what is used here.
A thread has handles and plans of its own, as in torch.

Source: cusparseLt.h of 0.7.1, 0.8.0 and 0.10.0; torch's cuSPARSELtOps.cpp for how x W^T is put.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NAME = "libcusparseLt.so.0"
_VERSIONS = range(700, 1100)  # 0.7 to 0.10, as the library counts

# Of the header: cudaDataType, cusparseOrder_t, cusparseOperation_t, and the library's own.
_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_COLUMN_MAJOR, _ROW_MAJOR = 1, 2
_AS_IS, _TRANSPOSED = 0, 1
_HALF_IS_ZERO = 0
_SUM_IN_FLOAT32 = 2
_BIAS_POINTER = 8
_DEFAULT_ALGORITHM, _ALGORITHM_NUMBER = 0, 0

_ALIGNMENT = 16  # of all addresses, in bytes
_STRUCT = 1024  # bytes of the library's structs: 512, and 1024 before 0.8

# Plans of a thread. One is of a shape with its number of rows, and of the address of its bias, and
# took 0.9 ms and 36 KB of the host: so a layer with a bias that meets ever new numbers of rows, or
# threads that end after a call, cost more than torch's call does.
_MOST_PLANS = 2048

_ALGORITHM_DESTROY = "cusparseLtMatmulAlgSelectionDestroy"  # since 0.8
_p, _i, _u, _l = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cusparseLtInit": (_p,),
    "cusparseLtDestroy": (_p,),
    "cusparseLtStructuredDescriptorInit": (_p, _p, _l, _l, _l, _u, _i, _i, _i),
    "cusparseLtDenseDescriptorInit": (_p, _p, _l, _l, _l, _u, _i, _i),
    "cusparseLtMatDescriptorDestroy": (_p,),
    "cusparseLtMatmulDescriptorInit": (_p, _p, _i, _i, _p, _p, _p, _p, _i),
    "cusparseLtMatmulDescSetAttribute": (_p, _p, _i, _p, ctypes.c_size_t),
    "cusparseLtMatmulAlgSelectionInit": (_p, _p, _p, _i),
    "cusparseLtMatmulAlgSetAttribute": (_p, _p, _i, _p, ctypes.c_size_t),
    _ALGORITHM_DESTROY: (_p,),
    "cusparseLtMatmulPlanInit": (_p, _p, _p, _p),
    "cusparseLtMatmulPlanDestroy": (_p,),
    "cusparseLtMatmulGetWorkspace": (_p, _p, _p),
    "cusparseLtMatmul": (_p, _p, _p, _p, _p, _p, _p, _p, _p, _p, ctypes.c_int32),
}


def why_not() -> str | None:
    """Why the library cannot be called, or None when it can."""
    return None if isinstance(found := _library(), ctypes.CDLL) else found


@functools.cache
def _library() -> ctypes.CDLL | str:
    if not torch.backends.cusparselt.is_available():
        return "this torch comes without cuSPARSELt"
    version = torch.backends.cusparselt.version()
    if version not in _VERSIONS:
        return f"version {version} of cuSPARSELt is none that nmfx knows"
    try:
        # The one that is loaded: torch compressed with it. Another is as good as none.
        library = ctypes.CDLL(_NAME, mode=os.RTLD_NOLOAD)
        _declare(library)
    except (OSError, AttributeError) as error:
        return f"{_NAME} cannot be called: {error}"
    return library


def _declare(library: ctypes.CDLL) -> None:
    for name, arguments in _FUNCTIONS.items():
        if name == _ALGORITHM_DESTROY and not hasattr(library, name):
            continue
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int


class _Memory:
    """One of the library's structs."""

    def __init__(self) -> None:
        self.bytes = (ctypes.c_char * (_STRUCT + _ALIGNMENT))()
        at = ctypes.addressof(self.bytes)
        self.at = at + -at % _ALIGNMENT


class _Plan:
    """A product y = x W^T + b of given sizes, ready to run.

    Attributes:
        at, handle, stream_at: addresses for the library, the last of `stream`.
        run: the library's function.
        workspace: bytes that it needs.
    """

    def __init__(
        self,
        handle: _Memory,
        dtype: torch.dtype,
        out: int,
        into: int,
        rows: int,
        bias: int,
        algorithm: int,
    ) -> None:
        library, kind = _loaded(), _TYPES[dtype]
        self._handle, self.handle = handle, handle.at
        weight, x, y, matmul, choice, plan = memory = [_Memory() for _ in range(6)]
        ends: list[tuple[Callable[[int], int], int]] = []
        _when_forgotten(self, ends, memory, handle)

        def call(name: str, *arguments: Any) -> None:
            status = getattr(library, name)(*arguments)
            if status:
                raise RuntimeError(f"cuSPARSELt: {name} answers {status}")

        def describe(name: str, struct: _Memory, *arguments: int) -> None:
            call(f"cusparseLt{name}DescriptorInit", self.handle, struct.at, *arguments)
            ends.append((library.cusparseLtMatDescriptorDestroy, struct.at))

        describe(
            *("Structured", weight, out, into, into, _ALIGNMENT, kind, _ROW_MAJOR, _HALF_IS_ZERO)
        )
        describe("Dense", x, rows, into, into, _ALIGNMENT, kind, _ROW_MAJOR)
        describe("Dense", y, out, rows, out, _ALIGNMENT, kind, _COLUMN_MAJOR)
        call(
            "cusparseLtMatmulDescriptorInit",
            *(self.handle, matmul.at, _AS_IS, _TRANSPOSED, weight.at, x.at, y.at, y.at),
            _SUM_IN_FLOAT32,
        )
        if bias:
            self._set(call, "cusparseLtMatmulDescSetAttribute", matmul, _BIAS_POINTER, _p(bias))
        call(
            "cusparseLtMatmulAlgSelectionInit",
            *(self.handle, choice.at, matmul.at, _DEFAULT_ALGORITHM),
        )
        if hasattr(library, _ALGORITHM_DESTROY):
            ends.append((library.cusparseLtMatmulAlgSelectionDestroy, choice.at))
        number = ctypes.c_int(algorithm)
        self._set(call, "cusparseLtMatmulAlgSetAttribute", choice, _ALGORITHM_NUMBER, number)
        call("cusparseLtMatmulPlanInit", self.handle, plan.at, matmul.at, choice.at)
        ends.append((library.cusparseLtMatmulPlanDestroy, plan.at))
        size = ctypes.c_size_t()
        call("cusparseLtMatmulGetWorkspace", self.handle, plan.at, ctypes.addressof(size))
        self.at, self.workspace = plan.at, size.value
        self.run = library.cusparseLtMatmul
        self.stream = ctypes.c_void_p()  # plans are of one thread
        self.stream_at = ctypes.addressof(self.stream)

    def _set(
        self, call: Callable[..., None], name: str, struct: _Memory, attribute: int, value: Any
    ) -> None:
        size = ctypes.sizeof(value)
        call(name, self.handle, struct.at, attribute, ctypes.addressof(value), size)


def _when_forgotten(
    owner: object, ends: list[tuple[Callable[[int], int], int]], *kept: object
) -> None:
    """Gives back what `owner` holds when it is forgotten; `kept` is what that reads.

    Not while Python ends, when CUDA may be gone.
    """
    weakref.finalize(owner, _end, os.getpid(), ends, kept).atexit = False


def _end(process: int, ends: list[tuple[Callable[[int], int], int]], kept: object) -> None:
    """Gives back the last first."""
    if os.getpid() != process:  # a fork forgets what other threads had, and has no CUDA
        return
    while ends:
        destroy, at = ends.pop()
        destroy(at)


class _Thread(threading.local):
    """What a thread has made."""

    def __init__(self) -> None:
        self.handles: dict[int, _Memory] = {}
        self.plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()


_thread = _Thread()


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def _plan(device: int, *kind: Any) -> _Plan:
    """The plan of these sizes; the one that was not asked for the longest goes."""
    plans, key = _thread.plans, (device, *kind)
    plan = plans.get(key)
    if plan is not None:
        plans.move_to_end(key)
        return plan
    handle = _thread.handles.get(device)
    if handle is None:
        handle, library = _Memory(), _loaded()
        status = library.cusparseLtInit(handle.at)
        if status:
            raise RuntimeError(f"cuSPARSELt: cusparseLtInit answers {status}")
        _when_forgotten(handle, [(library.cusparseLtDestroy, handle.at)], handle.bytes)
        _thread.handles[device] = handle
    plan = plans[key] = _Plan(handle, *kind)
    if len(plans) > _MOST_PLANS:
        plans.popitem(last=False)
    return plan


_one, _zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
_ONE, _ZERO = ctypes.addressof(_one), ctypes.addressof(_zero)
_current_device = torch.cuda.current_device


def product(x: Tensor, compressed: Tensor, bias: Tensor | None, out: int, algorithm: int) -> Tensor:
    """The product x W^T + b.

    Args:
        x: (rows, in), contiguous; 8 divides rows and 16 divides in.
        compressed: what `torch._cslt_compress` made of the (out, in) weight.
        bias: (out,), contiguous, or None.
        out: rows of the weight, which 16 divides.
        algorithm: the library's number of one.

    All addresses are multiples of 16.

    Returns:
        (rows, out), contiguous.

    Raises:
        RuntimeError: the library refuses it, for example an algorithm that it does not have.
    """
    device = x.get_device()
    if device != _current_device():
        with torch.cuda.device(device):
            return _product(device, x, compressed, bias, out, algorithm)
    return _product(device, x, compressed, bias, out, algorithm)


def _product(
    device: int, x: Tensor, compressed: Tensor, bias: Tensor | None, out: int, algorithm: int
) -> Tensor:
    rows, into = x.shape
    at = 0 if bias is None else bias.data_ptr()
    plan = _plan(device, x.dtype, out, into, rows, at, algorithm)
    y = x.new_empty(rows, out)
    target = y.data_ptr()
    workspace = x.new_empty(plan.workspace, dtype=torch.uint8) if plan.workspace else None
    plan.stream.value = _stream(device)
    status = plan.run(
        *(plan.handle, plan.at, _ONE, compressed.data_ptr(), x.data_ptr(), _ZERO, target, target),
        *(None if workspace is None else workspace.data_ptr(), plan.stream_at, 1),
    )
    if status:
        raise RuntimeError(f"cuSPARSELt: cusparseLtMatmul answers {status}")
    return y


def _stream(device: int) -> int:
    """The stream that a product is queued on, as the code that Inductor writes asks for it."""
    return torch._C._cuda_getCurrentRawStream(device)
