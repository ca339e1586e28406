"""Leaf capture: every linear and conv class keeps its own forward, with one sr_ste in it."""

from __future__ import annotations

import copy
import inspect
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked_reference import nm_mask
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from transformers.pytorch_utils import Conv1D

import nmfx
from nmfx.ops.sr_ste import sr_ste

C1, C2, C3 = (2, 8, 7), (2, 8, 7, 7), (2, 8, 5, 5, 5)
T = nn.ConvTranspose2d

# name -> (module, shape of the input, group dimension)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(8, 6), (3, 8), 1),
    "linear_no_bias": (lambda: nn.Linear(8, 6, bias=False), (3, 8), 1),
    "linear_4d": (lambda: nn.Linear(8, 6), (2, 3, 4, 8), 1),
    "linear_1d": (lambda: nn.Linear(8, 6), (8,), 1),
    "linear_double": (lambda: nn.Linear(8, 6).double(), (3, 8), 1),
    "non_dynamic": (
        lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 6),
        *((3, 8), 1),
    ),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), C1, 1),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3), C2, 1),
    "conv3d": (lambda: nn.Conv3d(8, 6, 3), C3, 1),
    "conv2d_unbatched": (lambda: nn.Conv2d(8, 6, 3), C2[1:], 1),
    "conv2d_stride": (lambda: nn.Conv2d(8, 6, 3, stride=(2, 1)), C2, 1),
    "conv2d_padding": (lambda: nn.Conv2d(8, 6, 3, padding=(1, 2)), C2, 1),
    "conv2d_dilation": (lambda: nn.Conv2d(8, 6, 3, dilation=2), C2, 1),
    "conv2d_groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), C2, 1),
    "conv2d_no_bias": (lambda: nn.Conv2d(8, 6, 3, bias=False), C2, 1),
    "conv2d_same": (lambda: nn.Conv2d(8, 6, 3, padding="same"), C2, 1),
    "conv2d_valid": (lambda: nn.Conv2d(8, 6, 3, padding="valid"), C2, 1),
    **{
        f"conv{d}d_{mode}": (
            lambda d=d, mode=mode: getattr(nn, f"Conv{d}d")(8, 6, 3, padding=1, padding_mode=mode),
            *((C1, C2, C3)[d - 1], 1),
        )
        for d in (1, 2, 3)
        for mode in ("reflect", "replicate", "circular")
    },
    "conv2d_same_circular": (
        lambda: nn.Conv2d(8, 6, 3, padding="same", padding_mode="circular"),
        *(C2, 1),
    ),
    "transpose1d": (lambda: nn.ConvTranspose1d(8, 6, 3), C1, 0),
    "transpose2d": (lambda: T(8, 6, 3), C2, 0),
    "transpose3d": (lambda: nn.ConvTranspose3d(8, 6, 3), C3, 0),
    "transpose2d_groups": (lambda: T(8, 6, 3, groups=2), C2, 0),
    "transpose2d_stride": (lambda: T(8, 6, 3, 2, 1, 1, dilation=2), C2, 0),
    "transpose2d_no_bias": (lambda: T(8, 6, 3, bias=False), C2, 0),
    "hf_conv1d": (lambda: Conv1D(6, 8), (2, 3, 8), 0),
}


def only(module: nn.Module, pattern: str = "2:4") -> nn.Module:
    """A lone layer, sparsified."""
    return nmfx.sparsify(module, pattern)


def masked(module: nn.Module, dim: int, n: int = 2, m: int = 4) -> nn.Module:
    """A dense copy whose pruned weights are zero."""
    module = copy.deepcopy(module)
    module.weight.data.masked_fill_(~nm_mask(module.weight, n, m, dim), 0.0)
    return module


def nodes(module: nn.Module, target: Any = sr_ste) -> list[Any]:
    return [node for node in type(module).nmfx_graph.nodes if node.target is target]


