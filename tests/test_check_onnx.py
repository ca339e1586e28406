"""check_onnx: TensorRT's rule along the right axis, and what may stand before a weight."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cli import run

import nmfx
from nmfx.mask import nm_project
from nmfx.onnx_file.constants import nonzero

onnx = pytest.importorskip("onnx", reason="the onnx package is optional")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def pruned(shape: tuple[int, ...], axis: int, pattern: str = "2:4", seed: int = 0) -> np.ndarray:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return nm_project(weight, pattern, axis).numpy()


def save(
    path: Path,
    nodes: list[Any],
    weights: dict[str, Any],
    inputs: dict[str, list[int]] | None = None,
    **options: Any,
) -> Path:
    """A file with these nodes; `weights` are its initializers."""
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
        for name, value in weights.items()
    ]
    given_ = {"x": [4, 8]} if inputs is None else inputs
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in given_.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, **options)
    onnx.save(model, path)
    return path


def one(path: Path, pattern: str = "2:4") -> Any:
    (layer,) = nmfx.check_onnx(path, pattern)
    return layer


# --- the axis of each operator ------------------------------------------------------------------

# operator -> (the weight's shape, its axis, where it stands, attributes)
AXES: dict[str, tuple[str, tuple[int, ...], int, list[str], dict[str, Any]]] = {
    "Gemm": ("Gemm", (8, 12), 0, ["x", "w"], {}),
    "Gemm transB": ("Gemm", (12, 8), 1, ["x", "w"], {"transB": 1}),
    "Gemm transA": ("Gemm", (8, 12), 0, ["x", "w"], {"transA": 1}),
    "Gemm left": ("Gemm", (12, 8), 1, ["w", "x"], {"transB": 1}),
    "Gemm left transA": ("Gemm", (8, 12), 0, ["w", "x"], {"transA": 1}),
    "MatMul": ("MatMul", (8, 12), 0, ["x", "w"], {}),
    "MatMul batch": ("MatMul", (2, 8, 12), 1, ["x", "w"], {}),
    "MatMul left": ("MatMul", (12, 8), 1, ["w", "x"], {}),
    "MatMul vector": ("MatMul", (8,), 0, ["x", "w"], {}),
    "Conv": ("Conv", (12, 8, 3, 3), 1, ["x", "w"], {}),
    "Conv groups": ("Conv", (12, 4, 3), 1, ["x", "w"], {"group": 2}),
    "ConvTranspose": ("ConvTranspose", (8, 4, 2, 2), 0, ["x", "w"], {}),
    "ConvTranspose groups": ("ConvTranspose", (8, 4, 2), 0, ["x", "w"], {"group": 2}),
}


@pytest.mark.parametrize("case", AXES)
def test_groups_run_along_the_axis_that_the_operator_sums_over(case: str, tmp_path: Path) -> None:
    operator, shape, axis, inputs, attributes = AXES[case]
    node = helper.make_node(operator, inputs, ["y"], name="layer", **attributes)
    path = tmp_path / "m.onnx"
    for other in range(len(shape)):
        if shape[other] % 4 and other != axis:
            continue
        weight = np.ones(shape, np.float32) * pruned(shape, other)
        layer = one(save(path, [node], {"w": weight}))
        assert (layer.axis, layer.shape, layer.weight) == (axis, shape, "w")
        assert layer.state == ("satisfied" if other == axis else "broken"), (other, layer)


def brute_force(weight: np.ndarray, n: int, m: int) -> bool:
    """TensorRT's sentence, word by word."""
    k, c, r, s = weight.shape
    return all(
        np.count_nonzero(weight[i, j : j + m, y, x]) <= n
        for i, j, y, x in itertools.product(range(k), range(0, c, m), range(r), range(s))
    )


