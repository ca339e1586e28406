"""What every benchmark shares: a header that says on what it ran, and where results go."""

from __future__ import annotations

import datetime
import platform
import re
import sys
from pathlib import Path

import torch

import nmfx

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """The CPU's model, from the system."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1].strip() if found else platform.machine()


def capability() -> str:
    """The vector instructions torch uses here, such as AVX2 or AVX512."""
    return torch.backends.cpu.get_cpu_capability()


def header(title: str) -> str:
    """Title, hardware, versions and command, as Markdown."""
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return "\n".join(
        [
            f"# {title}",
            "",
            f"- {datetime.date.today():%Y-%m-%d}, {cpu_name()}, {capability()}, "
            f"{torch.get_num_threads()} cores",
            f"- Python {platform.python_version()}, torch {torch.__version__}, "
            f"nmfx {nmfx.__version__}",
            f"- `{command}`",
            "",
        ]
    )


def write_result(what: str, text: str) -> Path:
    """Writes results/<what>_<hardware>_<yyyymm>.md and returns its path."""
    hardware = re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {capability()}".lower()).strip("-")
    path = RESULTS / f"{what}_{hardware}_{datetime.date.today():%Y%m}.md"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
