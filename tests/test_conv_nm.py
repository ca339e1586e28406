"""nmfx::conv_nm against F.conv2d: values per instruction set, layouts, gradients, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conv_calls import BASE, LAYOUTS, Conv, convs, dense, input_of
from hypothesis import given
from test_native_linear import assert_near
from torch import Tensor

import nmfx
from nmfx.kernels import cpu
from nmfx.mask import nm_project
from nmfx.ops.conv_nm import conv_nm
from nmfx.ops.packed import ACTIVATIONS
from nmfx.packing import pack_conv, unpack_conv
from nmfx.pattern import Pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Without the library the reference kernel is tested, once.
ISAS = cpu.available() or ["reference"]

# torch's own convolution says so once per process.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def _restore_isa() -> Iterator[None]:
    name = cpu.isa()
    yield
    if name is not None:
        cpu.use_isa(name)


def use(isa: str) -> None:
    if isa != "reference":
        cpu.use_isa(isa)


def packed(conv: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dense weight, values, index, bias)."""
    weight = torch.randn(conv.out * conv.groups, conv.channels, *conv.kernel)
    weight = nm_project(weight, conv.pattern, 1).to(dtype)
    values, index = pack_conv(weight, conv.groups, conv.pattern)
    assert torch.equal(unpack_conv(values, index, weight.shape, conv.groups, conv.pattern), weight)
    bias = torch.randn(len(weight), dtype=dtype) if conv.has_bias else None
    return weight, values, index, bias


def run(conv: Conv, x: Tensor, weight: Tensor, *tensors: Tensor | None) -> Tensor:
    pattern = conv.pattern.n, conv.pattern.m
    return conv_nm(x, *tensors, *conv.settings, weight.shape, *pattern, conv.activation)


def check(isa: str, dtype: torch.dtype, conv: Conv) -> None:
    use(isa)
    torch.manual_seed(conv.seed)
    weight, values, index, bias = packed(conv, dtype)
    x = input_of(conv, dtype)
    actual = run(conv, x, weight, values, index, bias)
    assert actual.dtype == dtype, actual.dtype
    act, wide = ACTIVATIONS[conv.activation], None if bias is None else bias.double()
    wanted = act(dense(x.double(), weight.double(), wide, conv))
    squares = dense(x.double() ** 2, weight.double() ** 2, None if wide is None else wide**2, conv)
    assert_near(actual, wanted, squares)


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@given(convs())
def test_conv_nm_is_near_the_definition(isa: str, dtype: torch.dtype, conv: Conv) -> None:
    check(isa, dtype, conv)


@given(convs())
def test_conv_nm_in_float64_is_near_the_definition(conv: Conv) -> None:
    check(ISAS[0], torch.float64, conv)


@pytest.mark.parametrize("padding", [0, 2, (2, 1), "same", "valid"], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (5, 2)], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_conv_nm_of_every_kernel_padding_and_layout(
    isa: str, kernel: tuple[int, int], padding: Any
) -> None:
    for layout in LAYOUTS:
        for groups in (1, 2):
            conv = BASE._replace(kernel=kernel, padding=padding, layout=layout, groups=groups)
            check(isa, torch.float32, conv._replace(size=(19, 18), out=17))


@pytest.mark.parametrize("isa", ISAS)
def test_conv_nm_of_long_rows_of_channels(isa: str) -> None:
    for dtype in DTYPES:  # several panels of columns, blocks and tiles
        for layout in ("contiguous", "channels_last"):
            conv = BASE._replace(channels=256, out=150, size=(12, 13), layout=layout)
            check(isa, dtype, conv)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("isa", ISAS)
def test_conv_nm_with_one_output_pixel_per_image(isa: str, layout: str) -> None:
    for dtype in (*DTYPES, torch.float64):
        for kernel in ((1, 1), (3, 3), (1,), (3,)):
            conv = BASE._replace(kernel=kernel, size=kernel, padding=0, layout=layout)
            check(isa, dtype, conv._replace(out=17, batch=5))
            check(isa, dtype, conv._replace(out=17, batch=5, groups=2))


