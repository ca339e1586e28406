"""sr_ste under Dynamo, export and Inductor: one node, fused, no recompile, nothing saved."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import raw_bits
from saved_tensors import saved_bytes
from strategies import from_bits, special_bits
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache, run_and_get_code

import nmfx
from nmfx.capture.refs import iter_sites
from nmfx.capture.site import control_name
from nmfx.mask import nm_project
from nmfx.ops import compiled as compiled_ops
from nmfx.ops.compiled import UNFUSED_REASON
from nmfx.ops.sr_ste import make_control, sr_ste

# torch's own, when Inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def mlp(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def convnet() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(16, 4, 2))
    return model.to(memory_format=torch.channels_last)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


# name -> (how to build it, the shape of an input, rules that cover every weight)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "mlp": (mlp, (5, 16), {"[02]": "2:4"}),
    "convnet": (convnet, (2, 8, 6, 6), "2:4"),
    "attention": (Attention, (2, 5, 16), "2:4"),
}


def build(name: str, lambda_w: float | None = 2.0**-4) -> tuple[nn.Module, Tensor]:
    """A model of two weights (dense if `lambda_w` is None) and its input."""
    make, shape, rules = MODELS[name]
    model = make()
    if lambda_w is not None:
        nmfx.sparsify(model, rules, lambda_w=lambda_w)
        assert len(list(iter_sites(model))) == 2, nmfx.report(model)
    return model, torch.randn(shape)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_same(actual: list[Tensor], wanted: list[Tensor], exactly: bool = False) -> None:
    tolerance: dict[str, float] = {"rtol": 0.0, "atol": 0.0} if exactly else {}
    for got, want in zip(actual, wanted, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def controls(model: nn.Module) -> tuple[Tensor, ...]:
    return tuple(ref.store.__dict__[control_name(ref.index)] for ref in iter_sites(model))


def sr_ste_nodes(graph: fx.Graph) -> int:
    ops = (torch.ops.nmfx.sr_ste, torch.ops.nmfx.sr_ste.default)
    return sum(node.target in ops for node in graph.nodes)


def inductor_code(run: Callable[[], Any]) -> str:
    """The code Inductor generates while `run` runs; at least a forward and a backward."""
    codes = run_and_get_code(run)[1]
    assert len(codes) >= 2, f"{len(codes)} graphs"
    return "\n".join(codes)


def test_this_torch_has_what_fusion_needs() -> None:
    assert UNFUSED_REASON is None, UNFUSED_REASON


@pytest.mark.parametrize("name", MODELS)
def test_dynamo_sees_one_node_per_weight(name: str) -> None:
    model, x = build(name)
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable:
        graphs.append(gm.graph)
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(x)
    assert [sr_ste_nodes(graph) for graph in graphs] == [2], graphs


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:No complete tensor found")  # channels_last, when dense too
@pytest.mark.parametrize("name", MODELS)
def test_export_sees_one_node_per_weight_and_runs(name: str) -> None:
    model, x = build(name)
    wanted = model(x)
    program = torch.export.export(model, (x,))
    assert sr_ste_nodes(program.graph) == 2, program.graph
    assert torch.equal(program.module()(x), wanted)
    lowered = program.run_decompositions()
    assert sr_ste_nodes(lowered.graph) == 2, lowered.graph
    torch.testing.assert_close(lowered.module()(x), wanted)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), wanted)


@pytest.fixture(params=["native", "formula"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What compiled code does for a mask: call the native kernels, or compute the formula."""
    if request.param == "formula":
        monkeypatch.setattr(compiled_ops, "_outruns_inductor", lambda weight, m: False)
    with fresh_cache():  # the cache on disk knows graphs by what they were before the choice
        yield request.param


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(n, marks=pytest.mark.deep) for n in ("convnet", "attention"))]
)
def test_inductor_computes_the_mask_again_and_saves_nothing_more(name: str, kernels: str) -> None:
    (plain, x), (model, _) = build(name, None), build(name)
    wanted = [model(x), *gradients(model, model(x).square().sum())]
    compiled = torch.compile(model, fullgraph=True)
    actual: list[Tensor] = []

    def run() -> None:
        out = compiled(x)
        actual.extend([out, *gradients(model, out.square().sum())])

    code = inductor_code(run)
    calls = re.findall(r"torch\.ops\.nmfx\.(\w+)\.default\(", code)
    if kernels == "formula":
        assert calls == [], code
    else:
        # Backward needs the masked weight of all layers but the first, whose input has no gradient,
        # though torch asks for the weight of a convolution even so.
        again = 2 if name == "convnet" else 1
        expected = ["sr_ste_gradient"] * 2 + ["sr_ste_project"] * (2 + again)
        assert sorted(calls) == expected, code
    assert_same(actual, wanted)

    kept = controls(model)
    assert {control.nbytes for control in kept} == {16}, kept
    # The 16-byte [lambda, N] of every layer is all that a compiled model keeps on top.
    dense_bytes = saved_bytes(plain, x, run=torch.compile(plain, fullgraph=True))
    sparse_bytes = saved_bytes(model, x, run=compiled, ignore=kept)
    assert sparse_bytes == dense_bytes, f"{sparse_bytes} bytes saved, {dense_bytes} when dense"
    held = torch.randn(1024, requires_grad=True)
    assert saved_bytes(model, x, run=lambda x: model(x).sum() + held.exp().sum()) > sparse_bytes


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_inductor_compiles_convolutions_that_it_lays_out_anew(bias: bool, kernels: str) -> None:
    torch.manual_seed(1)
    layers = [nn.Conv2d(16, 16, 3, bias=bias), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1, bias=bias)]
    model, x = nmfx.sparsify(nn.Sequential(*layers), {"[02]": "2:4"}), torch.randn(2, 16, 8, 8)
    wanted = gradients(model, model(x).square().sum())
    compiled = torch.compile(model, fullgraph=True)
    for got, want in zip(gradients(model, compiled(x).square().sum()), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_gradient_that_is_part_of_a_larger_one(kernels: str) -> None:
    # An op that wrote into such a gradient was handed the wrong part of it, silently.
    torch.manual_seed(1)
    control, grad = make_control(5.0, 2), torch.randn(32, 16)
    pair = [torch.randn(16, 16, requires_grad=True) for _ in range(2)]

    def fused(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([sr_ste(a, control, 4, 1), sr_ste(b, control, 4, 1)])

    wanted = torch.autograd.grad(fused(*pair), pair, grad)
    compiled = torch.compile(fused, fullgraph=True)
    assert_same(list(torch.autograd.grad(compiled(*pair), pair, grad)), list(wanted))


def layouts_of_weights() -> dict[str, tuple[Tensor, int]]:
    conv = torch.randn(16, 32, 3, 3)
    return {
        "linear": (torch.randn(48, 64), 1),
        "transposed": (torch.randn(64, 48).t(), 1),
        "conv": (conv, 1),
        "channels_last": (conv.to(memory_format=torch.channels_last), 1),
    }


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:16"])
@pytest.mark.parametrize("layout", layouts_of_weights())
def test_the_formula_is_one_loop_forward_and_one_backward(
    layout: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_ops, "_outruns_inductor", lambda weight, m: False)
    (weight, dim), parsed = layouts_of_weights()[layout], nmfx.Pattern.parse(pattern)
    weight = weight.detach().requires_grad_()
    control, grad = make_control(0.25, parsed.n), torch.randn(weight.shape)
    compiled = torch.compile(sr_ste, fullgraph=True)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(compiled(weight, control, parsed.m, dim), weight, grad)

    with fresh_cache():
        (actual,), codes = run_and_get_code(run)
    loops = [code.count("async_compile.cpp_pybinding") for code in codes]
    assert loops == [1, 1], "\n".join(codes)
    assert torch.equal(
        actual, *torch.autograd.grad(sr_ste(weight, control, parsed.m, dim), weight, grad)
    )


def test_inductor_code_of_an_opaque_op_would_be_noticed() -> None:
    model = nmfx.lower(build("mlp")[0], tune=False)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(5, 16, requires_grad=True)
    assert "torch.ops.nmfx" in inductor_code(lambda: compiled(x).sum().backward())


@pytest.mark.parametrize("name", MODELS)
def test_aot_autograd_saves_nothing_more(name: str) -> None:
    (plain, x), (model, _) = build(name, None), build(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    dense_compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    dense_bytes = saved_bytes(plain, x, run=dense_compiled)
    sparse_bytes = saved_bytes(model, x, run=compiled, ignore=controls(model))
    assert sparse_bytes == dense_bytes, f"{sparse_bytes} bytes saved, {dense_bytes} when dense"
    out = compiled(x)
    assert_same(gradients(model, out.sum()), gradients(model, model(x).sum()))


def awkward(dtype: torch.dtype) -> Tensor:
    positive = list(special_bits(dtype).values())
    sign = 1 << (8 * dtype.itemsize - 1)
    pool = positive + [bits | sign for bits in positive]
    picks = torch.randint(len(pool), (8 * 32,)).tolist()
    return from_bits([pool[i] for i in picks], dtype).view(8, 32)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float64, marks=pytest.mark.deep),
        pytest.param(torch.float16, marks=pytest.mark.deep),
    ],
    ids=str,
)
def test_inductor_equals_eager_bit_for_bit(dtype: torch.dtype, kernels: str) -> None:
    weight, grad = awkward(dtype), torch.randn(8, 32).to(dtype)
    compiled = torch.compile(sr_ste, fullgraph=True)
    for n, lambda_w in ((2, 0.0), (1, 2.0**-4), (3, 2e-4)):
        control = make_control(lambda_w, n)
        out = compiled(weight, control, 4, 1)
        wanted = nm_project(weight, (n, 4), 1)
        if dtype.itemsize == 2:
            # Inductor computes half precision in float32, where a NaN loses its payload.
            assert torch.equal(out.isnan(), wanted.isnan()), f"{n}: {weight}\n{out}"
            out, wanted = out.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)
        assert raw_bits(out) == raw_bits(wanted), f"{n}: {weight}\n{out}"
        finite = weight.nan_to_num().requires_grad_()
        (actual,) = torch.autograd.grad(compiled(finite, control, 4, 1), finite, grad)
        (wanted,) = torch.autograd.grad(sr_ste(finite, control, 4, 1), finite, grad)
        assert torch.equal(actual, wanted), f"{actual - wanted}"


