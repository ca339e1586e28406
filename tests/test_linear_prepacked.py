"""linear_prepacked: equals linear, follows changes of the weight, steps aside where it must."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fake_timer import PREPACKED_WINS, install
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nmfx
from nmfx.ops.linear_prepacked import linear_prepacked
from nmfx.ops.weight_copy import WeightCopy, can_prepack

pytestmark = pytest.mark.skipif(
    can_prepack(torch.zeros(16, 16)) is not None, reason="oneDNN is not available"
)
X = torch.linspace(-2, 2, 3 * 16).reshape(3, 16).sin()


@pytest.fixture
def reorders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every copy that is made."""
    made: list[int] = []
    can_prepack(torch.zeros(16, 16))  # it asks once
    module = sys.modules["nmfx.ops.linear_prepacked"]
    original = module._reorder

    def counted(weight: Tensor) -> Tensor:
        made.append(0)
        return original(weight)

    monkeypatch.setattr(module, "_reorder", counted)
    return made


@pytest.mark.parametrize("shape", [(3, 16), (1, 16), (2, 3, 16), (0, 16), (129, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_prepacked_equals_linear(shape: tuple[int, ...], bias: bool, reorders: list[int]) -> None:
    weight, vector = torch.randn(9, 16), torch.randn(9) if bias else None
    x, copy_ = torch.randn(shape), WeightCopy()
    for _ in range(2):
        torch.testing.assert_close(
            linear_prepacked(x, weight, vector, copy_), F.linear(x, weight, vector)
        )
    assert len(reorders) == 1, "the copy is kept"


def test_prepacked_addmm(reorders: list[int]) -> None:
    weight, bias = torch.randn(16, 9), torch.randn(9)
    actual = linear_prepacked(X, weight, bias, WeightCopy(), True)
    torch.testing.assert_close(actual, torch.addmm(bias, X, weight))
    assert len(reorders) == 1


WRITES: dict[str, Callable[[nn.Linear], object]] = {
    "in place": lambda fc: fc.weight.mul_(2.0),
    "through data": lambda fc: fc.weight.data.mul_(2.0),
    "other data": lambda fc: setattr(fc.weight, "data", fc.weight.data * 2),
    "other parameter": lambda fc: setattr(fc, "weight", nn.Parameter(fc.weight * 2)),
    "load_state_dict": lambda fc: fc.load_state_dict(nn.Linear(16, 8).state_dict()),
    "nan": lambda fc: fc.weight.fill_(float("nan")),
}


@pytest.mark.parametrize("write", list(WRITES))
@torch.no_grad()
def test_prepacked_follows_the_weight(write: str, reorders: list[int]) -> None:
    fc, copy_ = nn.Linear(16, 8), WeightCopy()
    linear_prepacked(X, fc.weight, fc.bias, copy_)
    WRITES[write](fc)
    for _ in range(2):
        actual = linear_prepacked(X, fc.weight, fc.bias, copy_)
        torch.testing.assert_close(actual, fc(X), equal_nan=True)
    assert len(reorders) == 2, "made anew once"


class Seen(torch.Tensor):
    """A tensor subclass."""


def call(x: Tensor, weight: Tensor) -> Tensor:
    return linear_prepacked(x, weight, None, WeightCopy())


SIDESTEPS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "gradient of the input": lambda x, w: call(x.requires_grad_(), w).sum().backward(),
    "gradient of the weight": lambda x, w: call(x, w.requires_grad_()).sum().backward(),
    "float64": lambda x, w: call(x.double(), w.double()),
    "one dimension": lambda x, w: call(x[0], w),
    "subclass": lambda x, w: call(x.as_subclass(Seen), w),
    "strided weight": lambda x, w: call(x, w.t().contiguous().t()),
    "vmap": lambda x, w: torch.func.vmap(lambda row: call(row[None], w))(x),
    "jvp": lambda x, w: torch.func.jvp(lambda x: call(x, w), (x,), (x,)),
    "autocast": lambda x, w: torch.autocast("cpu", torch.bfloat16)(call)(x, w),
    "make_fx": lambda x, w: torch.fx.experimental.proxy_tensor.make_fx(call)(x, w),
    "fx": lambda x, w: torch.fx.symbolic_trace(lambda x: call(x, w))(x),
    "inference weight": lambda x, w: inference(x, w),
}


@torch.inference_mode()
def inference(x: Tensor, weight: Tensor) -> Tensor:
    return call(x, weight.clone())


@pytest.mark.parametrize("how", list(SIDESTEPS))
def test_prepacked_steps_aside(how: str, reorders: list[int]) -> None:
    SIDESTEPS[how](X.clone(), torch.randn(8, 16))
    assert not reorders, f"{how}: the copy cannot serve this"


def test_the_copy_is_no_state() -> None:
    kept = WeightCopy()
    call_ = linear_prepacked(X, torch.randn(8, 16), None, kept)
    assert kept._state is not None
    assert call_.shape == (3, 8)
    assert copy.deepcopy(kept)._state is None


def test_can_prepack_says_why_not() -> None:
    assert can_prepack(torch.zeros(4, 4, dtype=torch.float64)) == (
        "oneDNN keeps no layout for torch.float64"
    )
    assert can_prepack(torch.zeros(0, 4)) == "the weight is empty"
    assert (
        can_prepack(torch.zeros(4, 4, 1, 1, 1)) == "no layout is kept for weights with 5 dimensions"
    )
    assert can_prepack(torch.zeros(4, 4, device="meta")) == "oneDNN works on the CPU, not on meta"


# --- as a layer --------------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(folded, lowered with both layers prepacked)"""
    install(monkeypatch, PREPACKED_WINS)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), Conv1D(4, 8))
    model = nmfx.sparsify(model, {"?": "2:4"})
    lowered = nmfx.lower(model, (X,))
    assert [row.state for row in nmfx.report(lowered)] == ["prepacked", "prepacked"]
    torch.compiler.reset()
    yield nmfx.fold(model), lowered
    torch.compiler.reset()