@pytest.mark.parametrize("name", LAYERS)
def test_layer_computes_with_the_masked_weight(name: str) -> None:
    build, shape, dim = LAYERS[name]
    dense = build()
    dtype = dense.weight.dtype
    reference, layer = masked(dense, dim), only(copy.deepcopy(dense))
    x = torch.randn(shape, dtype=dtype)

    expected = reference(x)
    actual = layer(x)
    assert torch.equal(actual, expected), f"{name}: differs by {(actual - expected).abs().max()}"
    assert not torch.equal(actual, dense(x)), f"{name}: nothing was masked"
    assert torch.equal(layer(input=x) if name != "hf_conv1d" else layer(x=x), expected)

    (node,) = nodes(layer)
    assert node.args[2:] == (4, dim), f"{name}: {node.args}"
    type(layer).nmfx_graph.lint()
    (row,) = nmfx.report(layer).rows
    assert (row.capture, row.state) == ("leaf", "sparse"), f"{name}: {row}"


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradient_is_straight_through_plus_decay(name: str) -> None:
    build, shape, dim = LAYERS[name]
    dense = build()
    reference, layer = masked(dense, dim), only(copy.deepcopy(dense))
    nmfx.set_lambda(layer, 0.25)
    x = torch.randn(shape, dtype=dense.weight.dtype)
    for module in (reference, layer):
        module(x).square().sum().backward()
    pruned = torch.where(nm_mask(dense.weight, 2, 4, dim), 0.0, dense.weight)
    expected = reference.weight.grad + 0.25 * pruned
    assert torch.equal(layer.weight.grad, expected), f"{name}: gradient of the weight"
    if dense.bias is not None:
        assert torch.equal(layer.bias.grad, reference.bias.grad), f"{name}: gradient of the bias"


@pytest.mark.parametrize("name", ["transpose1d", "transpose2d", "transpose3d"])
def test_transposed_layer_takes_an_output_size_at_run_time(name: str) -> None:
    build, shape, dim = LAYERS[name]
    dense = build()
    dense.stride = tuple(2 for _ in dense.stride)
    layer, reference, x = only(copy.deepcopy(dense)), masked(dense, dim), torch.randn(shape)
    smallest = reference(x).shape[2:]
    for extra in (0, 1):
        size = [side + extra for side in smallest]
        actual = layer(x, size)
        assert list(actual.shape[2:]) == size
        assert torch.equal(actual, reference(x, size))
        assert torch.equal(layer(x, output_size=size), reference(x, output_size=size))
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, [1000] * len(smallest))


# --- late binding ------------------------------------------------------------------------------


def both(layer: nn.Module, dense: nn.Module, dim: int, x: Tensor) -> None:
    expected = masked(dense, dim)(x)
    assert torch.equal(layer(x), expected), "a change made after sparsify has no effect"


def test_bias_added_and_removed_later_counts() -> None:
    dense, x = nn.Linear(8, 6, bias=False), torch.randn(3, 8)
    layer = only(copy.deepcopy(dense))
    cls = type(layer)
    for module in (layer, dense):
        module.bias = nn.Parameter(torch.arange(6.0))
    both(layer, dense, 1, x)
    for module in (layer, dense):
        module.bias = None
    both(layer, dense, 1, x)
    assert type(layer) is cls, "a bias is no part of the code"


@pytest.mark.parametrize(
    "change",
    [{"stride": (2, 2)}, {"padding": (2, 0)}, {"dilation": (2, 1)}, {"padding": "same"}],
    ids=str,
)
def test_changed_conv_attributes_count_without_a_new_class(change: dict[str, Any]) -> None:
    dense, x = nn.Conv2d(8, 6, 3, padding=1), torch.randn(C2)
    layer = only(copy.deepcopy(dense))
    cls = type(layer)
    for module in (layer, dense):
        for name, value in change.items():
            setattr(module, name, value)
    both(layer, dense, 1, x)
    assert type(layer) is cls


