"""The packed format as its description in `nmfx/packing.py` has it, read without nmfx and torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nmfx

FLOATS = {"F32": ("f", 4), "F64": ("d", 8), "F16": ("e", 2)}


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, list[int], bytes]]]:
    """(specification, tensors) of a safetensors file: a length, JSON, and the tensors' bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    spec = json.loads(header.pop("__metadata__")["nmfx"])
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = entry["dtype"], entry["shape"], data[begin:end]
    return spec, tensors


def unpack_matrix(
    values: list[float], index: list[int], rows: int, cols: int, n: int, m: int
) -> list[list[float]]:
    """A dense (rows, cols) matrix from the flat contents of one group's two tensors."""
    bits = 2 if m <= 4 else 4 if m <= 16 else 8
    slots, per_word = cols // m * n, 32 // bits
    words = -(-slots // per_word)
    dense = [[0.0] * cols for _ in range(rows)]
    for row in range(rows):
        block, lane = divmod(row, 16)
        for slot in range(slots):
            value = values[(block * slots + slot) * 16 + lane]
            word = index[(block * words + slot // per_word) * 16 + lane]
            k = slot % per_word
            field = word >> (16 * (k % 2) + bits * (k // 2)) & (1 << bits) - 1
            dense[row][slot // n * m + field] = value
    return dense


def read_weight(path: Path, name: str) -> list[Any]:
    """A packed weight of a file as nested lists of its dense shape."""
    spec, tensors = read_file(path)
    layer = spec["layers"][name]
    n, m = map(int, layer["pattern"].split(":"))
    dtype, _, raw = tensors[f"{name}_values"]
    code, size = FLOATS[dtype]
    values = list(struct.unpack(f"<{len(raw) // size}{code}", raw))
    _, _, raw = tensors[f"{name}_index"]
    index = [word & 0xFFFFFFFF for (word,) in struct.iter_unpack("<i", raw)]
    shape, groups = layer["shape"], layer["groups"]
    if len(shape) == 2:
        rows, cols = (shape[0], shape[1]) if layer["dim"] == 1 else (shape[1], shape[0])
        dense = unpack_matrix(values, index, rows, cols, n, m)
        return dense if layer["dim"] == 1 else [list(column) for column in zip(*dense, strict=True)]
    out, channels, *kernel = shape
    positions = 1
    for length in kernel:
        positions *= length
    dense = []
    for g in range(groups):
        part = [
            flat[g * len(flat) // groups : (g + 1) * len(flat) // groups]
            for flat in (values, index)
        ]
        dense += unpack_matrix(*part, out // groups, positions * channels, n, m)
    return [  # columns are (*kernel position, channel)
        [[row[p * channels + c] for p in range(positions)] for c in range(channels)]
        for row in dense
    ]


@pytest.mark.parametrize(
    ("layer", "pattern"),
    [
        (lambda: nn.Linear(32, 40), "2:4"),
        (lambda: nn.Linear(64, 17).half(), "3:16"),
        (lambda: nn.Linear(64, 5).double(), "5:32"),
        (lambda: nn.Conv2d(16, 20, (3, 2), groups=2), "1:8"),
        (lambda: nn.Conv1d(8, 33, 3), "2:4"),
    ],
)
def test_a_reader_written_from_the_description(layer: Any, pattern: str, tmp_path: Path) -> None:
    model = nmfx.sparsify(nn.Sequential(layer()), {"0": pattern})
    folded, lowered = nmfx.fold(model), nmfx.lower(model, tune=False)
    assert nmfx.report(lowered).rows[0].state == "packed"
    (path,) = nmfx.save(lowered, tmp_path / "model.safetensors")
    found = torch.tensor(read_weight(path, "0.weight"), dtype=folded[0].weight.dtype)
    assert torch.equal(found.reshape(folded[0].weight.shape), folded[0].weight)
