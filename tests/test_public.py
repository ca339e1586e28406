"""The public surface is frozen here: a name enters or leaves on purpose, in this file's diff."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nmfx

PUBLIC = [
    "Attachment",
    "Monitor",
    "NMError",
    "Pattern",
    "Report",
    "Sad",
    "attach",
    "backend",
    "check_onnx",
    "conv_nm",
    "fold",
    "freeze",
    "is_nm",
    "keep",
    "linear_nm",
    "load",
    "load_state_dict",
    "lower",
    "masks",
    "nm_mask",
    "plot",
    "preview",
    "report",
    "sad",
    "save",
    "set_lambda",
    "set_pattern",
    "sparsify",
    "sr_ste",
    "state_dict",
    "trace",
    "unfreeze",
    "unsparsify",
    "verify",
]

# file of the pure layer -> what it may import from nmfx: imports only go down
PURE = {
    "errors.py": set(),
    "pattern.py": {"errors"},
    "mask.py": {"errors", "pattern"},
    "metrics.py": {"errors", "mask"},
    "packing.py": {"errors", "mask", "pattern"},
}

# Each costs seconds to import, or is an extra that a user may not have.
LAZY = [
    "transformers",
    "sklearn",
    "matplotlib",
    "timm",
    "triton",
    "onnx",
    "torch._dynamo",
    "torch._inductor.compile_fx",
]


def test_public_names_are_frozen() -> None:
    assert sorted(nmfx.__all__) == PUBLIC
    assert nmfx.__all__ == sorted(nmfx.__all__), "__all__ is sorted"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented(name: str) -> None:
    value = getattr(nmfx, name)
    doc = inspect.getdoc(value) or ""
    assert doc, f"nmfx.{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"nmfx.{name} has a generated docstring: {doc}"


def test_public_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|a\d+|rc\d+)?", nmfx.__version__), nmfx.__version__


def test_public_package_is_typed() -> None:
    assert Path(nmfx.__file__).with_name("py.typed").is_file()


@pytest.mark.parametrize("name", PURE)
def test_public_pure_layer_imports_only_down(name: str) -> None:
    tree = ast.parse(Path(nmfx.__file__).with_name(name).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert {node.module for node in imports} == PURE[name]


def run_fresh(code: str) -> str:
    """What a new Python process prints, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(nmfx.__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout


def test_public_import_is_light_and_silent() -> None:
    # What torch itself imports is not ours to count.
    code = (
        "import sys, torch, warnings; before = set(sys.modules); warnings.simplefilter('error'); "
    )
    code += f"import nmfx; lazy = {LAZY}; "
    code += "print(sorted(set(lazy) & (set(sys.modules) - before)))"
    assert run_fresh(code) == "[]\n"


def test_public_import_changes_no_global_state() -> None:
    state = (
        "(torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), "
        "torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), "
        "torch.is_grad_enabled(), torch.get_rng_state().sum().item(), "
        "torch.get_float32_matmul_precision(), warnings.filters[:], logging.root.handlers[:])"
    )
    code = "import logging, warnings, torch; torch.manual_seed(3); "
    code += f"before = {state}; import nmfx; after = {state}; print(before == after, before, after)"
    assert run_fresh(code).startswith("True "), run_fresh(code)
