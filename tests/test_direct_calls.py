"""On a GPU, layers call their Python kernels past torch's dispatcher, unless somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from nmfx.kernels import semi_structured as semi
from nmfx.mask import nm_project
from nmfx.ops import cuda, packed
from nmfx.ops.linear_nm import linear_nm
from nmfx.ops.linear_semi_structured import linear_semi_structured
from nmfx.packing import pack

OPS = {
    "packed": torch.ops.nmfx.linear_nm.default,
    "semi-structured": torch.ops.nmfx.linear_semi_structured.default,
}


@pytest.fixture(params=OPS)
def layer(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor, list[str], Any]]:
    """A layer, its dense weight, and what is called directly; a CPU stands in for the GPU."""
    weight = nm_project(torch.randn(32, 64).bfloat16(), "2:4", 1)
    op, called = OPS[request.param], []
    real = packed.ON_GPU[op]

    def direct(*args: Any) -> Tensor:
        called.append("direct")
        return real(*args)

    monkeypatch.setitem(packed.ON_GPU, op, direct)
    monkeypatch.setattr(packed, "_is_on_gpu", lambda input: True)
    if request.param == "packed":
        both = pack(weight, "2:4")
        yield lambda x: linear_nm(x, *both, None, 32, 64, 2, 4), weight, called, op
    else:
        compressed, meta = semi.compress(weight, semi.CUTLASS)
        constants = compressed, meta, None, 32, 64, weight.dtype
        yield lambda x: linear_semi_structured(x, *constants), weight, called, op


def check(layer: Any, x: Tensor, calls: int) -> None:
    call, weight, called, _ = layer
    y = call(x)
    torch.testing.assert_close(y.detach().float(), F.linear(x.detach(), weight).float())
    assert len(called) == calls


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64), (64,), (0, 64)])
def test_a_call_that_nobody_looks_at_is_direct(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).bfloat16()
    check(layer, x, 1)
    with torch.no_grad():
        check(layer, x.clone().requires_grad_(), 2)
    with torch.inference_mode():
        check(layer, x, 3)


def test_results_are_no_views_and_may_be_changed(layer: Any) -> None:
    for shape in ((64,), (3, 64), (2, 3, 64)):
        with torch.no_grad():
            y = layer[0](torch.randn(shape).bfloat16())
        assert not y._is_view()
        y += torch.ones(32).bfloat16().requires_grad_()
        assert y.requires_grad
    assert len(layer[2]) == 3


class Wrapped(Tensor):
    """A tensor that torch's dispatcher asks how to compute with it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapped) else x

        return func(*map(unwrap, args), **(kwargs or {}))


@pytest.mark.parametrize("which", ["input", "bias"])
def test_classes_of_tensors_are_asked(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nm_project(torch.randn(32, 64).bfloat16(), "2:4", 1)
    monkeypatch.setattr(packed, "_is_on_gpu", lambda input: True)
    monkeypatch.setitem(packed.ON_GPU, OPS["packed"], None)  # fails if it is called
    x, bias = torch.randn(3, 64).bfloat16(), torch.randn(32).bfloat16()
    wanted = F.linear(x, weight, bias)
    x, bias = (Wrapped(x), bias) if which == "input" else (x, Wrapped(bias))
    found = linear_nm(x, *pack(weight, "2:4"), bias, 32, 64, 2, 4)
    torch.testing.assert_close(found, wanted)


def test_a_graph_before_dispatch_holds_the_operator(layer: Any) -> None:
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        graph = make_fx(layer[0], pre_dispatch=True)(x)
    assert layer[3] in {node.target for node in graph.graph.nodes}
    assert not layer[2]


def test_gradients_go_through_torch(layer: Any) -> None:
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    check(layer, x, 0)
    layer[0](x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 32).bfloat16() @ layer[1])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch 2.11, about its own profiler
def test_a_profile_shows_the_operator(layer: Any) -> None:
    x = torch.randn(3, 64).bfloat16()
    with torch.profiler.profile() as profile, torch.no_grad():
        check(layer, x, 0)
    name = layer[3].name().split(".")[0]
    assert name in {event.key for event in profile.key_averages()}


def test_a_dispatch_mode_sees_the_operator(layer: Any) -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode(), torch.no_grad():
        layer[0](torch.randn(3, 64).bfloat16())
    assert layer[3] in seen
    assert not layer[2]


def test_a_compiled_graph_holds_the_operator(layer: Any) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(layer[0], backend=keep, fullgraph=True)(torch.randn(3, 64).bfloat16())
    assert any(node.target is layer[3] for node in graphs[0].graph.nodes)


def test_what_is_called_is_what_torch_would_call() -> None:
    assert packed.ON_GPU[OPS["packed"]] is cuda.linear
    assert set(packed.ON_GPU) == set(OPS.values())