@pytest.mark.parametrize("isa", ISAS)
def test_conv_nm_of_an_empty_batch(isa: str) -> None:
    use(isa)
    weight, *tensors = packed(BASE, torch.float32)
    x = torch.randn(0, 8, 7, 6, requires_grad=True)
    out = run(BASE, x, weight, *tensors)
    assert out.shape == (0, 6, 7, 6), out.shape
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.shape == x.shape, grad.shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_conv_nm_has_the_memory_format_of_conv2d(isa: str, groups: int, layout: str) -> None:
    use(isa)
    for kernel in ((1, 1), (3, 3), (1, 3)):
        for batch in (1, 2):
            conv = BASE._replace(layout=layout, groups=groups, kernel=kernel, batch=batch)
            for activation in ("none", "relu"):
                conv = conv._replace(activation=activation)
                weight, values, index, bias = packed(conv, torch.float32)
                x = input_of(conv, torch.float32)
                actual = run(conv, x, weight, values, index, bias)
                wanted = dense(x, weight, bias, conv)
                assert actual.stride() == wanted.stride(), (actual.stride(), wanted.stride())


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit_of_conv_nm(isa: str) -> None:
    use(isa)
    before = torch.get_num_threads()
    try:
        for layout in ("contiguous", "channels_last"):
            conv = BASE._replace(channels=64, out=70, size=(12, 13), layout=layout, batch=3)
            weight, *tensors = packed(conv, torch.bfloat16)
            x, results = input_of(conv, torch.bfloat16), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(run(conv, x, weight, *tensors))
            assert torch.equal(*results), layout
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", cpu.available())
def test_a_corrupted_index_of_conv_nm_never_reads_elsewhere(isa: str) -> None:
    use(isa)
    for dtype in (*DTYPES, torch.float64):
        for pattern in ("2:4", "1:4", "3:5", "7:20", "33:64"):
            for layout in ("contiguous", "channels_last"):
                parsed = Pattern.parse(pattern)
                conv = BASE._replace(pattern=parsed, channels=parsed.m, groups=2, layout=layout)
                weight, values, index, bias = packed(conv, dtype)
                noise = torch.randint(-(2**31), 2**31, index.shape).int()
                out = run(conv, input_of(conv, dtype), weight, values, noise, bias)
                assert out.shape == (2, 12, 7, 6), out.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv_nm_under_autocast_equals_conv2d(dtype: torch.dtype) -> None:
    weight, values, index, bias = packed(BASE, torch.float32)
    x = input_of(BASE, torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        actual = run(BASE, x, weight, values, index, bias)
        wanted = dense(x, weight, bias, BASE)
    assert actual.dtype == wanted.dtype == dtype, actual.dtype
    torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)
    grad = torch.randn(actual.shape).to(dtype)
    (got,), (want,) = (torch.autograd.grad(out, x, grad) for out in (actual, wanted))
    assert got.dtype == want.dtype == torch.float32, got.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=5e-2)


# --- gradients -----------------------------------------------------------------------------------

VARIANTS = {
    "plain": BASE,
    "channels_last": BASE._replace(layout="channels_last"),
    "groups": BASE._replace(groups=2, stride=2, padding=(2, 1), dilation=(1, 2)),
    "same": BASE._replace(kernel=(4, 3), padding="same"),
    "valid": BASE._replace(kernel=(5, 2), padding="valid", stride=(1, 2)),
    "conv1d": BASE._replace(kernel=(3,), size=(9,), stride=2),
    "conv1d same": BASE._replace(kernel=(4,), size=(9,), padding="same"),
    "unbatched": BASE._replace(batch=0),
    "unbatched conv1d": BASE._replace(kernel=(3,), size=(9,), batch=0),
}
each_variant = pytest.mark.parametrize("conv", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_variant
def test_conv_nm_gradients_equal_those_of_a_dense_layer(conv: Conv, activation: str) -> None:
    conv = conv._replace(activation=activation)
    for dtype in (torch.float32, torch.float64):
        weight, values, index, bias = packed(conv, dtype)
        leaves = [input_of(conv, dtype).requires_grad_(), bias.requires_grad_()]
        actual = run(conv, leaves[0], weight, values, index, bias)
        wanted = ACTIVATIONS[activation](dense(leaves[0], weight, bias, conv))
        grad = torch.randn(actual.shape, dtype=dtype)
        gots, wants = (torch.autograd.grad(out, leaves, grad) for out in (actual, wanted))
        for got, want in zip(gots, wants, strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape), got
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_conv_nm_computes_only_the_gradients_that_are_asked_for() -> None:
    weight, values, index, bias = packed(BASE, torch.float32)
    x = input_of(BASE, torch.float32).requires_grad_()
    run(BASE, x, weight, values, index, bias).sum().backward()
    assert bias.grad is None
    assert x.grad is not None
    run(BASE, x.detach(), weight, values, index, bias.requires_grad_()).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 84.0)), bias.grad


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("name", ["plain", "groups", "conv1d"])
def test_conv_nm_passes_gradcheck_twice(name: str, activation: str) -> None:
    conv = VARIANTS[name]._replace(activation=activation, channels=4, out=2, batch=1)
    conv = conv._replace(size=(4,) * len(conv.size))
    weight, values, index, bias = packed(conv, torch.float64)
    x = input_of(conv, torch.float64).requires_grad_()

    def compute(x: Tensor, bias: Tensor) -> Tensor:
        return run(conv, x, weight, values, index, bias).tanh()

    leaves = (x, bias.requires_grad_())
    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(compute, leaves, fast_mode=True)


