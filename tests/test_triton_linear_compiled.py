"""What Triton's compiler makes of the packed GPU kernels for sm_80 and sm_90; no GPU is needed."""

from __future__ import annotations

import re

import pytest
from triton_compiler import compile_elsewhere

pytest.importorskip("triton", reason="triton is not installed: nothing compiles the GPU kernels")

# kernel, dtype, N, M, rows of the tile, capability. One process: an import takes seconds.
CASES = {
    "one row": ("gather", "bf16", 2, 4, 1, 90),
    "eight rows": ("gather", "bf16", 2, 4, 8, 90),
    "eight rows, 1:16": ("gather", "fp32", 1, 16, 8, 80),
    "sixteen rows": ("expand", "bf16", 2, 4, 16, 90),
    "sixteen rows, 1:16": ("expand", "fp16", 1, 16, 16, 80),
    "sixty-four rows": ("expand", "fp16", 2, 4, 64, 80),
}
PROGRAM = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nmfx.kernels import triton_linear, triton_packed
from nmfx.packing import index_bits

result = {}
for case, (name, dtype, n, m, rows, capability) in json.loads(sys.argv[1]).items():
    kernel = getattr(triton_linear, name)
    fixed = triton_packed.constants(name, n, m, rows)
    pointers = {"x": dtype, "xt": dtype, "values": dtype, "index": "i32", "sums": "fp32"}
    signature = {}
    for key in kernel.arg_names:
        if key in fixed:
            signature[key] = "constexpr"
        else:
            signature[key] = f"*{pointers[key]}" if key in pointers else "i32"
    # Pointers and sizes that 16 divides, as those of large layers.
    attrs = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(signature) if k not in fixed}
    source = ASTSource(kernel, signature, fixed, attrs)
    built = compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}
    )
    result[case] = {"ptx": built.asm["ptx"], "sass": built.asm["sass"]}
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Case -> PTX and machine code."""
    return compile_elsewhere(PROGRAM, CASES, str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("case", CASES)
def test_packed_kernels_compile_without_spills(case: str, built: dict) -> None:
    assert not re.search(r"\b(?:LDL|STL)\b", built[case]["sass"]), "registers are spilled"


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] == "expand"])
def test_expanded_tiles_are_multiplied_by_tensor_cores(case: str, built: dict) -> None:
    assert re.search(r"\bw?g?mma\S*", built[case]["ptx"])


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] == "gather"])
def test_weights_are_loaded_as_vectors(case: str, built: dict) -> None:
    """16 lanes of a slot lie side by side: at least 8 bytes at once."""
    loads = set(re.findall(r"ld\.global\S*", built[case]["ptx"]))
    assert any(".v" in load for load in loads), loads