def test_a_changed_padding_mode_is_traced_again() -> None:
    dense, x = nn.Conv2d(8, 6, 3, padding=1), torch.randn(C2)
    layer = only(copy.deepcopy(dense))
    zeros = type(layer)
    for mode in ("circular", "reflect", "circular"):
        for module in (layer, dense):
            module.padding_mode = mode
        both(layer, dense, 1, x)
        assert type(layer) is not zeros
        assert len(nodes(layer)) == 1
    layer.padding_mode = dense.padding_mode = "zeros"
    both(layer, dense, 1, x)
    assert type(layer) is zeros, "the first class is cached"


def test_a_replaced_weight_counts() -> None:
    dense, x = nn.Linear(8, 6), torch.randn(3, 8)
    layer = only(copy.deepcopy(dense))
    new = torch.randn(6, 8)
    layer.weight, dense.weight = nn.Parameter(new.clone()), nn.Parameter(new.clone())
    both(layer, dense, 1, x)
    layer.weight.data, dense.weight.data = new * -3 + 1, new * -3 + 1
    both(layer, dense, 1, x)


@pytest.mark.parametrize("folded", [False, True])
def test_batch_norm_fuses_into_a_sparsified_and_a_folded_conv(folded: bool) -> None:
    conv, norm, x = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), torch.randn(C2)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    model = nmfx.sparsify(nn.Sequential(conv, norm).eval(), "2:4")
    expected = model(x)
    conv = nmfx.fold(model)[0] if folded else conv
    fused = fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(fused(x), expected)
    assert nmfx.is_nm(fused.weight, "2:4", 1) is folded, "folded zeros survive, raw weights stay"


def test_batch_norm_fuses_into_a_sparsified_linear() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).eval()
    model[1].running_mean.uniform_(-1, 1)
    nmfx.sparsify(model, {"0": "2:4"})
    x = torch.randn(3, 8)
    torch.testing.assert_close(fuse_linear_bn_eval(model[0], model[1])(x), model(x))


# --- shared classes ----------------------------------------------------------------------------


def test_one_class_serves_modules_patterns_of_one_m_and_lambdas() -> None:
    a, b = only(nn.Linear(8, 6)), only(nn.Linear(16, 4, bias=False))
    c = nmfx.sparsify(nn.Linear(8, 6), "1:4", lambda_w=0.5)
    assert type(a) is type(b), "the class depends on shapes or the bias"
    assert type(a) is type(c), "the class depends on N or lambda"
    assert type(a) is not type(only(nn.Linear(8, 6), "2:8")), "M is part of the code"
    assert type(only(nn.Conv2d(8, 6, 3))) is type(only(nn.Conv2d(16, 4, 5, 2, 1, 2, 4)))
    nmfx.set_pattern(a, "1:4")
    assert type(a) is type(b)


def test_modules_of_one_class_keep_their_own_pattern_and_lambda() -> None:
    dense, x = nn.Linear(8, 6), torch.randn(3, 8)
    one, two = (
        nmfx.sparsify(copy.deepcopy(dense), p, lambda_w=v) for p, v in (("1:4", 1), ("2:4", 0))
    )
    assert torch.equal(one(x), masked(dense, 1, 1)(x))
    assert torch.equal(two(x), masked(dense, 1, 2)(x))
    nmfx.set_pattern(one, "3:4")
    assert torch.equal(one(x), masked(dense, 1, 3)(x))
    assert torch.equal(two(x), masked(dense, 1, 2)(x))


def test_the_source_of_a_generated_forward_can_be_read() -> None:
    layer = only(nn.Conv2d(8, 6, 3))
    source = inspect.getsource(type(layer).forward)
    assert source.count("nmfx_masked_conv(2, input_1, weight, bias, ") == 1, source
    assert "groups, _nmfx_control0, 4, 1)" in source
    assert list(inspect.signature(layer.forward).parameters) == ["input"]


