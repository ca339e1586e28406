"""conv_prepacked: equals conv1d and conv2d, keeps one copy, steps aside where it must."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import PREPACKED_WINS, install
from torch import Tensor, nn

import nmfx
from nmfx.ops.conv_prepacked import conv_prepacked
from nmfx.ops.weight_copy import WeightCopy, can_prepack

pytestmark = [
    pytest.mark.skipif(
        can_prepack(torch.zeros(16, 16, 1, 1)) is not None, reason="oneDNN is not available"
    ),
    # torch's own convolution says so once per process.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
X = torch.linspace(-2, 2, 2 * 16 * 6 * 5).reshape(2, 16, 6, 5).sin()
LINES = X.flatten(2)


@pytest.fixture
def reorders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every copy that is made."""
    made: list[int] = []
    module = sys.modules["nmfx.ops.conv_prepacked"]
    original = module._reorder

    def counted(*args: Any) -> Tensor:
        made.append(0)
        return original(*args)

    monkeypatch.setattr(module, "_reorder", counted)
    return made


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(2, -1).contiguous().transpose(2, -1),
    "rows apart": lambda x: x[..., ::2],
    "part of channels": lambda x: torch.cat([x, x], 1)[:, 8:24],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
    "one pixel": lambda x: x[(..., *[slice(1)] * (x.ndim - 2))],
}
# kernel, stride, padding, dilation, groups
CASES: list[tuple[tuple[int, int], Any, Any, Any, int]] = [
    ((1, 1), 1, 0, 1, 1),
    ((3, 3), 1, 1, 1, 1),
    ((3, 2), (2, 1), (1, 2), (1, 2), 2),
    ((2, 2), 1, "same", 1, 1),
    ((1, 1), 2, "valid", 1, 16),
    ((3, 3), (2, 2), (1, 1), (1, 1), 4),
]


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["weight", "weight channels-last"])
def test_prepacked_equals_conv2d(layout: str, case: Any, last: bool, reorders: list[int]) -> None:
    kernel, stride, padding, dilation, groups = case
    weight = torch.randn(32, 16 // groups, *kernel)
    weight = weight.contiguous(memory_format=torch.channels_last) if last else weight
    x = LAYOUTS[layout](X)
    if layout == "one pixel" and padding in (0, "valid") and kernel != (1, 1):
        pytest.skip("smaller than the kernel")
    for bias in (torch.randn(32), None):
        kept = WeightCopy()
        expected = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        for _ in range(2):
            actual = conv_prepacked(x, weight, bias, stride, padding, dilation, groups, 2, kept)
            torch.testing.assert_close(actual, expected)
            assert actual.stride() == expected.stride()
    assert len(reorders) == 2, "one copy for each `kept`"


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    "rest", [(1, 0, 1, 1), (2, 1, 1, 2), ((1,), "same", (2,), 1)], ids=["plain", "groups", "same"]
)
def test_prepacked_equals_conv1d(layout: str, rest: Any, reorders: list[int]) -> None:
    weight, bias = torch.randn(8, 16 // rest[3], 3 if rest[1] else 1), torch.randn(8)
    x, kept = LAYOUTS[layout](LINES), WeightCopy()
    expected = F.conv1d(x, weight, bias, *rest)
    for _ in range(2):
        actual = conv_prepacked(x, weight, bias, *rest, 1, kept)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()
    assert len(reorders) == 1, "the copy is kept"


def call(x: Tensor, weight: Tensor, kept: WeightCopy | None = None, stride: int = 1) -> Tensor:
    kept = WeightCopy() if kept is None else kept
    return conv_prepacked(x, weight, None, stride, 1, 1, 1, 2, kept)


def test_it_is_the_copy_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["nmfx.ops.conv_prepacked"]
    original = module._reorder
    monkeypatch.setattr(module, "_reorder", lambda weight, *args: original(2 * weight, *args))
    weight = torch.randn(8, 16, 3, 3)
    torch.testing.assert_close(call(X, weight), 2 * F.conv2d(X, weight, padding=1))


@pytest.mark.parametrize("order", ["AAAA", "ABAB", "ABCABCC", "BBACCA"])
def test_the_first_two_sizes_are_served_and_each_input_is_computed_in_one_way(
    order: str, reorders: list[int]
) -> None:
    weight, kept = torch.randn(8, 16, 3, 3), WeightCopy()
    inputs = {"A": X, "B": X[:1], "C": X[:, :, :3]}
    first: dict[str, Tensor] = {}
    for size in order:
        x = inputs[size]
        actual = call(x, weight, kept)
        torch.testing.assert_close(actual, F.conv2d(x, weight, padding=1))
        assert torch.equal(actual, first.setdefault(size, actual))
    assert len(reorders) == kept.count == min(2, len(set(order)))


def test_a_changed_stride_is_followed() -> None:
    weight, kept = torch.randn(8, 16, 3, 3), WeightCopy()
    for stride in (1, 2, 2, 2, 1):
        expected = F.conv2d(X, weight, stride=stride, padding=1)
        torch.testing.assert_close(call(X, weight, kept, stride), expected)


WRITES: dict[str, Callable[[nn.Conv2d], object]] = {
    "in place": lambda conv: conv.weight.mul_(2.0),
    "through data": lambda conv: conv.weight.data.mul_(2.0),
    "other parameter": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight * 2)),
    "channels-last": lambda conv: conv.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@torch.no_grad()
def test_prepacked_follows_the_weight(write: str, last: bool, reorders: list[int]) -> None:
    conv, kept = nn.Conv2d(16, 8, 3, padding=1, bias=False), WeightCopy()
    if last:
        conv.to(memory_format=torch.channels_last)
    call(X, conv.weight, kept)
    WRITES[write](conv)
    for _ in range(2):
        actual = call(X, conv.weight, kept)
        torch.testing.assert_close(actual, conv(X))
        assert actual.stride() == conv(X).stride()
    assert len(reorders) == 2 - (last and write == "channels-last"), "made anew once"


