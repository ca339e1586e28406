"""What Triton's compiler makes of the GPU kernels for sm_80: read here, as no GPU is needed for it.

The interpreter of `test_triton.py` cannot see contraction to an fma, flushed denormals, roundings
other than to the nearest, or loads that are not vectorised.
"""

from __future__ import annotations

import re

import pytest
from triton_compiler import compile_elsewhere

pytest.importorskip("triton", reason="triton is not installed: nothing compiles the GPU kernels")

# kernel, dtypes of its pointers except `control`, M, inner. One process: an import takes seconds.
CASES = {
    "gradient fp32": ("gradient", ("fp32", "fp32", "fp32"), 4, 1),
    "gradient bf16": ("gradient", ("bf16", "bf16", "bf16"), 4, 1),
    "gradient fp64": ("gradient", ("fp64", "fp64", "fp64"), 4, 1),
    "bisecting": ("gradient", ("fp16", "fp16", "fp16"), 64, 1),
    "to bf16": ("project", ("fp32", "bf16"), 4, 1),
    "strided": ("project", ("fp32", "fp32"), 8, 48),
    "odd M": ("project", ("fp64", "fp16"), 5, 3),
}
PROGRAM = """
import json, sys
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nmfx.kernels import triton, triton_masks

result = {}
for case, (name, dtypes, m, inner) in json.loads(sys.argv[1]).items():
    *inputs, out = [f"*{dtype}" for dtype in dtypes]
    places = {"grad": inputs[0]} if name == "gradient" else {}
    places |= {"weight": inputs[-1], "control": "*fp64", "out": out, "groups": "i32"}
    # What the launcher sees: aligned pointers, a divisible number of groups, maybe inner.
    aligned = [*range(len(places))] + [len(places)] * (inner % 16 == 0)
    fixed = triton.constants(torch.empty(1024 * m), m) | ({"inner": 1} if inner == 1 else {})
    signature = places | {"inner": "i32"} | dict.fromkeys(fixed, "constexpr")
    kernel = getattr(triton_masks, name)
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, fixed, attrs)
    built = compile(source, target=GPUTarget("cuda", 80, 32), options=triton.OPTIONS)
    result[case] = {"ptx": built.asm["ptx"], "sass": built.asm["sass"]}
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Case -> PTX and machine code."""
    return compile_elsewhere(PROGRAM, CASES, str(tmp_path_factory.mktemp("triton")))


def found(pattern: str, code: str) -> set[str]:
    return set(re.findall(pattern, code))


@pytest.mark.parametrize("case", CASES)
def test_triton_compiles_without_spills_and_flushes_no_denormals(case: str, built: dict) -> None:
    assert not found(r"\S*\.ftz\S*", built[case]["ptx"])
    assert not found(r"\b(?:LDL|STL)\b", built[case]["sass"]), "registers are spilled"


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] == "gradient"])
def test_triton_gradient_rounds_the_product_and_then_the_sum(case: str, built: dict) -> None:
    ptx, sass = built[case]["ptx"], built[case]["sass"]
    wide = "f64" if "fp64" in CASES[case][1] else "f32"
    arithmetic = found(r"\b(?:mul|add|fma|mad)\S*\.f\d\d\S*", ptx)
    assert arithmetic == {f"mul.rn.{wide}", f"add.rn.{wide}"}, arithmetic
    # The assembler, too, could contract. (HFMA2 is one of its ways to set or move a register.)
    assert not found(r"\b[FD]FMA\S*", sass)
    assert found(r"\b[FD]MUL\b", sass), "no product: this test reads the wrong code"


def test_triton_rounds_half_precision_to_nearest(built: dict) -> None:
    narrowing = r"cvt\S*\.(?:b?f16|bf16x2|f16x2)\.f\d\d"
    assert found(narrowing, built["to bf16"]["ptx"]) <= {"cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32"}
    assert found(narrowing, built["to bf16"]["ptx"])
    # By way of float32, as in torch.
    assert found(narrowing, built["odd M"]["ptx"]) <= {"cvt.rn.f16.f32", "cvt.rn.f16x2.f32"}
    assert "cvt.rn.f32.f64" in built["odd M"]["ptx"]


@pytest.mark.parametrize(
    ("case", "width"),
    [
        ("gradient fp32", "v4.b32"),  # 16 bytes: a group of 4
        ("gradient bf16", "v2.b32"),  # 8 bytes: a group of 4
        ("gradient fp64", "v2.b64"),
        ("bisecting", "v4.b32"),
        ("to bf16", "v4.b32"),
        ("strided", "v4.b32"),
    ],
)
def test_triton_loads_and_stores_vectors(case: str, width: str, built: dict) -> None:
    # The two scalars are N and lambda.
    loads = found(r"ld\.global\S*", built[case]["ptx"])
    assert loads == {f"ld.global.{width}", "ld.global.b64"}, loads
    stores = found(r"st\.global\S*", built[case]["ptx"])
    assert all(".v" in store for store in stores), stores