@given(
    seed=st.integers(0, 2**31),
    density=st.floats(0.1, 0.9),
    pattern=st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (1, 2)]),
)
def test_convolutions_follow_tensorrts_sentence(
    seed: int, density: float, pattern: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((2, 8, 2, 1)).astype(np.float32)
    weight *= rng.random(weight.shape) < density
    path = tmp_path_factory.getbasetemp() / "conv.onnx"
    save(path, [helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weight})
    layer = one(path, pattern)
    assert (layer.state == "satisfied") == brute_force(weight, *pattern)


def test_the_first_group_that_breaks_it_is_named(tmp_path: Path) -> None:
    weight = pruned((4, 8, 3, 3), 1)
    weight[2, 4:8, 1, 2] = 1.0
    weight[3, 0:4, 0, 0] = [1, 1, 0, 5]
    path = save(tmp_path / "m.onnx", [helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weight})
    assert one(path).reason == (
        "[2, 4:8, 1, 2] holds 4 nonzeros, 2:4 allows 2; groups like it: 2 of 72"
    )
    broken = nmfx.check_onnx(path, "2:4")
    assert not broken.ok
    assert nmfx.check_onnx(path, (4, 4)).ok


# --- what stands before a weight ----------------------------------------------------------------


def quantized(weight: np.ndarray) -> np.ndarray:
    return np.round(weight * 20).astype(np.int8)


SCALE, ZERO = np.float32(0.05), np.int8(0)
BEHIND: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "transpose": (
        [helper.make_node("Transpose", ["v"], ["w"], perm=[1, 0])],
        {"v": pruned((12, 8), 1)},
    ),
    "casts": (
        [
            helper.make_node("Cast", ["v"], ["h"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["h"], ["w"], to=TensorProto.FLOAT),
        ],
        {"v": pruned((8, 12), 0)},
    ),
    "identities": (
        [helper.make_node("Identity", ["v"], ["u"]), helper.make_node("Identity", ["u"], ["w"])],
        {"v": pruned((8, 12), 0)},
    ),
    "a constant": (
        [
            helper.make_node(
                "Constant", [], ["w"], value=numpy_helper.from_array(pruned((8, 12), 0))
            )
        ],
        {},
    ),
    "reshape": (
        [helper.make_node("Reshape", ["v", "to"], ["w"])],
        {"v": pruned((2, 4, 12), 1), "to": np.array([8, 12])},
    ),
    "quantize, dequantize": (
        [
            helper.make_node("QuantizeLinear", ["v", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"]),
        ],
        {"v": pruned((8, 12), 0), "s": SCALE, "z": ZERO},
    ),
    "int8, one scale for each channel": (
        [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1)],
        {
            "q": quantized(pruned((8, 12), 0)) + np.arange(12, dtype=np.int8),
            "s": np.full(12, SCALE),
            "z": np.arange(12, dtype=np.int8),
        },
    ),
    "int8, blocks": (
        [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=4)],
        {"q": quantized(pruned((8, 12), 0)), "s": np.full((2, 12), SCALE)},
    ),
}


@pytest.mark.parametrize("what", BEHIND)
def test_a_weight_is_seen_as_its_operator_sees_it(what: str, tmp_path: Path) -> None:
    nodes, weights = BEHIND[what]
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = save(tmp_path / "m.onnx", [*nodes, product], weights)
    layer = one(path)
    assert (layer.state, layer.shape, layer.axis) == ("satisfied", (8, 12), 0), layer
    assert one(path, "1:4").state == "broken", "a check that cannot fail"
    dense = {k: np.ones_like(v) if v.ndim > 1 else v for k, v in weights.items()}
    if dense:
        assert one(save(path, [*nodes, product], dense)).state == "broken"


def test_what_rounds_to_zero_is_zero(tmp_path: Path) -> None:
    weight = np.full((4, 4), 1e-3, np.float32)
    weight[:2] = 1.0
    nodes = [
        helper.make_node("QuantizeLinear", ["v", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"v": weight, "s": SCALE, "z": ZERO})
    assert one(path).state == "satisfied"


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_other_floats(dtype: int, tmp_path: Path) -> None:
    for weight, state in ((pruned((8, 12), 0), "satisfied"), (pruned((8, 12), 1), "broken")):
        tensor = helper.make_tensor("w", dtype, weight.shape, weight.flatten().tolist())
        path = save(
            tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": tensor}
        )
        assert one(path).state == state


def test_denormals_count_and_minus_zero_does_not(flush_denormal: None) -> None:
    # Made of bits: with the flags set, numpy would round a denormal to zero itself.
    array = np.array([0x0000_0001, 0x8000_0000, 0, 0x7FC0_0000], np.uint32).view(np.float32)
    assert nonzero(array).tolist() == [True, False, False, True]
    half = np.array([0x0001, 0x8000, 0, 0x7E00], np.uint16).view(np.float16)
    assert nonzero(half).tolist() == [True, False, False, True]
    brain = torch.tensor([1, -(2**15), 0, 0x7FC0], dtype=torch.int16).view(torch.bfloat16)
    tensor = helper.make_tensor(
        "w", TensorProto.BFLOAT16, [4], brain.view(torch.uint8).numpy(), raw=True
    )
    assert nonzero(numpy_helper.to_array(tensor)).tolist() == [True, False, False, True]


def test_integers_are_compared_with_their_zero_point(tmp_path: Path) -> None:
    for operator, shape, axis, inputs in (
        ("QLinearConv", (4, 8, 1, 1), 1, ["x", "s", "z", "w", "s", "zw", "s", "z"]),
        ("ConvInteger", (4, 8, 1, 1), 1, ["x", "w", "z", "zw"]),
        ("QLinearMatMul", (8, 4), 0, ["x", "s", "z", "w", "s", "zw", "s", "z"]),
        ("MatMulInteger", (8, 4), 0, ["x", "w", "z", "zw"]),
    ):
        weight = quantized(pruned(shape, axis)).astype(np.int64)
        for zero in (np.int8(3), np.arange(4, dtype=np.int8)):
            channel = (-1, 1, 1, 1) if len(shape) == 4 else (1, -1)
            shifted = weight + (zero if zero.ndim == 0 else zero.reshape(channel))
            arrays = {"w": shifted.astype(np.int8), "zw": zero, "s": SCALE, "z": ZERO}
            node = helper.make_node(operator, inputs, ["y"])
            path = save(tmp_path / "m.onnx", [node], arrays)
            assert one(path).state == "satisfied", (operator, zero)
            assert one(path, "1:4").state == "broken", (operator, zero)


def test_external_data_is_read_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": pruned((64, 64), 0)})
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").stat().st_size == 4 * 64 * 64
    assert one(path).state == "satisfied"
    (tmp_path / "w.bin").unlink()
    with pytest.raises(nmfx.NMError, match="w: its data cannot be read"):
        nmfx.check_onnx(path, "2:4")


def test_bodies_of_branches_and_functions_are_looked_into(tmp_path: Path) -> None:
    def branch(name: str) -> Any:
        node = helper.make_node("MatMul", ["x", "w"], [name], name=name)
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [out])

    choose = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("yes"), else_branch=branch("no")
    )
    path = save(tmp_path / "m.onnx", [choose], {"w": pruned((8, 12), 0), "c": np.array(True)})
    found = {layer.name: layer.state for layer in nmfx.check_onnx(path, "2:4")}
    assert found == {"yes": "satisfied", "no": "satisfied"}
    inner = helper.make_node("MatMul", ["a", "b"], ["c"], name="inner")
    function = helper.make_function(
        "mine", "Layer", ["a", "b"], ["c"], [inner], [helper.make_opsetid("", 21)]
    )
    call = helper.make_node("Layer", ["x", "w"], ["y"], domain="mine")
    path = save(tmp_path / "f.onnx", [call], {"w": pruned((8, 12), 0)}, functions=[function])
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, path)
    assert one(path).state == "satisfied"


