"""What this machine is, for timings that hold only on it."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from pathlib import Path

import torch

from ..kernels import cpu, semi_structured, triton_packed

# The last-level cache of the AMD EPYC that nmfx was developed on; where the system does not tell, a
# model below this size is timed with its weights in the cache.
DEFAULT_CACHE_BYTES = 32 * 2**20

_CPU = torch.device("cpu")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def kernel_status(device: torch.device = _CPU) -> str:
    """The sparse kernels in use on a device, in words; part of the key of every cached timing."""
    if device.type != "cuda":
        return cpu.status()
    return f"{semi_structured.status(device)}; {triton_packed.status(device)}"


def processor(device: torch.device) -> str:
    """Name of what computes on a device, with what tells it from others of the name."""
    if device.type != "cuda":
        return cpu_model()
    found = torch.cuda.get_device_properties(device)
    libraries = f"CUDA {torch.version.cuda}, cuSPARSELt {torch.backends.cusparselt.version()}"
    return f"{found.name}, compute capability {found.major}.{found.minor}, {libraries}"


@functools.cache
def kernel_digest(device: torch.device = _CPU) -> str:
    """Tells one build of the kernels from another: the native ones, or Triton's sources."""
    if device.type == "cuda":
        folder = Path(triton_packed.__file__).parent
        sources = [*sorted(folder.glob("triton*.py")), folder / "cusparselt.py"]
        ops = ("cuda.py", "pictures.py", "conv_semi_structured.py")
        sources += [folder.parent / "ops" / name for name in ops]
        return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    if cpu.isa() is None:
        return ""
    return hashlib.sha256(cpu.LIBRARY.read_bytes()).hexdigest()[:16]


@functools.cache
def cpu_model() -> str:
    """Name and instruction set of the processor, as torch uses it."""
    name = ""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        family = re.findall(r"^(?:cpu family|model|stepping)\s*:\s*(\d+)$", text, re.MULTILINE)[:3]
        name = " ".join([found.group(1).strip() if found else "", "/".join(family)]).strip()
    except OSError:
        pass
    name = name or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


# A virtual machine of a few cores may report the whole cache of its host: one of two cores reported
# 480 MB, and read 160 MB as slowly as 2 GB. No CPU known to us has more than 12 MB per core.
MOST_CACHE_PER_CORE = 16 * 2**20


def cache_bytes(device: torch.device = _CPU) -> int:
    """Size of the last-level cache that a device may count on, or a default if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return _cpu_cache_bytes()


@functools.cache
def _cpu_cache_bytes() -> int:
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            sizes.append(parse_size(file.read_text()))
        except OSError:
            continue
    most = MOST_CACHE_PER_CORE * (os.cpu_count() or 1)
    return min(max(sizes, default=0) or DEFAULT_CACHE_BYTES, most)


def parse_size(text: str) -> int:
    """The bytes that the kernel's "32768K" means; 0 for anything else."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(match.group(1)) * _UNITS[match.group(2)] if match else 0


def machine(device: torch.device) -> str:
    """Where kernels are chosen: the processor and, of a CPU, the number of threads."""
    if device.type == "cuda":
        return processor(device)
    return f"{processor(torch.device('cpu'))}, threads: {torch.get_num_threads()}"