Pair = tuple[nn.Module, nn.Module]


@torch.no_grad()
def test_a_prepacked_layer_uses_its_copy(pair: Pair, reorders: list[int]) -> None:
    folded, lowered = pair
    lowered = copy.deepcopy(lowered)
    for _ in range(2):
        torch.testing.assert_close(lowered(X), folded(X))
    assert len(reorders) == 2, "one for each layer"
    assert "prepacked" in repr(lowered[0])


@torch.no_grad()
def test_the_state_dict_of_a_prepacked_layer_is_dense(pair: Pair) -> None:
    folded, lowered = pair
    lowered(X)
    assert list(lowered.state_dict()) == list(folded.state_dict())
    for name, value in folded.state_dict().items():
        assert torch.equal(lowered.state_dict()[name], value)
    other = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), Conv1D(4, 8))
    lowered.load_state_dict(other.state_dict())
    torch.testing.assert_close(lowered(X), other(X))


@torch.no_grad()
def test_copies_and_pickles_of_prepacked_layers(pair: Pair) -> None:
    folded, lowered = pair
    lowered(X)
    file = io.BytesIO()
    torch.save(lowered, file)
    size = sum(t.nbytes for t in lowered.state_dict().values())
    assert file.tell() < size + 30_000, "the copy was saved too"
    file.seek(0)
    for twin in (copy.deepcopy(lowered), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(X), folded(X))
        assert [row.state for row in nmfx.report(twin)] == ["prepacked", "prepacked"]
        twin[0].weight.zero_()
        assert not torch.equal(twin(X), lowered(X))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_prepacked_layers_move_to_other_dtypes(pair: Pair, dtype: torch.dtype) -> None:
    folded, lowered = pair
    lowered(X)
    lowered.to(dtype)
    folded.to(dtype)
    x = X.to(dtype)
    torch.testing.assert_close(lowered(x), folded(x), rtol=2e-2, atol=2e-2)


def test_prepacked_layers_train_and_compile(pair: Pair, reorders: list[int]) -> None:
    folded, lowered = pair
    grads = []
    for model in (folded, lowered, torch.compile(lowered, backend="aot_eager", fullgraph=True)):
        x = X.clone().requires_grad_()
        model(x).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1:], [grads[0]] * 2)
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append([node.target for node in gm.graph.nodes if node.op == "call_function"])
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(lowered, backend=backend, fullgraph=True)(X), folded(X)
        )
    assert F.linear in graphs[0]
    assert torch.addmm in graphs[0]
    assert not reorders, "compiled code lays out the weight by itself"


def test_prepacked_layers_export(pair: Pair) -> None:
    folded, lowered = pair
    program = torch.export.export(lowered, (X,))
    torch.testing.assert_close(program.module()(X), folded(X))


def test_verbs_on_a_model_with_prepacked_layers(pair: Pair) -> None:
    _, lowered = pair
    for verb in (nmfx.freeze, nmfx.masks):
        with pytest.raises(nmfx.NMError, match="is lowered"):
            verb(lowered)
    with pytest.raises(nmfx.NMError, match=r"weight is prepacked; its dense weight is gone"):
        nmfx.unsparsify(lowered)
    with pytest.raises(nmfx.NMError, match="Sequential is lowered already"):
        nmfx.lower(lowered)
