"""Convolutions on compressed weights, on the CPU: every machine here "has" CUTLASS."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_calls import BASE, LAYOUTS, Conv, convs, dense, input_of
from fake_timer import install
from hypothesis import given
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import nmfx
from nmfx.capture.packed import compress_weight, decompress_weight
from nmfx.kernels import semi_structured as semi
from nmfx.mask import nm_project
from nmfx.ops.conv_nm import conv_nm
from nmfx.ops.conv_semi_structured import conv_semi_structured
from nmfx.ops.pictures import as_pictures, patches
from nmfx.packing import as_matrix, from_matrix, pack_conv
from nmfx.pattern import Pattern
from nmfx.tuning.choose import choose_untimed

SEMI_WINS = {"dense": 3.0, "prepacked": 3.0, "packed": 2.0, "semi_structured": 1.0}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# torch's own convolution says so once per process.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def _cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)


def compressed(conv: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dense weight, compressed, meta, bias)."""
    weight = nm_project(torch.randn(conv.out, conv.channels, *conv.kernel).to(dtype), "2:4", 1)
    values, meta, _ = compress_weight(weight, 1)
    assert torch.equal(decompress_weight(values, meta, tuple(weight.shape), 1, dtype), weight)
    bias = torch.randn(conv.out).to(dtype) if conv.has_bias else None
    return weight, values, meta, bias


def run(conv: Conv, x: Tensor, weight: Tensor, *tensors: Tensor | None) -> Tensor:
    return conv_semi_structured(x, *tensors, *conv.settings, weight.shape, weight.dtype)


def as_two_four(conv: Conv) -> Conv:
    """The same call with a weight that can be compressed."""
    return conv._replace(
        pattern=Pattern(2, 4), channels=4 * (1 + conv.channels % 5), groups=1, activation="none"
    )


# --- the product -------------------------------------------------------------------------------


@given(convs())
def test_patches_times_the_matrix_are_the_convolution(conv: Conv) -> None:
    conv = conv._replace(groups=1)
    torch.manual_seed(conv.seed)
    weight = torch.randn(conv.out, conv.channels, *conv.kernel, dtype=torch.float64)
    assert torch.equal(from_matrix(as_matrix(weight), weight.shape), weight)
    x = input_of(conv, torch.float64)
    p = as_pictures(x, weight.shape, conv.stride, conv.padding, conv.dilation, "it")
    rows = patches(p.x, p.kernel_size, p.stride, p.padding, p.dilation)
    product = p.restored(F.linear(rows, as_matrix(weight)).movedim(-1, 1))
    torch.testing.assert_close(product, dense(x, weight, None, conv))


def test_patches_of_a_pointwise_kernel_are_no_copy() -> None:
    x = torch.randn(2, 5, 6, 8).movedim(-1, 1)
    rows = patches(x, [1, 1], [1, 1], [0, 0], [1, 1])
    assert rows.data_ptr() == x.data_ptr()
    assert rows.reshape(-1, 8).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(convs())
def test_a_compressed_convolution_is_near_the_dense_one(dtype: torch.dtype, conv: Conv) -> None:
    conv = as_two_four(conv)
    torch.manual_seed(conv.seed)
    weight, *tensors = compressed(conv, dtype)
    x = input_of(conv, dtype)
    out, bias = run(conv, x, weight, *tensors), tensors[-1]
    wanted = dense(x.double(), weight.double(), None if bias is None else bias.double(), conv)
    assert (out.shape, out.dtype) == (wanted.shape, dtype)
    error = (out.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    assert error <= TOLERANCE[dtype], (conv, float(error))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3,)])
def test_the_result_lies_as_that_of_a_packed_convolution(
    layout: str, kernel: tuple[int, ...]
) -> None:
    conv = BASE._replace(layout=layout, kernel=kernel, size=(7, 6)[: len(kernel)])
    weight, *tensors = compressed(conv, torch.bfloat16)
    x = input_of(conv, torch.bfloat16)
    packed = *pack_conv(weight, 1, "2:4"), tensors[-1]
    wanted = conv_nm(x, *packed, *conv.settings, weight.shape, 2, 4)
    assert run(conv, x, weight, *tensors).stride() == wanted.stride()


def test_an_empty_batch() -> None:
    weight, *tensors = compressed(BASE, torch.bfloat16)
    out = run(BASE, torch.randn(0, 8, 7, 6).bfloat16(), weight, *tensors)
    assert out.shape == (0, 6, 7, 6)


