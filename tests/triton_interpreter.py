"""Triton's interpreter with the bfloat16 of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def rounding_bfloat16() -> Iterator[None]:
    """Rounds to the nearest, as `cvt.rn.bf16.f32` does; Triton 3.9's interpreter cuts off.

    It also loses denormals on the way to float32, and multiplies the bits of matrices. Nothing else
    of the interpreter changes, and kernels that are compiled do not come here.
    """
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        types = (src.dtype.scalar, to.scalar)
        if types == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_round(src.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return _widen(src)
        return cast(self, src, to)

    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (_widen(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


def _widen(handle: Any) -> Any:
    wide = (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _round(value: Any) -> Any:
    bits = np.array(value, dtype=np.float32).view(np.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + to_even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)