def test_one_compile_serves_every_lambda_and_n() -> None:
    model, x = build("mlp")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: nmfx.set_lambda(model, 0.5),
        lambda: nmfx.set_pattern(model, "1:4"),
        lambda: nmfx.set_pattern(model, {"0": "3:4"}),
        lambda: nmfx.set_pattern(model, "4:4"),
        lambda: nmfx.set_lambda(model, 0.0),
        lambda: nmfx.attach(model, optimizer),
        optimizer.step,
        lambda: model.load_state_dict(mlp(seed=2).state_dict()),
    ]
    seen = []
    for change in changes:
        change()
        out, wanted = compiled(x), model(x)
        torch.testing.assert_close(out, wanted)
        assert_same(gradients(model, out.sum()), gradients(model, wanted.sum()))
        seen.append(wanted)
        model(x).sum().backward()
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times"
    assert not torch.equal(seen[1], seen[2]), "set_pattern did nothing"
    assert not torch.equal(seen[2], seen[3]), "set_pattern by glob did nothing"


def test_another_m_is_another_graph() -> None:
    model, x = build("mlp")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for pattern, frames in (("2:4", 1), ("2:8", 2), ("3:8", 2), ("1:4", 2)):
        nmfx.set_pattern(model, pattern)
        torch.testing.assert_close(compiled(x), model(x))
        assert counter.frame_count == frames, f"{pattern}: compiled {counter.frame_count} times"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_backward_uses_the_schedule_of_its_forward(backend: str) -> None:
    model, x = build("mlp")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    wanted = gradients(model, model(x).sum())
    assert_same(gradients(model, compiled(x).sum()), wanted)
    out = compiled(x)
    nmfx.set_lambda(model, 0.5)
    assert_same(gradients(model, out.sum()), wanted)
    after = gradients(model, model(x).sum())
    assert not torch.equal(after[0], wanted[0]), "set_lambda did nothing"

    out = compiled(x)
    nmfx.set_pattern(model, "1:4")
    assert_same(gradients(model, out.sum()), after)
    assert not torch.equal(gradients(model, model(x).sum())[0], after[0]), "set_pattern did nothing"