def test_under_vmap_it_is_the_same() -> None:
    weight, *tensors = compressed(BASE, torch.bfloat16)
    x = torch.randn(3, 2, 7, 6, 8).bfloat16().movedim(-1, 2)  # channels-last inside
    found = torch.vmap(lambda one: run(BASE, one, weight, *tensors))(x)
    wanted = torch.stack([run(BASE, one, weight, *tensors) for one in x])
    torch.testing.assert_close(found, wanted)


def test_gradients_are_those_of_the_dense_convolution() -> None:
    conv = BASE._replace(stride=2, dilation=2, size=(9, 8))
    torch.manual_seed(0)
    weight, values, meta, bias = compressed(conv, torch.bfloat16)
    assert bias is not None
    found = []
    for call in (
        lambda x, b: run(conv, x, weight, values, meta, b),
        lambda x, b: dense(x, weight, b, conv),
    ):
        x = input_of(conv._replace(seed=1), torch.bfloat16)
        torch.manual_seed(2)
        x, b = torch.randn_like(x).requires_grad_(), bias.clone().requires_grad_()
        out = call(x, b)
        torch.manual_seed(3)
        found.append(torch.autograd.grad(out, (x, b), torch.randn_like(out)))
    for mine, its in zip(*found, strict=True):
        assert mine.shape == its.shape
        assert (mine - its).float().norm() <= 1e-2 * its.float().norm()


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 8, 7, 6), (1, 1, 1, 2), "a compressed convolution has one group, got groups=2"),
        ((2, 9, 7, 6), (1, 1, 1, 1), "does not have the 8 channels of a weight of shape (6, 8, 3"),
        ((2, 8, 2, 6), (1, 0, 1, 1), "an input of (2, 6) padded by (0, 0) is smaller than a kern"),
        ((8, 7), (1, 0, 1, 1), "input of shape (8, 7) does not fit a weight of shape (6, 8, 3, 3)"),
        ((2, 8, 7, 6), (0, 0, 1, 1), "stride=(0, 0) is not two numbers of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(
    shape: tuple[int, ...], settings: tuple[Any, ...], message: str
) -> None:
    weight, *tensors = compressed(BASE, torch.bfloat16)
    with pytest.raises(nmfx.NMError) as error:
        conv_semi_structured(
            torch.randn(shape).bfloat16(), *tensors, *settings, weight.shape, weight.dtype
        )
    assert message in str(error.value)


def test_another_dtype_is_an_error() -> None:
    weight, *tensors = compressed(BASE, torch.bfloat16)
    with pytest.raises(nmfx.NMError, match=r"input is torch\.float16, the packed weight"):
        run(BASE, torch.randn(2, 8, 7, 6).half(), weight, *tensors)


# --- whole models ------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.wide = nn.Conv2d(64, 96, 3, stride=2, padding="valid", bias=False)
        self.norm = nn.BatchNorm2d(96)
        self.point = nn.Conv2d(96, 64, 1)
        self.grouped = nn.Conv2d(64, 64, 3, groups=2)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(self.stem(x).relu())).relu()
        return self.head(self.grouped(self.point(x)).relu().mean((2, 3)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 64, 3, 3).bfloat16())
        self.v = nn.Parameter(torch.randn(4, 64, 1, 1).bfloat16())

    def forward(self, x):  # torch pickles no graph whose annotations are text
        return F.conv2d(F.conv2d(x, self.w, stride=2, padding="valid").relu(), self.v)


X = torch.linspace(-2, 2, 2 * 3 * 11 * 9).reshape(2, 3, 11, 9).sin().bfloat16()
Y = torch.linspace(-2, 2, 2 * 64 * 11 * 9).reshape(2, 64, 11, 9).sin().bfloat16()
STATES = {
    "stem.weight": "dense",
    "wide.weight": "semi_structured",
    "point.weight": "semi_structured",
    "grouped.weight": "packed",
    "head.weight": "dense",
}


def states(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.state for row in nmfx.report(model)}


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
    return nmfx.sparsify(model.bfloat16(), "2:4").eval()


def lowered(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *calls: Any) -> nn.Module:
    install(monkeypatch, SEMI_WINS)
    return nmfx.lower(model, list(calls))


