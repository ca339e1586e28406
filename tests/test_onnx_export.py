"""Folded models as ONNX: onnxruntime and OpenVINO compute the same, and check_onnx finds N:M."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import build, call, outputs

import nmfx

pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")
pytest.importorskip("onnx", reason="the onnx package is optional")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's and onnxscript's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The exporter says that torchvision is missing, at every call."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Net(nn.Module):
    """Exports Conv, grouped Conv, MatMul with a transposed weight, Gemm and ConvTranspose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=2, bias=False)
        self.fc = nn.Linear(16, 24)
        self.up = nn.ConvTranspose2d(24, 8, 2)
        self.flat = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.grouped(self.conv(x))).permute(0, 2, 3, 1)
        h = self.up(F.gelu(self.fc(h)).permute(0, 3, 1, 2))
        return self.head(F.silu(self.flat(h.mean((2, 3)))))


X = torch.linspace(-2, 2, 2 * 8 * 4 * 4).reshape(2, 8, 4, 4).sin()


def export(model: nn.Module, inputs: Any, path: Path, batch: bool = False) -> Path:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if batch else None
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        program = torch.onnx.export(
            model, args, kwargs=kwargs, dynamo=True, verbose=False, dynamic_shapes=shapes
        )
    assert program is not None
    program.save(str(path), external_data=True)
    return path


def feed(session: Any, inputs: Any) -> dict[str, Any]:
    values = inputs.values() if isinstance(inputs, dict) else inputs
    names = [one.name for one in session.get_inputs()]
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def run_ort(path: Path, inputs: Any) -> list[np.ndarray]:
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is optional")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feed(session, inputs))


def run_openvino(path: Path, x: Tensor) -> np.ndarray:
    openvino = pytest.importorskip("openvino", reason="openvino is optional")
    # On CPUs with bfloat16 it would compute in that.
    model = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return next(iter(model([x.numpy()]).values()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = nmfx.fold(nmfx.sparsify(Net().eval(), "2:4"))
    return model, export(model, (X,), tmp_path_factory.mktemp("onnx") / "model.onnx", batch=True)


@pytest.mark.parametrize("batch", [2, 5])
def test_onnxruntime_computes_what_the_folded_model_does(
    exported: tuple[nn.Module, Path], batch: int
) -> None:
    model, path = exported
    x = torch.randn(batch, 8, 4, 4)
    (got,) = run_ort(path, (x,))
    torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-5)


def test_openvino_reads_it_and_computes_the_same(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    torch.testing.assert_close(torch.tensor(run_openvino(path, X)), model(X), rtol=1e-4, atol=1e-5)


def test_check_onnx_names_each_layer_by_its_module(exported: tuple[nn.Module, Path]) -> None:
    _, path = exported
    found = {layer.name: layer for layer in nmfx.check_onnx(path, "2:4")}
    assert {name: (one.operator, one.axis, one.state) for name, one in found.items()} == {
        "conv": ("Conv", 1, "satisfied"),
        "grouped": ("Conv", 1, "satisfied"),
        "fc": ("MatMul", 0, "satisfied"),
        "up": ("ConvTranspose", 0, "satisfied"),
        "flat": ("Gemm", 1, "satisfied"),
        "head": ("Gemm", 1, "broken"),
    }
    assert not nmfx.check_onnx(path, "2:4").ok
    assert nmfx.check_onnx(path, "2:4", skip=["head"]).ok
    assert not nmfx.check_onnx(path, "1:4", skip=["head"]).ok


@pytest.mark.deep
@pytest.mark.parametrize("state", ["sparse", "lowered"])
def test_what_is_not_folded_is_refused_by_torch_with_the_operators_name(
    state: str, tmp_path: Path
) -> None:
    model: nn.Module = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8)).eval(), {"?": "2:4"})
    if state == "lowered":
        model = nmfx.lower(model, tune=False)
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as error:
        export(model, (torch.randn(2, 8),), tmp_path / "m.onnx")
    operator = {"sparse": "nmfx.sr_ste", "lowered": "nmfx.linear_nm"}[state]
    assert f"No ONNX function found for <OpOverload(op='{operator}'" in str(error.value)
    assert not (tmp_path / "m.onnx").exists()
    export(nmfx.fold(model), (torch.randn(2, 8),), tmp_path / "m.onnx")
    assert nmfx.check_onnx(tmp_path / "m.onnx", "2:4").ok


@pytest.mark.deep
@pytest.mark.parametrize("name", ["hf_bert", "hf_gpt2", "hf_llama", "encoder", "conv_family"])
def test_models_of_the_zoo_run_in_onnxruntime(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    model = nmfx.sparsify(model, "2:4")
    sparse = [row.fqn for row in nmfx.report(model) if row.state == "sparse"]
    folded = nmfx.fold(model)
    path = export(folded, inputs, tmp_path / "m.onnx")
    for got, want in zip(run_ort(path, inputs), outputs(call(folded, inputs)), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-4)
    states = [layer.state for layer in nmfx.check_onnx(path, "2:4")]
    # Some of torch's exports join q, k and v, which counts once.
    assert 0 < states.count("satisfied") <= len(sparse)
    assert states.count("broken") <= 1, "all but the output layer"