class Seen(torch.Tensor):
    """A tensor subclass."""


SIDESTEPS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "gradient of the input": lambda x, w: call(x.requires_grad_(), w).sum().backward(),
    "gradient of the weight": lambda x, w: call(x, w.requires_grad_()).sum().backward(),
    "float64": lambda x, w: call(x.double(), w.double()),
    "no batch": lambda x, w: call(x[0], w),
    "empty batch": lambda x, w: call(x[:0], w),
    "subclass": lambda x, w: call(x.as_subclass(Seen), w),
    "strided weight": lambda x, w: call(x, w.transpose(2, 3).contiguous().transpose(2, 3)),
    "vmap": lambda x, w: torch.func.vmap(lambda one: call(one[None], w))(x),
    "autocast": lambda x, w: torch.autocast("cpu", torch.bfloat16)(call)(x, w),
    "make_fx": lambda x, w: torch.fx.experimental.proxy_tensor.make_fx(lambda x, w: call(x, w))(
        x, w
    ),
    "fx": lambda x, w: torch.fx.symbolic_trace(lambda x: call(x, w))(x),
}


@pytest.mark.parametrize("how", list(SIDESTEPS))
def test_prepacked_steps_aside(how: str, reorders: list[int]) -> None:
    SIDESTEPS[how](X.clone(), torch.randn(8, 16, 3, 2))
    assert not reorders, f"{how}: the copy cannot serve this"


def test_what_does_not_fit_is_refused_as_by_conv2d() -> None:
    weight, kept = torch.randn(8, 16, 3, 3), WeightCopy()
    call(X, weight, kept)
    with pytest.raises(RuntimeError, match=r"expected input.* to have 16 channels"):
        call(X[:, :8], weight, kept)
    with pytest.raises(RuntimeError, match="bias"):
        conv_prepacked(X, weight, torch.zeros(7), 1, 1, 1, 1, 2, kept)
    torch.testing.assert_close(call(X, weight, kept), F.conv2d(X, weight, padding=1))


# --- as a layer --------------------------------------------------------------------------------

Pair = tuple[nn.Module, nn.Module]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """(folded, lowered with both layers prepacked)"""
    install(monkeypatch, PREPACKED_WINS)
    convs = nn.Conv2d(16, 8, 3, padding=1), nn.Flatten(2), nn.Conv1d(8, 4, 3, bias=False)
    model = nmfx.sparsify(nn.Sequential(*convs), {"?": "2:4"})
    lowered = nmfx.lower(model, (X,))
    assert [row.state for row in nmfx.report(lowered)] == ["prepacked", "prepacked"]
    torch.compiler.reset()
    yield nmfx.fold(model), lowered
    torch.compiler.reset()


@torch.no_grad()
def test_prepacked_convolutions_use_their_copies(pair: Pair, reorders: list[int]) -> None:
    folded, lowered = pair
    lowered = copy.deepcopy(lowered)
    for _ in range(2):
        torch.testing.assert_close(lowered(X), folded(X))
    assert len(reorders) == 2, "one for each layer"
    targets = [n.target for n in lowered[0].nmfx_graph.nodes if n.op == "call_function"]
    assert targets.count(conv_prepacked) == 1
    assert F.conv2d not in targets


@torch.no_grad()
def test_prepacked_convolutions_keep_channels_last(pair: Pair) -> None:
    folded, lowered = (model[0].to(memory_format=torch.channels_last) for model in pair)
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(lowered(x), folded(x))
        assert lowered(x).stride() == folded(x).stride()


@torch.no_grad()
def test_copies_and_pickles_of_prepacked_convolutions(pair: Pair) -> None:
    folded, lowered = pair
    lowered(X)
    assert list(lowered.state_dict()) == list(folded.state_dict())
    file = io.BytesIO()
    torch.save(lowered, file)
    file.seek(0)
    for twin in (copy.deepcopy(lowered), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(X), folded(X))
        assert [row.state for row in nmfx.report(twin)] == ["prepacked", "prepacked"]
        twin[0].weight.zero_()
        assert not torch.equal(twin(X), lowered(X))


def test_prepacked_convolutions_train_and_compile(pair: Pair, reorders: list[int]) -> None:
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
        compiled = torch.compile(lowered, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(X), folded(X))
    assert {F.conv2d, F.conv1d} <= set(graphs[0])
    assert not reorders, "compiled code lays out the weight by itself"


def test_prepacked_convolutions_are_traced_through(pair: Pair) -> None:
    class Through(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return False

    targets = [node.target for node in Through().trace(pair[1]).nodes]
    assert {F.conv2d, F.conv1d} <= set(targets)


def test_prepacked_convolutions_export(pair: Pair) -> None:
    folded, lowered = pair
    program = torch.export.export(lowered, (X,))
    torch.testing.assert_close(program.module()(X), folded(X))


@torch.no_grad()
def test_both_sizes_of_the_examples_are_measured_with_a_copy(
    monkeypatch: pytest.MonkeyPatch, reorders: list[int]
) -> None:
    fake = install(monkeypatch, PREPACKED_WINS)
    model = nmfx.sparsify(nn.Sequential(nn.Conv2d(16, 8, 3)), "2:4")
    nmfx.lower(model, [(X,), (X[:1],)])
    assert [names for names, _ in fake.asked] == [{"dense", "prepacked", "packed"}] * 2
    assert len(reorders) >= 2, "one per size while they are measured"