def test_a_model_of_convolutions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = net()
    folded = nmfx.fold(model)
    fast = lowered(monkeypatch, model, (X,))
    assert states(fast) == STATES
    torch.testing.assert_close(fast(X), folded(X), rtol=3e-2, atol=3e-2)
    assert torch.equal(fast.point.weight, folded.point.weight)
    rows = {row.fqn: row for row in nmfx.report(fast)}
    assert rows["wide.weight"].bytes == semi.compressed_bytes(96, 9 * 64, semi.CUTLASS)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(X), fast(X))
    nmfx.save(fast, tmp_path / "fast.safetensors")
    loaded = nmfx.load(tmp_path / "fast.safetensors", into=Net().bfloat16().eval())
    assert states(loaded) == STATES
    assert torch.equal(loaded(X), fast(X))
    again = nmfx.fold(loaded)
    assert torch.equal(again.point.weight, folded.point.weight)
    assert type(again.wide) is nn.Conv2d
    torch.testing.assert_close(again(X), folded(X), rtol=3e-2, atol=3e-2)


def test_it_compiles_in_one_graph_and_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = lowered(monkeypatch, net(), (X,))
    wanted = fast(X)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(fast, fullgraph=True)(X), wanted)
    program = torch.export.export(fast, (X,))
    torch.testing.assert_close(program.module()(X), wanted)
    products = [node for node in program.graph.nodes if "linear_semi" in str(node.target)]
    # An empty list comes back as None from a package of AOTInductor.
    assert [node.args[7] for node in products] == [[1, 0]] * 2


def test_weights_that_a_graph_reads_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nmfx.sparsify(fx.symbolic_trace(Functional()), "2:4")
    folded, fast = nmfx.fold(model), lowered(monkeypatch, model, (Y,))
    assert states(fast) == {"w": "semi_structured", "v": "packed"}
    assert "nmfx_conv_semi_structured" in fast.code
    assert torch.equal(pickle.loads(pickle.dumps(fast))(Y), fast(Y))
    torch.testing.assert_close(fast(Y), folded(Y), rtol=3e-2, atol=3e-2)
    again = nmfx.fold(fast)
    assert torch.equal(again.w, folded.w)
    torch.testing.assert_close(again(Y), folded(Y))


def test_a_convolution_in_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv1d(64, 64, 3, padding=1), nn.Conv1d(64, 4, 1)).bfloat16()
    model = nmfx.sparsify(model, {"0": "2:4"})
    x = Y.flatten(2)
    folded, fast = nmfx.fold(model), lowered(monkeypatch, model, (x,))
    assert states(fast)["0.weight"] == "semi_structured"
    torch.testing.assert_close(fast(x), folded(x), rtol=3e-2, atol=3e-2)


def test_autocast_computes_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = lowered(monkeypatch, net(), (X,))
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.point(torch.randn(1, 96, 4, 4)).dtype == torch.bfloat16


def test_algorithms_go_by_the_positions_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fastest(rows: Tensor, *rest: Any) -> int:
        asked.append(len(rows))
        return len(asked)

    monkeypatch.setattr("nmfx.tuning.layers.fastest_algorithm", fastest)
    fast = lowered(monkeypatch, net(), (X,), (X[:1],))
    positions = {"wide": 5 * 4, "point": 5 * 4}
    found = {
        name: dict(zip(*[iter(getattr(fast, name)._nmfx_sites[0].algorithms)] * 2, strict=True))
        for name in positions
    }
    assert {name: set(pairs) for name, pairs in found.items()} == {
        name: {count, 2 * count} for name, count in positions.items()
    }
    assert set(asked) == {20, 40}


def test_untimed_on_a_gpu_only_pointwise_convolutions_are_compressed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidate: Any = SimpleNamespace(
        kind="conv", dim=1, groups=1, capture="leaf", host=torch.nn.Conv2d(1, 1, 1), path="weight"
    )
    with FakeTensorMode():
        weight = torch.empty(64, 64, 3, 3, device="cuda", dtype=torch.float16)
    choice = choose_untimed(candidate, weight, Pattern(2, 4))
    assert choice.name == "dense"
    assert "unfolded" in choice.reason
    monkeypatch.setattr(semi, "why_not", lambda *args: None)
    monkeypatch.setattr("nmfx.tuning.layers._no_packed", lambda layer: "no Triton")
    with FakeTensorMode():
        weight = torch.empty(64, 64, 1, 1, device="cuda", dtype=torch.float16)
    choice = choose_untimed(candidate, weight, Pattern(2, 4))
    assert choice.name == "semi_structured"
