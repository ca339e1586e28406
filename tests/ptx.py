"""`triton_ptx.py` in numpy, from NVIDIA's description, for Triton's interpreter.

Fragments as in the PTX ISA ("Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16"): lane
l has group g = l / 4 and place t = l % 4. Every function sees one number per thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from nmfx.kernels import triton_single, triton_sparse

_G, _T = np.arange(32) // 4, np.arange(32) % 4


def _data(tensor: Any) -> np.ndarray:
    return np.atleast_1d(tensor.handle.data)


def _tensor(data: np.ndarray, kind: Any = tl.int32) -> Any:
    handle = TensorHandle(data, kind)
    return tl.tensor(handle, tl.block_type(kind, list(data.shape)))


def _read(at: np.ndarray, exists: np.ndarray, count: int) -> list[Any]:
    found = np.zeros((len(at), count), np.int32)
    for i in np.flatnonzero(exists):
        assert at[i] % (4 * count) == 0, "a load that is not aligned"
        found[i] = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(int(at[i])))
    return [_tensor(found[:, k].copy()) for k in range(count)]


def load4(at: Any, exists: Any, all_exist: Any, once: Any) -> tuple[Any, ...]:
    here = _data(exists) if not _plain(all_exist) else np.ones(len(_data(at)), bool)
    return tuple(_read(_data(at), here, 4))


def load2(at: Any, exists: Any, all_exist: Any) -> tuple[Any, ...]:
    here = _data(exists) if not _plain(all_exist) else np.ones(len(_data(at)), bool)
    return tuple(_read(_data(at), here, 2))


def load1(at: Any, exists: Any, all_exist: Any) -> Any:
    here = _data(exists) if not _plain(all_exist) else np.ones(len(_data(at)), bool)
    return _read(_data(at), here, 1)[0]


def _plain(constant: Any) -> Any:
    return getattr(constant, "value", constant)


def transpose(registers: Any) -> tuple[Any, ...]:
    """movmatrix.trans: lane l holds elements 2t and 2t + 1 of row g, low half first."""
    turned = []
    for register in registers:
        warps = _data(register).view(np.uint32).reshape(-1, 32)
        matrix = np.zeros((len(warps), 8, 8), np.uint32)
        matrix[:, _G, 2 * _T], matrix[:, _G, 2 * _T + 1] = warps & 0xFFFF, warps >> 16
        matrix = matrix.transpose(0, 2, 1)
        result = matrix[:, _G, 2 * _T] | matrix[:, _G, 2 * _T + 1] << np.uint32(16)
        turned.append(_tensor(result.astype(np.uint32).view(np.int32).reshape(-1)))
    return tuple(turned)


def from_neighbour(a: Any) -> Any:
    """shfl.bfly by 1."""
    return _tensor(_data(a).reshape(-1, 2)[:, ::-1].reshape(-1).copy())


def bytes_of(a: Any, b: Any, which: Any) -> Any:
    """prmt: digit i of `which` names byte i of the result among b7..b4 of b and b3..b0 of a."""
    words = [_data(x).view(np.uint32) for x in (a, b)]
    source = np.stack([word >> np.uint32(8 * i) & 0xFF for word in words for i in range(4)], 1)
    digits = np.stack([_data(which) >> (4 * i) & 7 for i in range(4)], 1)
    picked = np.take_along_axis(source, digits, 1).astype(np.uint32)
    result = sum(picked[:, i] << np.uint32(8 * i) for i in range(4))
    return _tensor(np.asarray(result, np.uint32).view(np.int32))


def equal_halves(a: Any, b: Any) -> Any:
    """set.eq.u32.f16x2."""
    halves = [np.broadcast_to(_data(x), _data(a).shape).copy().view(np.float16) for x in (a, b)]
    return _tensor(np.where(halves[0] == halves[1], np.uint16(0xFFFF), np.uint16(0)).view(np.int32))


def multiply(a: Any, b: Any, c: Any, e: Any, bf16: Any, second: Any) -> tuple[Any, ...]:
    """mma.sp.m16n8k32: c + A B, A with two kept of every four."""
    widen = _widen if _plain(bf16) else lambda x: x.astype(np.uint16).view(np.float16)
    a, b, c = ([_data(x).reshape(-1, 32) for x in part] for part in (a, b, c))
    meta = _data(e).view(np.uint32).reshape(-1, 32)
    warps = len(meta)
    kept = np.zeros((warps, 16, 16), np.float64)
    for i, register in enumerate(a):  # rows g and g + 8, then kept columns from 8 on
        bits = register.view(np.uint32)
        for half in range(2):
            value = widen(bits >> np.uint32(16 * half) & 0xFFFF)
            kept[:, _G + 8 * (i % 2), 2 * _T + half + 8 * (i // 2)] = value
    matrix = np.zeros((warps, 32, 8), np.float64)
    for i, register in enumerate(b):
        bits = register.view(np.uint32)
        for half in range(2):
            value = widen(bits >> np.uint32(16 * half) & 0xFFFF)
            matrix[:, 2 * _T + half + 8 * i, _G] = value
    dense = np.zeros((warps, 16, 32), np.float64)
    for half in range(2):  # which thread of the pair gives the metadata: of quads 0-3 or 4-7
        giver = meta[:, 4 * np.arange(8) + 2 * int(_plain(second)) + half]
        for quad in range(4):
            for high in range(2):
                nibble = giver >> np.uint32(16 * high + 4 * quad) & 0xF
                first, last = nibble & 3, nibble >> np.uint32(2)
                assert (first < last).all(), "indices of a quad do not increase"
                w, g = np.indices(nibble.shape)
                for place, slot in ((first, 0), (last, 1)):
                    columns = 4 * (4 * half + quad) + place
                    dense[w, g + 8 * high, columns] = kept[
                        :, 8 * high : 8 * high + 8, 2 * (4 * half + quad) + slot
                    ]
    product = dense @ matrix
    result = []
    for i, old in enumerate(c):
        new = old + product[:, _G + 8 * (i // 2), 2 * _T + i % 2]
        result.append(_tensor(new.astype(np.float32).reshape(-1), tl.float32))
    return tuple(result)


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


EMULATED: dict[str, Callable[..., Any]] = {
    "load4": load4,
    "load2": load2,
    "load1": load1,
    "transpose": transpose,
    "from_neighbour": from_neighbour,
    "pick_bytes": bytes_of,
    "equal_halves": equal_halves,
    "multiply": multiply,
}


@contextmanager
def emulated() -> Iterator[None]:
    """Within the block `sparse` and `single` run in Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (triton_sparse, triton_single):
            for name, function in EMULATED.items():
                if hasattr(module, name):
                    patch.setattr(module, name, function)
        yield
