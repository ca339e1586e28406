"""The native CPU kernels: one library for several instruction sets, chosen when it is loaded.

    src/few.h     few rows, AVX2: lane = output row, activations found by permutation
    src/windows.h the same with AVX-512, for many rows too; blocks.h what both share
    src/panel.h   many rows and convolutions: lane = position, activations found by address
    src/isa_*.cpp the instructions they are made of, one file per instruction set; that of AMX adds
                  a kernel that expands bfloat16 weights into tiles
    src/driver.cpp pieces and threads      src/dispatch.cpp which instruction set
    src/masks.h   masks of weights in training: mask_groups.h which elements are kept,
                  mask_apply.h what is done with them; masks_*.cpp for each instruction set
    src/pool.h    memory for large results, kept for the next
    src/packed_ops.cpp nmfx::linear_nm, nmfx::conv_nm   src/mask_ops.cpp nmfx::sr_ste and gradients
    build.py      compiles it all

`NMFX_CPU_ISA` pins one of `NAMES`, or "none" for no native kernels.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from ... import huge_pages
from ...errors import NMError

LIBRARY = Path(__file__).parent / "_native.so"
NAMES = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
VARIABLE = "NMFX_CPU_ISA"

_library: ctypes.CDLL | None = None
_missing = "not loaded yet"


def load() -> None:
    """Loads the library, which registers its kernels for CPU tensors; the ops must be defined.

    Without a library the plain-torch kernels stay, and `status` says why.

    Raises:
        NMError: NMFX_CPU_ISA names no instruction set, or one this machine lacks.
    """
    global _library, _missing
    pinned = os.environ.get(VARIABLE, "")
    if pinned not in ("", "none", *NAMES):
        raise NMError(f"{VARIABLE}={pinned}: it takes one of {', '.join(NAMES)}, or none")
    if pinned == "none":
        _missing = f"{VARIABLE}=none"
    elif not LIBRARY.exists():
        _missing = "the native library was not built (python nmfx/kernels/cpu/build.py builds it)"
    else:
        try:
            torch.ops.load_library(LIBRARY)
            library = ctypes.CDLL(str(LIBRARY))
        except OSError as error:
            _missing = f"the native library does not load: {error}"
            return
        library.nmfx_isa.restype = ctypes.c_char_p
        library.nmfx_use_isa.argtypes = [ctypes.c_char_p]
        _library = library
        if not isa():
            raise NMError(f"{VARIABLE}={pinned}: this machine lacks it, it has {available()}")


def isa() -> str | None:
    """The instruction set in use, one of `NAMES`, or None without native kernels."""
    return None if _library is None else _library.nmfx_isa().decode()


def available() -> list[str]:
    """The instruction sets that this machine can run."""
    if _library is None:
        return []
    return [name for name in NAMES if _library.nmfx_has_isa(name.encode())]


def use_isa(name: str) -> None:
    """Changes the instruction set of the whole process: for tests and benchmarks.

    Raises:
        NMError: this machine lacks it.
    """
    if _library is None or not _library.nmfx_use_isa(name.encode()):
        raise NMError(f"{name} cannot be used here; available: {', '.join(available()) or 'none'}")


def why_not() -> str | None:
    """Why there are no native kernels, or None if there are."""
    return _missing if _library is None else None


def status() -> str:
    """One line for reports: which kernels packed layers run on CPU, and why."""
    if reason := why_not():
        return f"packed layers run in plain torch, slower than dense: {reason}"
    reason = huge_pages.why_not()
    without = f", their weights without huge pages: {reason}" if reason else ""
    return f"packed layers run native {isa()} kernels{without}"