def test_conv_nm_saves_only_the_packed_weight() -> None:
    weight, values, index, bias = packed(BASE, torch.float32)
    x = input_of(BASE, torch.float32).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(BASE, x, weight, values, index, bias)
    assert {t.data_ptr() for t in saved} == {values.data_ptr(), index.data_ptr()}, saved


# --- compile -----------------------------------------------------------------------------------


def op_arguments(conv: Conv, dtype: torch.dtype, with_bias: bool) -> tuple[Any, ...]:
    weight, values, index, bias = packed(conv, dtype)
    x = input_of(conv, dtype).requires_grad_()
    bias = bias.requires_grad_() if with_bias else None
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in conv.settings[:3]]
    numbers = (conv.groups, conv.pattern.n, conv.pattern.m, conv.activation)
    return x, values, index, bias, len(weight), list(conv.kernel), *pairs, *numbers


@pytest.mark.parametrize(
    ("name", "dtype", "activation"),
    [
        ("plain", torch.float32, "none"),
        pytest.param("channels_last", torch.bfloat16, "gelu", marks=pytest.mark.deep),
        pytest.param("channels_last", torch.float32, "none", marks=pytest.mark.deep),
        pytest.param("groups", torch.float32, "silu", marks=pytest.mark.deep),
        pytest.param("groups", torch.float64, "none", marks=pytest.mark.deep),
        pytest.param("plain", torch.float16, "gelu_tanh", marks=pytest.mark.deep),
    ],
)
def test_conv_nm_passes_opcheck(name: str, dtype: torch.dtype, activation: str) -> None:
    conv = VARIANTS[name]._replace(activation=activation)
    for with_bias in (True, False):
        args = op_arguments(conv, dtype, with_bias)
        torch.library.opcheck(torch.ops.nmfx.conv_nm.default, args)


@each_variant
def test_conv_nm_compiled_equals_eager(conv: Conv) -> None:
    conv = conv._replace(activation="gelu")
    weight, values, index, bias = packed(conv, torch.float32)
    shape, bias = weight.shape, bias.requires_grad_()
    x = input_of(conv, torch.float32).requires_grad_()

    def compute(x: Tensor, bias: Tensor) -> Tensor:
        n, m = conv.pattern.n, conv.pattern.m
        return conv_nm(x, values, index, bias, *conv.settings, shape, n, m, conv.activation) * 2

    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    actual, wanted = compiled(x, bias), compute(x, bias)
    assert torch.equal(actual, wanted), (actual - wanted).abs().max()
    assert actual.stride() == wanted.stride(), actual.stride()
    gots, wants = (torch.autograd.grad(out.square().sum(), (x, bias)) for out in (actual, wanted))
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got, want)


# --- errors ------------------------------------------------------------------------------------


