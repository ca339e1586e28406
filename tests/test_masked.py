"""One node for a mask and the layer that reads it: the values and gradients of the two nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import nmfx
from nmfx.mask import nm_mask
from nmfx.ops.keep import keep
from nmfx.ops.masked import masked_addmm, masked_conv, masked_linear
from nmfx.ops.sr_ste import make_control, sr_ste

M = 4
CONTROL = make_control(0.25, 2)


class Layer(NamedTuple):
    """A layer as one node and as two, the shapes of its operands and the group dimension."""

    one: Callable[..., Tensor]
    two: Callable[..., Tensor]
    input: tuple[int, ...]
    weight: tuple[int, ...]
    bias: tuple[int, ...] | None
    dim: int = 1


def linear(*input: int, bias: bool = True) -> Layer:
    return Layer(
        lambda x, w, b, side: masked_linear(x, w, b, side, M, 1),
        F.linear,
        input,
        (6, 8),
        (6,) if bias else None,
    )


def addmm(*bias: int) -> Layer:
    return Layer(
        lambda x, w, b, side: masked_addmm(b, x, w, side, M, 0),
        lambda x, w, b: torch.addmm(b, x, w),
        (5, 8),
        (8, 6),
        bias,
        dim=0,
    )


def conv(dims: int, *options: object, groups: int = 1, bias: bool = True) -> Layer:
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    sides = (5, 7, 6)[:dims]
    return Layer(
        lambda x, w, b, side: masked_conv(dims, x, w, b, *options, groups, side, M, 1),
        lambda x, w, b: function(x, w, b, *options, groups),
        (2, 8 * groups, *sides),
        (6, 8, *(3, 2, 2)[:dims]),
        (6,) if bias else None,
    )


LAYERS = {
    "linear": linear(5, 8),
    "linear of a vector": linear(8),
    "linear of 4 dimensions": linear(2, 3, 5, 8),
    "linear without bias": linear(5, 8, bias=False),
    "linear of no rows": linear(0, 8),
    "addmm": addmm(6),
    "addmm with a full bias": addmm(5, 6),
    "addmm with a column": addmm(5, 1),
    "conv1d": conv(1, 2, 1, 1),
    "conv2d": conv(2, (2, 1), (1, 0), (1, 2)),
    "conv2d without bias": conv(2, 1, 1, 1, bias=False),
    "conv2d of groups": conv(2, 1, 1, 1, groups=2),
    "conv1d same": conv(1, 1, "same", 1),
    "conv3d": conv(3, 1, (1, 0, 1), 1),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def operands(layer: Layer, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    torch.manual_seed(1)
    shapes = (layer.input, layer.weight, layer.bias)
    return [s if s is None else torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def as_two(layer: Layer, side: Tensor = CONTROL) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        frozen = side.dtype is torch.bool
        return layer.two(x, keep(w, side) if frozen else sr_ste(w, side, M, layer.dim), b)

    return call


def as_one(layer: Layer, side: Tensor = CONTROL) -> Callable[..., Tensor]:
    return lambda x, w, b: layer.one(x, w, b, side)


def outputs(call: Callable[..., Tensor], tensors: list[Tensor | None]) -> list[Tensor]:
    """The result and the gradients of all that ask for one."""
    out = call(*tensors)
    asking = [t for t in tensors if t is not None and t.requires_grad]
    if not asking:
        return [out]
    torch.manual_seed(2)
    return [out, *torch.autograd.grad(out, asking, torch.randn_like(out))]


def assert_same(actual: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(actual) == len(wanted)
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


@each_layer
def test_values_and_gradients_are_those_of_two_nodes(name: str) -> None:
    layer = LAYERS[name]
    for asking in itertools.product((False, True), repeat=3):
        tensors = operands(layer)
        for tensor, asks in zip(tensors, asking, strict=True):
            if tensor is not None:
                tensor.requires_grad_(asks)
        assert_same(outputs(as_one(layer), tensors), outputs(as_two(layer), tensors))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("frozen", [False, True], ids=["sr_ste", "frozen"])
def test_every_bit_of_a_transposed_input_is_that_of_two_nodes(bias: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    layer = linear(5, 8, bias=bias)
    _, *rest = operands(layer, torch.float32)
    side = nm_mask(rest[0].detach(), "2:4", layer.dim) if frozen else CONTROL
    for width in range(2, 20):  # one product or several: some widths round differently
        x = torch.randn(2, 8, width).transpose(1, 2)
        assert torch.equal(as_one(layer, side)(x, *rest), as_two(layer, side)(x, *rest))


@each_layer
def test_a_fixed_mask_too(name: str) -> None:
    layer, tensors = LAYERS[name], operands(LAYERS[name])
    mask = nm_mask(tensors[1].detach(), "2:4", layer.dim)
    assert_same(outputs(as_one(layer, mask), tensors), outputs(as_two(layer, mask), tensors))


@each_layer
def test_no_grad_is_the_same(name: str) -> None:
    layer, tensors = LAYERS[name], operands(LAYERS[name])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = as_one(layer)(*tensors)
            assert not out.requires_grad
            assert torch.equal(out, as_two(layer)(*tensors))


@each_layer
def test_double_backward_is_that_of_two_nodes(name: str) -> None:
    layer, tensors = LAYERS[name], operands(LAYERS[name])

    def second(call: Callable[..., Tensor]) -> list[Tensor]:
        asking = [t for t in tensors if t is not None]
        first = torch.autograd.grad(call(*tensors).pow(2).sum(), asking, create_graph=True)
        total = sum(grad.sin().sum() for grad in first)
        return [*first, *torch.autograd.grad(total, asking)]

    assert_same(second(as_one(layer)), second(as_two(layer)))


@each_layer
@pytest.mark.parametrize("frozen", [False, True], ids=["sr_ste", "frozen"])
def test_autocast_is_that_of_two_nodes(name: str, frozen: bool) -> None:
    layer, tensors = LAYERS[name], operands(LAYERS[name], torch.float32)
    side = nm_mask(tensors[1].detach(), "2:4", layer.dim) if frozen else CONTROL
    with torch.autocast("cpu", torch.bfloat16):
        one, two = outputs(as_one(layer, side), tensors), outputs(as_two(layer, side), tensors)
    for got, want in zip(one, two, strict=True):
        assert got.dtype == want.dtype
        # Two nodes round the sum of rows and the products in another order.
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["linear", "addmm", "conv2d"])
def test_autocast_of_other_weights(name: str, dtype: torch.dtype, target: torch.dtype) -> None:
    layer = LAYERS[name]
    tensors = operands(layer, dtype)
    if dtype != torch.float64:  # which autocast leaves alone
        tensors[0] = tensors[0].detach().float().requires_grad_()
    with torch.autocast("cpu", target):
        one, two = outputs(as_one(layer), tensors), outputs(as_two(layer), tensors)
    for got, want in zip(one, two, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["linear", "addmm with a full bias", "conv2d"])
def test_compiled_autograd_takes_it(name: str) -> None:
    layer, tensors = LAYERS[name], operands(LAYERS[name])
    wanted = outputs(as_one(layer), tensors)
    out = as_one(layer)(*tensors)
    torch.manual_seed(2)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        out.backward(torch.randn_like(out))
    assert_same([t.grad for t in tensors if t is not None], wanted[1:])
    torch.compiler.reset()


def test_enable_grad_within_inference_mode_records_nothing() -> None:
    layer = LAYERS["linear"]
    x, weight, bias = operands(layer)
    with torch.inference_mode():
        made = x * 1
        with torch.enable_grad():
            assert not as_one(layer)(made, weight, bias).requires_grad
            assert not as_one(layer)(x, weight, bias).requires_grad


@each_layer
def test_checkpointing_is_the_same(name: str) -> None:
    layer, tensors = LAYERS[name], operands(LAYERS[name])
    again = outputs(lambda *t: checkpoint(as_one(layer), *t, use_reentrant=False), tensors)
    assert_same(again, outputs(as_two(layer), tensors))


@each_layer
def test_torch_func_is_the_same(name: str) -> None:
    layer, tensors = LAYERS[name], [t if t is None else t.detach() for t in operands(LAYERS[name])]

    def loss(weight: Tensor, call: Callable[..., Tensor]) -> Tensor:
        return call(tensors[0], weight, tensors[2]).square().sum()

    found = [torch.func.grad(loss)(tensors[1], make(layer)) for make in (as_one, as_two)]
    torch.testing.assert_close(*found)


@each_layer
def test_backward_refuses_a_weight_that_changed(name: str) -> None:
    layer, tensors = LAYERS[name], operands(LAYERS[name])
    out = as_one(layer)(*tensors)
    with torch.no_grad():
        tensors[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_layer
def test_backward_twice(name: str) -> None:
    layer, tensors = LAYERS[name], operands(LAYERS[name])
    out = as_one(layer)(*tensors).sum()
    asking = [t for t in tensors if t is not None]
    first = torch.autograd.grad(out, asking, retain_graph=True)
    second = torch.autograd.grad(out, asking)
    assert_same(list(first), list(second))


def test_shared_weights_add_up() -> None:
    layer = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), {"0": "2:4"})[0]
    x = torch.randn(3, 8)
    (layer(layer(x)).sum() + layer(2 * x).sum()).backward()
    weight = layer.weight.detach().clone().requires_grad_()

    def call(x: Tensor) -> Tensor:
        return F.linear(x, sr_ste(weight, make_control(2e-4, 2), 4, 1), layer.bias)

    (call(call(x)).sum() + call(2 * x).sum()).backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_the_gradient_is_not_shared_with_anyone() -> None:
    # The decay is added in place: a gradient that a hook has seen must not change afterwards.
    layer = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), {"0": "2:4"})[0]
    x = torch.randn(3, 8, requires_grad=True)
    out = layer(x)
    seed = torch.ones_like(out)
    seen: list[Tensor] = []
    layer.weight.register_hook(seen.append)
    out.backward(seed)
    assert torch.equal(seed, torch.ones_like(out))
    assert torch.equal(seen[0], layer.weight.grad)


def test_a_hook_on_saved_tensors_sees_what_a_dense_layer_saves() -> None:
    layer, packed = LAYERS["linear"], []
    x, w, b = operands(layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        as_one(layer)(x, w, b)
    assert [t.data_ptr() for t in packed] == [x.data_ptr(), w.data_ptr(), CONTROL.data_ptr()]


@each_layer
def test_the_output_can_be_changed_in_place(name: str) -> None:
    # As nn.ReLU(inplace=True) does, and models that scale their embeddings by `x *= scale`.
    layer = LAYERS[name]
    operands_of = operands(layer)
    one = outputs(lambda *tensors: as_one(layer)(*tensors).mul_(2.0), operands_of)
    two = outputs(lambda *tensors: as_two(layer)(*tensors) * 2.0, operands_of)
    assert_same(one, two)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_the_output_of_an_unbatched_convolution_too(kind: type[nn.Module]) -> None:
    model = nmfx.sparsify(nn.Sequential(kind(4, 4, 3), nn.ReLU(inplace=True)), "2:4")
    model(torch.randn(4, 5, 5)).sum().backward()
    assert model[0].weight.grad is not None
