"""What Triton's compiler makes of the packed GPU kernels for sm_80 and sm_90; no GPU is needed."""

from __future__ import annotations

import re

import pytest
from triton_compiler import compile_elsewhere

pytest.importorskip("triton", reason="triton is not installed: nothing compiles the GPU kernels")

# kernel, dtype, N, M, rows of the input, capability, few outputs. One process: an import takes
# seconds.
CASES: dict[str, tuple[str, str, int, int, int, int, bool]] = {
    "one row": ("gather", "bf16", 2, 4, 1, 90, False),
    "eight rows": ("gather", "bf16", 4, 8, 8, 90, False),
    "eight rows, 1:16": ("gather", "fp32", 1, 16, 8, 80, False),
    "sixteen rows, 8:32": ("gather", "bf16", 8, 32, 16, 90, False),
    "unpacked": ("unpack", "bf16", 2, 4, 128, 90, False),
    "unpacked, 1:16": ("unpack", "fp32", 1, 16, 128, 80, False),
}
for m, all_rows in ((4, (8, 32)), (16, (8, 16, 32, 64))):
    for rows in all_rows:
        CASES[f"1:{m}, {rows} rows"] = ("single", "bf16", 1, m, rows, 90, True)
for rows in (8, 16, 32, 64):
    CASES[f"2:4, {rows} rows"] = ("sparse", "bf16", 2, 4, rows, 90, True)
for rows in (16, 64):
    CASES[f"2:4, {rows} rows, many outputs"] = ("sparse", "fp16", 2, 4, rows, 80, False)
    for m in (4, 8, 16):
        CASES[f"1:{m}, {rows} rows, many outputs"] = ("single", "fp16", 1, m, rows, 80, False)


PROGRAM = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nmfx.kernels import triton_linear, triton_packed, triton_single, triton_sparse
from nmfx.packing import index_bits

result = {}
for case, (name, dtype, n, m, rows, capability, few) in json.loads(sys.argv[1]).items():
    module = {"sparse": triton_sparse, "single": triton_single}.get(name, triton_linear)
    kernel = getattr(module, name)
    ending = {"SPLIT": False, "BIAS": True, "ACTIVATION": "gelu"}
    if name in ("sparse", "single"):
        fixed = triton_packed.sparse_constants(n, m, rows, few) | ending
        fixed |= {"EVEN": False, "BF16": dtype == "bf16"}
        warps = fixed["WARPS"]
    elif name == "unpack":
        fixed, warps = {"N": n, "M": m, "BITS": index_bits(m), "GROUPS": 32, "EVEN": False}, 4
    else:
        fixed = triton_packed.gather_constants(n, m, rows) | ending | {"EVEN": False}
        warps = fixed.pop("num_warps")
        del fixed["num_stages"]
    pointers = {"x": dtype, "bias": dtype, "out": dtype, "values": dtype}
    pointers |= {"index": "i32", "sums": "fp32"}
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
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    result[case] = {key: built.asm[key] for key in ("ttgir", "ptx", "sass")}
    result[case]["threads"] = 32 * warps
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Case -> layouts, PTX and machine code."""
    return compile_elsewhere(PROGRAM, CASES, str(tmp_path_factory.mktemp("triton")))


def of(*names: str) -> list[str]:
    return [case for case in CASES if CASES[case][0] in names]


@pytest.mark.parametrize("case", CASES)
def test_packed_kernels_compile_without_spills(case: str, built: dict) -> None:
    # One or two are left where all registers are taken, outside of the loop.
    assert len(re.findall(r"\bSTL\b", built[case]["sass"])) <= 2, "registers are spilled"


@pytest.mark.parametrize("case", of("gather", "sparse", "single"))
def test_weights_are_loaded_as_vectors(case: str, built: dict) -> None:
    """16 lanes of a slot lie side by side: at least 8 bytes at once."""
    loads = set(re.findall(r"ld\.global\S*", built[case]["ptx"]))
    assert any(".v" in load for load in loads), loads


@pytest.mark.parametrize("case", of("sparse", "single"))
def test_sparse_tensor_cores_multiply(case: str, built: dict) -> None:
    assert re.search(r"\bHMMA\.SP\b", built[case]["sass"])


@pytest.mark.parametrize("case", of("sparse", "single"))
def test_element_i_of_a_program_lies_in_thread_i(case: str, built: dict) -> None:
    """What `triton_ptx.py` relies on: every operand has this one layout."""
    text, threads = built[case]["ttgir"], built[case]["threads"]
    operands = re.findall(r"tt\.elementwise_inline_asm.*? : (.*?) ->", text)
    assert operands
    kinds = set(re.findall(r"tensor<([^>]*)>", " ".join(operands)))
    shapes, layouts = zip(*(kind.rsplit(", ", 1) for kind in kinds), strict=True)
    assert all(shape.split("x")[0] == str(threads) for shape in shapes), shapes
    assert len(set(layouts)) == 1, layouts
    name = layouts[0]
    found = re.search(rf"{name} = #ttg\.blocked<\{{(.*?)\}}>", text)
    assert found is not None
    wanted = f"sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [{threads // 32}]"
    assert found[1].startswith(wanted)