def test_compiled_two_forwards_before_one_backward_add_up() -> None:
    model, x = build("mlp", lambda_w=0.25)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (compiled(x).sum() + compiled(2 * x).sum()).backward()
    actual = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    (model(x).sum() + model(2 * x).sum()).backward()
    assert_same(actual, [parameter.grad for parameter in model.parameters()])


def test_compiled_frozen_layers_equal_eager() -> None:
    model, x = build("mlp")
    nmfx.freeze(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, model(x))
    assert_same(gradients(model, out.sum()), gradients(model, model(x).sum()))
    nmfx.unfreeze(model)
    assert_same(gradients(model, compiled(x).sum()), gradients(model, model(x).sum()))


def test_compile_dynamic_serves_every_batch_size() -> None:
    model, _ = build("mlp")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 16)
        out = compiled(x)
        torch.testing.assert_close(out, model(x))
        assert_same(gradients(model, out.sum()), gradients(model, model(x).sum()))
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times"


def test_compiled_checkpointing_changes_nothing() -> None:
    model, x = build("mlp")
    wanted = gradients(model, model(x).square().sum())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    assert_same(gradients(model, run(x).square().sum()), wanted)


def test_compiled_autocast_equals_eager() -> None:
    model, x = build("mlp")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wanted = compiled(x), model(x)
    assert out.dtype == torch.bfloat16, out.dtype
    assert_same([out, *gradients(model, out.sum())], [wanted, *gradients(model, wanted.sum())])
