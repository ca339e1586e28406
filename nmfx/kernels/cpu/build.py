"""Builds the native library beside this file: `python nmfx/kernels/cpu/build.py`.

It needs g++ 11 or later (or what CXX names) and an installed torch, whose headers it reads; the
result uses torch's stable ABI only, so it serves every torch from 2.11 on. This file imports
neither torch nor nmfx, because `setup.py` runs it too. Nothing is compiled that is up to date.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "src"
LIBRARY = HERE / "_native.so"
STAMP = HERE / "_native.stamp"

# Torch 2.11 is the oldest whose interface the library may use.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
# Fused multiply-adds wherever there are any. GCC 12 takes the undefined operand in its own
# AVX-512 header for a mistake, and warns that vectors have no fixed ABI: no vector leaves a file.
# Without the alignment, the inner loop of wide panels lost 5 % by where other changes moved it.
KERNELS = [
    *("-ffp-contract=fast", "-falign-loops=32"),
    *("-fno-exceptions", "-fno-rtti", "-Wno-psabi"),
]
# Without them: gradients are those of torch, bit for bit. Nobody asks which exceptions were raised.
# The loops aligned as well: masks along columns lost 18 % by where changes to others moved them.
MASKS = [
    *("-ffp-contract=off", "-fno-trapping-math", "-falign-loops=32"),
    *("-fno-exceptions", "-fno-rtti", "-Wno-psabi"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-Wno-maybe-uninitialized"]
FLAGS: dict[str, list[str]] = {
    "isa_portable": KERNELS,
    "isa_avx2": [*KERNELS, *AVX2],
    "isa_avx512": [*KERNELS, *AVX512],
    "isa_avx512_bf16": [*KERNELS, *AVX512, "-mavx512bf16"],
    "isa_amx_bf16": [*KERNELS, *AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "masks_portable": MASKS,
    "masks_avx2": [*MASKS, *AVX2],
    "masks_avx512": [*MASKS, *AVX512],
    "plain_f64": [],
    "driver": [],
    "dispatch": [],
    "pool": [],
}
X86_ONLY = ("avx2", "avx512", "avx512_bf16", "amx_bf16")  # the ends of file names
BINDINGS = ("packed_ops", "mask_ops")  # the files that include torch


def torch_folder() -> Path:
    """Where torch is installed.

    Raises:
        RuntimeError: it is not.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the native kernels are built against an installed torch: none is here")
    return Path(spec.submodule_search_locations[0])


def build(extra: tuple[str, ...] = (), library: Path = LIBRARY, stamp: Path = STAMP) -> Path:
    """Compiles and links what is not up to date, and returns the library's path.

    Args:
        extra: more flags for the compiler and the linker, such as "-fsanitize=address".
        library: the file to write.
        stamp: the file that says from what it was built.

    Raises:
        RuntimeError: no torch, no compiler, or a compiler error, with its message.
    """
    compiler = os.environ.get("CXX", "g++")
    torch = torch_folder()
    state = _state([compiler, *extra])
    if library.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == state:
        return library
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    names = [name for name in FLAGS if is_x86 or not name.endswith(X86_ONLY)]
    includes = [torch / "include", torch / "include/torch/csrc/api/include"]
    objects = library.parent / "_objects"
    objects.mkdir(exist_ok=True)
    commands = [
        [compiler, *COMMON, *FLAGS[name], *extra, "-c", str(SOURCES / f"{name}.cpp")]
        for name in names
    ]
    binding = [f"-isystem{path}" for path in includes]
    commands += [
        [compiler, *COMMON, TORCH_TARGET, *binding, *extra, "-c", str(SOURCES / f"{name}.cpp")]
        for name in BINDINGS
    ]
    outputs = [objects / f"{name}.o" for name in (*names, *BINDINGS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [[*c, "-o", str(o)] for c, o in zip(commands, outputs, strict=True)]
        list(pool.map(_run, jobs))
    partial = library.with_suffix(".partial")
    # torch's symbols are found through the name of its library, which the process has loaded.
    link = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    _run([compiler, "-shared", *map(str, outputs), *extra, *link, "-o", str(partial)])
    os.replace(partial, library)
    stamp.write_text(state, encoding="utf-8")
    for output in outputs:
        output.unlink()
    objects.rmdir()
    return library


def _state(command: list[str]) -> str:
    digest = hashlib.sha256(repr((command, COMMON, FLAGS, TORCH_TARGET)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(
            f"the native kernels need a C++ compiler, and {command[0]} is not here"
        ) from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{build().name} is up to date\n")
    except RuntimeError as error:
        sys.exit(str(error))
