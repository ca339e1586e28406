"""The text of the lm task: the source of Python's own standard library, as bytes.

It is on every machine that runs the demo, so nothing is downloaded. Two versions of Python hold two
texts: results compare within one.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# What others installed, tests (long tables of cases), and what the build of this Python wrote.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
GENERATED = "_sysconfigdata"

HELD_OUT_OF = 10  # one top-level module of ten is held out

# Predicted bytes are (context) * windows; every run and every seed is judged on the same ones.
CURVE_WINDOWS = 64
FINAL_WINDOWS = 1024


def files(folder: Path) -> list[Path]:
    """The source files under `folder`, relative to it, sorted."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # not entered at all
        found += [Path(place, name).relative_to(folder) for name in names if _is_source(name)]
    return sorted(found, key=lambda path: path.parts)


def _is_source(name: str) -> bool:
    return name.endswith(".py") and not name.startswith(GENERATED)


def is_held_out(path: Path) -> bool:
    """Whether a file is for judging, not for training; by its name alone.

    Whole top-level modules are held out: files of one package resemble each other (the tables in
    `encodings` differ in a few lines), and a near-copy in training would flatter every number.
    """
    return hashlib.sha256(path.parts[0].encode()).digest()[0] % HELD_OUT_OF == 0


@cache
def load(split: str) -> Tensor:
    """The bytes (n,) uint8 of "train" or "held out", files one after another.

    Raises:
        FileNotFoundError: this Python has no source files (a zipped or stripped one).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    chosen = [path for path in files(folder) if is_held_out(path) == (split == "held out")]
    if not chosen:
        raise FileNotFoundError(f"the lm task trains on Python's own source; {folder} holds none")
    text = b"".join((folder / path).read_bytes() for path in chosen)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def draw(count: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of training text: inputs and the bytes after each, both (count, context)."""
    text = load("train")
    starts = torch.randint(len(text) - context, (count, 1), generator=generator)
    windows = text[starts + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def held_out(windows: int, context: int) -> tuple[Tensor, Tensor]:
    """Windows spread evenly over the held-out text, the same in every call; as `draw`."""
    text = load("held out")
    starts = torch.linspace(0, len(text) - context - 1, windows).long()[:, None]
    chosen = text[starts + torch.arange(context + 1)].long()
    return chosen[:, :-1], chosen[:, 1:]
