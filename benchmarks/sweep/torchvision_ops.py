"""torchvision's own C++ operators beside a CPU-only torch.

The wheels of the package index are built for CUDA: `_C.so` needs `libc10_cuda.so` and
`libtorch_cuda.so`, which a CPU-only torch lacks, so nms, roi_align and deform_conv2d do not load.
What it takes from those two libraries are some forty CUDA functions that its CPU operators never
call. They are declared here, in a library of the same name that is compiled on the spot (each
returns 0: there is no device), and the operators are then the real ones.
"""

from __future__ import annotations

import ctypes
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

_NAMES = ("libc10_cuda.so", "libtorch_cuda.so")
_CUDA = ("cuda", "__cuda")


def load_operators(work: Path) -> str:
    """Makes `import torchvision` load its operators; returns how, for the head of the result.

    If that fails (no compiler, another wheel), two operators are declared so that the import works;
    models that call one then count as not running dense here.
    """
    if torch.version.cuda is not None:
        return "torchvision's own C++ operators"
    try:
        for library in _stubs(work):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return "torchvision's own C++ operators, its CUDA symbols stubbed"
    except (OSError, subprocess.CalledProcessError) as error:
        _declare()
        return f"torchvision without its C++ operators ({type(error).__name__}: {error})"


def _stubs(work: Path) -> list[Path]:
    """Compiles the two libraries, once per work folder."""
    work.mkdir(parents=True, exist_ok=True)
    paths = [work / name for name in _NAMES]
    if not all(path.exists() for path in paths):
        source = work / "cuda_stubs.c"
        source.write_text(_source(_missing()), encoding="utf-8")
        empty = work / "empty.c"
        empty.write_text("", encoding="utf-8")
        for path, code in zip(paths, (source, empty), strict=True):
            command = ["gcc", "-shared", "-fPIC", "-o", path, code, f"-Wl,-soname,{path.name}"]
            subprocess.run(command, check=True, capture_output=True)
    return paths


def _missing() -> list[str]:
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise OSError("torchvision is not installed")
    library = Path(spec.origin).parent / "_C.so"
    command = ["nm", "-D", "--undefined-only", str(library)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    return sorted(name for name in names if name.startswith(_CUDA) or _is_mangled(name))


def _is_mangled(name: str) -> bool:
    """Whether it is a C++ name in the namespace c10::cuda or at::cuda."""
    return name.startswith(("_ZN3c104cuda", "_ZNK3c104cuda", "_ZN2at4cuda"))


def _source(names: list[str]) -> str:
    lines = []
    for i, name in enumerate(names):
        if name.endswith("9allocatorE"):  # the one variable among them
            lines.append(f'void *v{i}[8] __asm__("{name}") = {{0}};')
        else:
            lines.append(f'long f{i}(void) __asm__("{name}"); long f{i}(void) {{ return 0; }}')
    return "\n".join([*lines, ""])


def _declare() -> None:
    # Kept alive by the module: a Library that is collected takes its operators with it.
    global _library
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