# --- what is not checked ------------------------------------------------------------------------

NOT_CHECKED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "computed": (
        [helper.make_node("MatMul", ["x", "x"], ["y"])],
        {},
        "it has no weight: its inputs are computed from those of the model",
    ),
    "both constant": (
        [helper.make_node("MatMul", ["w", "w"], ["y"])],
        {"w": pruned((8, 8), 0)},
        "both of its inputs are constants, so nothing is left to run",
    ),
    "odd": (
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        {"w": pruned((4, 6), 0)},
        "its 6 inputs are no multiple of 4",
    ),
    "groups": (
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=4)],
        {"w": pruned((8, 4, 1), 0)},
        "its 2 inputs are no multiple of 4",
    ),
    "depthwise": (
        [helper.make_node("Conv", ["x", "w"], ["y"], group=8)],
        {"w": np.ones((8, 1, 3), np.float32)},
        "depthwise: each filter reads a single channel",
    ),
    "recurrent": (
        [helper.make_node("LSTM", ["x", "w", "w"], ["y"], hidden_size=2)],
        {"w": pruned((1, 8, 8), 1)},
        "nmfx does not know along which axis LSTM sums over its weights",
    ),
    "random": (
        [
            helper.make_node("RandomNormalLike", ["v"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        {"v": pruned((8, 8), 0)},
        "it has no weight: its inputs are computed from those of the model",
    ),
    "no reference": (
        [
            helper.make_node("Strange", ["v"], ["w"], domain="com.microsoft"),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        {"v": pruned((8, 8), 0)},
        "Strange cannot be computed ahead",
    ),
}


@pytest.mark.parametrize("case", NOT_CHECKED)
def test_what_is_not_checked_says_why(case: str, tmp_path: Path) -> None:
    nodes, weights, reason = NOT_CHECKED[case]
    path = save(tmp_path / "m.onnx", nodes, weights)
    layer = one(path)
    assert layer.state == "not checked"
    assert layer.reason.startswith(reason), layer.reason
    found = nmfx.check_onnx(path, "2:4")
    assert not found.ok, "nothing checked is no success"
    assert "no weight was checked" in str(found)


def test_globs_choose_layers_by_any_of_their_names(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "good"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "bad"], ["y"], name="second"),
    ]
    entry = nodes[1].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'model.head', 'linear']"
    weights = {"good": pruned((8, 8), 0), "bad": np.ones((8, 8), np.float32)}
    path = save(tmp_path / "m.onnx", nodes, weights)
    assert [layer.name for layer in nmfx.check_onnx(path, "2:4")] == ["first", "model.head"]
    assert not nmfx.check_onnx(path, "2:4").ok
    for glob in ("*.head", "second", "bad"):
        found = nmfx.check_onnx(path, "2:4", skip=[glob])
        assert found.ok
        assert found.layers[1].reason == f"--skip {glob} matches it"
    assert nmfx.check_onnx(path, "2:4", only=["first"]).ok
    with pytest.raises(nmfx.NMError, match=r"fisrt matches no layer of .*m\.onnx"):
        nmfx.check_onnx(path, "2:4", only=["fisrt"])


