"""`python -m nmfx doctor`: what this machine has, and what will and will not be fast on it."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..kernels import cpu, semi_structured, triton
from ..ops.compiled import UNFUSED_REASON
from ..tuning.cache import folder
from ..tuning.hardware import cache_bytes, cpu_model, kernel_status
from ..version import NMFX
from . import output

_WORDS = {True: "fast", False: "SLOW", None: "-"}
_PACKAGES = ("numpy", "safetensors", "triton", "transformers", "matplotlib")


def add_command(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command and `run`."""
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints facts and verdicts."""
    facts, verdicts = _facts(), _verdicts()
    if options.json:
        output.show_json({"facts": facts, "verdicts": verdicts})
        return
    output.show_table(("what", "here"), (), facts.items())
    output.say()
    output.show_table(
        ("", "", ""),
        (),
        ((_WORDS[one["fast"]], one["what"], one["why"]) for one in verdicts),
    )


def _facts() -> dict[str, str]:
    facts = {
        "nmfx": NMFX,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
    }
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts |= {
        "processor": cpu_model(),
        "threads": f"{torch.get_num_threads()} (torch) of {os.cpu_count()}",
        "last cache": output.size(cache_bytes()),
        "CPU kernels": cpu.why_not()
        or f"{cpu.isa()}; this machine has {', '.join(cpu.available())}",
        "cache folder": _cache(),
    }
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", i)
        found = torch.cuda.get_device_properties(i)
        facts[f"GPU {i}"] = (
            f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{output.size(found.total_memory)}"
        )
        facts[f"GPU {i} kernels"] = kernel_status(device)
    return facts


def _cache() -> str:
    """Where timings are kept, or why they are not."""
    where = folder()
    if where is None:
        return "none (NMFX_CACHE says so): every nmfx.lower measures again"
    near = where
    while not near.exists():
        near = near.parent
    try:
        with tempfile.TemporaryFile(dir=near):
            return str(where)
    except OSError as error:
        return f"{where}: {error.strerror}; every nmfx.lower measures again"


def _verdicts() -> list[dict[str, Any]]:
    found = [
        _verdict("training, eager, on CPU", cpu.why_not(), "masks at the speed of a copy"),
        _verdict(
            "training, compiled, on CPU",
            cpu.why_not(),
            "calls the same kernels" if UNFUSED_REASON is None else UNFUSED_REASON,
        ),
        _verdict(
            "inference, N:M linear and conv layers, on CPU",
            cpu.why_not(),
            "packed kernels; nmfx.lower measures each layer, `bench` shows common shapes",
        ),
    ]
    if not torch.cuda.is_available():
        found.append({"what": "anything on a GPU", "fast": None, "why": "torch finds none"})
        return found
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        backend = semi_structured.backend_of(device)
        found += [
            _verdict(f"training on GPU {i}", triton.why_not_on(device), "Triton kernels"),
            _verdict(
                f"inference on GPU {i}, many rows, 2:4",
                backend if isinstance(backend, str) else None,
                "" if isinstance(backend, str) else f"sparse tensor cores through {backend.name}",
            ),
            _verdict(
                f"inference on GPU {i}, few rows",
                triton.why_not_on(device),
                "packed Triton kernels",
            ),
        ]
    return found


def _verdict(what: str, why_not: str | None, why: str) -> dict[str, Any]:
    return {"what": what, "fast": why_not is None, "why": why if why_not is None else why_not}