def test_tracebacks_show_the_generated_line() -> None:
    layer = only(nn.Linear(8, 6))
    with pytest.raises(RuntimeError) as info:
        layer(torch.randn(3, 9))
    assert any("linear(" in str(entry.statement) for entry in info.traceback), info.traceback


def test_a_sparsified_type_still_constructs_dense_layers() -> None:
    layer = only(nn.Conv2d(8, 6, 3))
    new = type(layer)(8, 4, 3, padding=1, padding_mode="circular")
    assert type(new) is nn.Conv2d
    assert new(torch.randn(C2)).shape == (2, 4, 7, 7)


# --- subclasses --------------------------------------------------------------------------------

SCALE = 2.0


def doubled(x: Tensor) -> Tensor:
    return x * 2


class Straight(nn.Linear):
    """Overrides the forward without control flow and holds more than nn.Linear."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("shift", torch.ones(6))
        self.factor = 0.5
        self.act = nn.ReLU()

    def forward(self, input: Tensor, bonus: float = 1.0) -> Tensor:
        return self.act(super().forward(input * self.factor)) * self.gain + self.shift * bonus


class Inherits(Straight):
    pass


class Calls(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.before(x), self.weight, bias=self.bias)

    def before(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class Drops(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout(input, 0.5, self.training))


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 1, bias) + F.conv2d(
            input, weight, bias, self.stride, self.padding
        )


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(x)))


class Lora(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.a = nn.Parameter(torch.randn(8, 2))
        self.b = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a @ self.b


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class AsksNone(nn.Linear):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        out = super().forward(x)
        return out if skip is None else out + skip


class Loops(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return sum([super(Loops, self).forward(x * k) for k in (1.0, 2.0)])


class BranchesInMethod(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.before(x))

    def before(self, x: Tensor) -> Tensor:
        return x if self.training else x * 2


class BranchesInParent(BranchesInMethod):
    def before(self, x: Tensor) -> Tensor:
        return super().before(x) + 1


class AsksInMethod(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.before(x))

    def before(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return x * 2 if extra is None else x + extra


class AsksInParent(AsksInMethod):
    def before(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return super().before(x, extra) + 1


class ReadsGlobal(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * SCALE)


class CallsHelper(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(doubled(x))


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + random.random())


class Prints(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return super().forward(x)


class Counts(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


class Variadic(nn.Linear):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return super().forward(*args, **kwargs)


class ReadsWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight.sum()


class Product(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def make_closure(scale: list[float]) -> type[nn.Linear]:
    class Closes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * scale[0])

    return Closes


@pytest.mark.parametrize("cls", [Straight, Inherits, Calls, Drops, Lora])
def test_straight_line_subclass_is_a_leaf(cls: type[nn.Linear]) -> None:
    dense = cls(8, 6).eval()
    reference, layer, x = masked(dense, 1), only(copy.deepcopy(dense)), torch.randn(3, 8)
    assert nmfx.report(layer).rows[0].capture == "leaf"
    assert isinstance(layer, cls)
    assert len(nodes(layer)) == 1
    assert torch.equal(layer(x), reference(x)), f"{cls.__name__}: other than the masked layer"


def test_straight_line_subclass_keeps_arguments_defaults_and_attributes() -> None:
    dense, x = Straight(8, 6), torch.randn(3, 8)
    reference, layer = masked(dense, 1), only(copy.deepcopy(dense))
    assert torch.equal(layer(x, bonus=4.0), reference(x, bonus=4.0))
    assert torch.equal(layer(bonus=4.0, input=x), reference(x, 4.0))
    assert not torch.equal(layer(x, 4.0), layer(x))
    for module in (reference, layer):
        module.factor = -2.0
        module.act = nn.Tanh()
        module.gain.data.fill_(7.0)
    assert torch.equal(layer(x), reference(x)), "an attribute was frozen into the code"


def test_subclass_with_dropout_follows_its_mode() -> None:
    layer, x = only(Drops(8, 6)), torch.ones(64, 8)
    assert not torch.equal(layer(x), layer(x)), "dropout is off in train mode"
    layer.eval()
    assert torch.equal(layer(x), layer(x)), "dropout is on in eval mode"


def test_a_subclass_that_calls_its_layer_twice_has_one_node() -> None:
    dense, x = Twice(8, 8), torch.randn(3, 8)
    reference, layer = masked(dense, 1), only(copy.deepcopy(dense))
    assert nmfx.report(layer).rows[0].capture == "leaf"
    assert len(nodes(layer)) == 1
    assert torch.equal(layer(x), reference(x))


SCOPED = [
    *(
        Branches,
        AsksNone,
        Loops,
        BranchesInMethod,
        BranchesInParent,
        AsksInMethod,
        AsksInParent,
        ReadsGlobal,
        CallsHelper,
    ),
    *(Prints, Counts, Variadic, ReadsWeight, Product),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cls", SCOPED)
def test_subclass_that_a_trace_would_freeze_is_scoped_and_reported(cls: type[nn.Linear]) -> None:
    dense = cls(8, 6)
    reference, layer = masked(dense, 1), only(copy.deepcopy(dense))
    (row,) = nmfx.report(layer).rows
    assert row.capture == "scoped", f"{cls.__name__}: {row}"
    assert "does not trace" in row.reason
    for sign in (1.0, -1.0):
        x = sign * torch.rand(3, 8)
        for module in (reference, layer):
            module.train(sign > 0)
        assert torch.equal(layer(x), reference(x)), f"{cls.__name__}: sign {sign}"
    nmfx.set_lambda(layer, 0.25)
    for module in (reference, layer):
        module(x).square().sum().backward()
    pruned = torch.where(nm_mask(dense.weight, 2, 4, 1), 0.0, dense.weight)
    assert torch.equal(layer.weight.grad, reference.weight.grad + 0.25 * pruned)


def test_scoped_conv_subclass_equals_the_masked_one() -> None:
    dense, x = OwnConv(8, 6, 3), torch.randn(C2)
    reference, layer = masked(dense, 1), only(copy.deepcopy(dense))
    assert nmfx.report(layer).rows[0].capture == "scoped", "weight * 1 is another reader"
    assert torch.equal(layer(x), reference(x))


def test_python_side_effects_and_values_of_a_subclass_stay_live(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.ones(1, 8)
    layer = only(ReadsGlobal(8, 6))
    before = layer(x)
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    assert not torch.equal(layer(x), before), "the global's value was frozen"

    scale = [1.0]
    layer = only(make_closure(scale)(8, 6))
    before = layer(x)
    scale[0] = 3.0
    assert not torch.equal(layer(x), before), "the closure's value was frozen"

    layer = only(Noisy(8, 6))
    assert not torch.equal(layer(x), layer(x)), "random.random() was frozen"

    layer = only(Prints(8, 6))
    capsys.readouterr()
    layer(x)
    assert capsys.readouterr().out == "called\n"

    layer = only(Counts(8, 6))
    layer(x)
    layer(x)
    assert layer.calls == 2


def test_sparsify_runs_no_forward_of_a_scoped_subclass(
    capsys: pytest.CaptureFixture[str],
) -> None:
    only(Prints(8, 6))
    assert capsys.readouterr().out == ""


class WithLock(nn.Linear):
    """What cannot be pickled is dropped and made again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.resource = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "resource"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.resource = "made again"


def test_subclass_with_its_own_state_copies() -> None:
    layer, x = only(WithLock(8, 6)), torch.randn(3, 8)
    twin = copy.deepcopy(layer)
    assert twin.resource == "made again"
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))


def test_an_instance_forward_is_skipped_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 2  # as accelerate does
    nmfx.sparsify(model, "2:4")
    row = nmfx.report(model).rows[0]
    assert row.state == "dense"
    assert row.reason.startswith("its forward was replaced on the instance")
    assert type(model[0]) is nn.Linear
    x = torch.randn(2, 8)
    assert torch.equal(model[0](x), original(x) * 2)