# --- files and the command line -----------------------------------------------------------------


def test_the_result_prints_and_is_plain_as_a_dictionary(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="fc[0]")
    found = nmfx.check_onnx(save(tmp_path / "m.onnx", [node], {"w": pruned((8, 12), 0)}), "2:4")
    assert str(found) == (
        "layer  operator  weight  shape  axis  state      reason\n"
        "fc[0]  MatMul    w       8x12   0     satisfied\n\n"
        "1 of 1 weights satisfy 2:4 (keep 2 of every 4); not checked: 0"
    )
    assert json.loads(json.dumps(found.to_dict())) == {
        "pattern": "2:4",
        "ok": True,
        "layers": [
            {
                "name": "fc[0]",
                "operator": "MatMul",
                "weight": "w",
                "shape": [8, 12],
                "axis": 0,
                "state": "satisfied",
                "reason": "",
            }
        ],
    }


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(nmfx.NMError, match=r"m\.onnx: no such file"):
        nmfx.check_onnx(path, "2:4")
    for content in (b"", b"{}", b"\x00" * 64, np.random.default_rng(0).bytes(999)):
        path.write_bytes(content)
        with pytest.raises(nmfx.NMError, match=r"m\.onnx is no ONNX model"):
            nmfx.check_onnx(path, "2:4")
    save(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": pruned((8, 12), 0)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(nmfx.NMError):
        nmfx.check_onnx(path, "2:4")
    with pytest.raises(nmfx.NMError, match="4:2"):
        nmfx.check_onnx(path, "4:2")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="fc"),
        helper.make_node("MatMul", ["h", "h"], ["y"], name="scores"),
    ]
    path = tmp_path / "m.onnx"
    save(path, nodes, {"w": pruned((8, 12), 0)})
    assert run(capsys, "check", path, "--pattern", "2:4").splitlines() == [
        "skipped  scores (MatMul): it has no weight: its inputs are computed from those of the "
        "model",
        "1 of 1 weights satisfy 2:4 (keep 2 of every 4); not checked: 1",
    ]
    save(path, nodes, {"w": pruned((8, 12), 1)})
    text = run(capsys, "check", path, "--pattern", "2:4", status=1)
    assert "broken   fc (MatMul w): [" in text
    found = json.loads(run(capsys, "check", path, "--pattern", "2:4", "--json", status=1))
    assert [layer["state"] for layer in found["layers"]] == ["broken", "not checked"]
    run(capsys, "check", path, "--pattern", "2:4", "--only", "scores", status=1)
    assert "no layer" in run(capsys, "check", path, "--pattern", "2:4", "--skip", "z", status=2)
    assert "safetensors" in run(
        capsys, "check", path, "--pattern", "2:4", "--transposed", "fc", status=2
    )
    path.write_bytes(b"nothing")
    assert "is no ONNX model" in run(capsys, "check", path, "--pattern", "2:4", status=2)


def test_deep_graphs_and_constants_used_twice(tmp_path: Path) -> None:
    """As deep as networks are: Python's stack is not."""
    names = ["x", *(f"a{i}" for i in range(3000))]
    nodes = [helper.make_node("Relu", [one], [two]) for one, two in itertools.pairwise(names)]
    twice = ["v", *(f"c{i}" for i in range(20)), "w"]
    nodes += [helper.make_node("Add", [one] * 2, [two]) for one, two in itertools.pairwise(twice)]
    nodes.append(helper.make_node("MatMul", [names[-1], "w"], ["y"]))
    path = save(tmp_path / "deep.onnx", nodes, {"v": pruned((8, 12), 0)})
    assert one(path).state == "satisfied"


def test_globs_in_one_text_are_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": pruned((8, 12), 0)},
    )
    with pytest.raises(nmfx.NMError, match=r"only='fc\*' is one text; write a list of globs"):
        nmfx.check_onnx(path, "2:4", only="fc*")
