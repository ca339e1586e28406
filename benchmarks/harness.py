"""What every benchmark shares: a header that says on what it ran, and where results go."""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import torch

import nmfx

RESULTS = Path(__file__).parent / "results"
PEERS = ("onnxruntime", "openvino", "deepsparse", "transformers", "triton")


def cpu_name() -> str:
    """The CPU's model, from the system; with its generation where that is not in the name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.*)", text)
    return (found[1].strip() if found else platform.machine()) + _generation(text)


def _generation(text: str) -> str:
    """Of an AMD CPU that a virtual machine calls "AMD EPYC", by family and model."""
    numbers = [re.search(rf"^{key}\s*: (\d+)$", text, re.M) for key in ("cpu family", "model")]
    if "AuthenticAMD" not in text or None in numbers:
        return ""
    family, model = (int(number[1]) for number in numbers if number)
    is_zen3 = model < 0x10 or 0x20 <= model < 0x60
    name = {25: "Zen 3" if is_zen3 else "Zen 4", 26: "Zen 5"}.get(family)
    return f" ({name})" if name else ""


def capability() -> str:
    """The vector instructions torch uses here, such as AVX2 or AVX512."""
    return torch.backends.cpu.get_cpu_capability()


def hardware() -> str:
    """CPU and vector instructions, as in the names of the result files."""
    return f"{cpu_name()} {capability()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of Python, torch, nmfx and of the peers that are installed."""
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "nmfx": nmfx.__version__,
    }
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def header(title: str, machine: str | None = None, found: dict[str, str] | None = None) -> str:
    """Title, hardware, versions and command, as Markdown.

    `machine` and `found` are those of an earlier run whose records are rendered now.
    """
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    listed = ", ".join(f"{name} {version}" for name, version in (found or versions()).items())
    return "\n".join(
        [
            f"# {title}",
            "",
            f"- {datetime.date.today():%Y-%m-%d}, {machine or hardware()}",
            f"- {listed}",
            f"- `{command}`",
            "",
        ]
    )


def write_result(what: str, text: str, machine: str | None = None) -> Path:
    """Writes results/<what>_<hardware>_<yyyymm>.md and returns its path."""
    name = (machine or hardware()).rpartition(",")[0]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = RESULTS / f"{what}_{slug}_{datetime.date.today():%Y%m}.md"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