def refused(conv: Conv = BASE, x: Tensor | None = None, **changes: Any) -> str:
    """The message of the NMError that a call raises; `changes` replace packed tensors or shape."""
    weight, values, index, bias = packed(BASE, torch.float32)
    call: dict[str, Any] = {"values": values, "index": index, "bias": bias}
    call |= {"weight_shape": weight.shape, "n": 2, "m": 4, "activation": conv.activation}
    names = ("stride", "padding", "dilation", "groups")
    call |= dict(zip(names, conv.settings, strict=True)) | changes
    with pytest.raises(nmfx.NMError) as error:
        conv_nm(torch.randn(2, 8, 7, 6) if x is None else x, **call)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stride": 0}, "stride=(0, 0) is not two numbers of at least 1"),
        ({"stride": (1, 2, 3)}, "stride=(1, 2, 3) is not two numbers of at least 1"),
        ({"dilation": (1, 0)}, "dilation=(1, 0) is not two numbers of at least 1"),
        ({"padding": -1}, "padding=(-1, -1) is not two numbers of at least 0"),
        ({"padding": (1, 2, 3)}, "padding=(1, 2, 3) is not two numbers of at least 0"),
        ({"padding": "full"}, "padding='full' is neither 'same' nor 'valid'"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1, got (2, 2)"),
        ({"groups": 3}, "8 and 6 channels do not divide by groups=3"),
        ({"groups": 0}, "8 and 6 channels do not divide by groups=0"),
        ({"activation": "tanh"}, "activation='tanh' is none of none, relu, gelu, gelu_tanh, silu"),
        (
            {"dilation": 4},
            "an input of (7, 6) padded by (1, 1) is smaller than a kernel of (3, 3) dilated by "
            "(4, 4)",
        ),
        ({"n": 5}, "pattern 5:4 breaks 1 <= N <= M <= 64"),
        ({"m": 7}, "72 columns are not a multiple of 7, as 2:7 (keep 2 of every 7) needs"),
        (
            {"groups": 2},
            "packed tensors of shapes (1, 36, 16) and (1, 3, 16) (torch.int32) do not fit a "
            "(6, 36) weight with 2:4 (keep 2 of every 4), which needs (2, 18, 16) and (2, 2, 16) "
            "(torch.int32)",
        ),
        (
            {"index": torch.zeros(1, 3, 16)},
            "packed tensors of shapes (1, 36, 16) and (1, 3, 16) (torch.float32) do not fit a "
            "(6, 72) weight with 2:4 (keep 2 of every 4), which needs (1, 36, 16) and (1, 3, 16) "
            "(torch.int32)",
        ),
        ({"bias": torch.zeros(5)}, "bias of shape (5,) does not fit 6 outputs"),
        (
            {"bias": torch.zeros(6).double()},
            "input is torch.float32, the packed weight torch.float32, the bias torch.float64: "
            "move the whole model with .to(dtype), or run under torch.autocast",
        ),
        (
            {"values": torch.zeros(1, 16, 36).transpose(1, 2)},
            "packed tensors are contiguous; call .contiguous() on them",
        ),
        (
            {"values": torch.zeros(1, 36, 16, requires_grad=True)},
            "a packed weight has no gradient: train the sparsified model and lower it again, or "
            "freeze it with values.requires_grad_(False)",
        ),
        (
            {"weight_shape": (6, 8, 3, 3, 3)},
            "conv_nm takes conv1d and conv2d weights, got shape (6, 8, 3, 3, 3)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_conv_nm_refuses_what_does_not_fit(changes: dict[str, Any], text: str) -> None:
    assert text in refused(**changes)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((8, 7), "input of shape (8, 7) does not fit a weight of shape (6, 8, 3, 3)"),
        ((1, 2, 8, 7, 6), "input of shape (1, 2, 8, 7, 6) does not fit a weight of shape"),
        ((2, 4, 7, 6), "do not fit a (6, 36) weight with 2:4"),
        ((2, 9, 7, 6), "81 columns are not a multiple of 4"),
        ((2, 8, 0, 6), "an input of (0, 6) padded by (1, 1) is smaller than a kernel of (3, 3)"),
    ],
)
def test_conv_nm_refuses_inputs_of_another_shape(shape: tuple[int, ...], text: str) -> None:
    assert text in refused(x=torch.randn(shape))


def test_conv_nm_refuses_inputs_of_another_dtype() -> None:
    advice = "move the whole model with .to(dtype), or run under torch.autocast"
    kinds = "the packed weight torch.float32, the bias torch.float32"
    for dtype in (torch.float64, torch.float16, torch.int32):
        text = refused(x=torch.ones(2, 8, 7, 6, dtype=dtype))
        assert text == f"input is {dtype}, {kinds}: {advice}"


def test_conv_nm_refuses_a_dilation_of_another_length_with_same_padding() -> None:
    text = refused(padding="same", dilation=(1, 1, 1))
    assert text == "dilation=(1, 1, 1) is not two numbers of at least 1"


def test_conv_nm_of_meta_tensors_as_conv2d() -> None:
    weight, *tensors = packed(BASE, torch.float32)
    out = run(
        BASE, torch.empty(2, 8, 7, 6, device="meta"), weight, *(t.to("meta") for t in tensors)
    )
    assert out.shape == (2, 6, 7, 6), out.shape


def test_conv_nm_takes_a_bias_of_any_strides() -> None:
    weight, values, index, _ = packed(BASE, torch.float32)
    x = input_of(BASE, torch.float32)
    for bias in (torch.randn(12)[::2], torch.randn(1).expand(6)):
        actual = run(BASE, x, weight, values, index, bias)
        torch.testing.assert_close(actual, dense(x, weight, bias, BASE), rtol=1e-4, atol=1e-4)
