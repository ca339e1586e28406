"""Lowered models: compile, export, AOTInductor, state_dict, other dtypes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from strategies import DTYPES
from torch import Tensor, nn

import nmfx
from nmfx.mask import nm_project

# torch's own, when Inductor is imported and when a program is saved.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def dense(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8, bias=False)).to(dtype)


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """(folded, lowered)"""
    model = nmfx.sparsify(dense(dtype), {"0": "2:4", "2": "1:8"})
    return nmfx.fold(model), nmfx.lower(model, tune=False)


# The native kernels sum in another order than torch: compared by norms, within the dtype.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


def assert_near(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= BOUNDS[want.dtype], f"relative norm of the difference: {error:.1e}"


def nodes(graph: torch.fx.Graph) -> int:
    ops = (torch.ops.nmfx.linear_nm, torch.ops.nmfx.linear_nm.default)
    return sum(node.target in ops for node in graph.nodes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowered_from_any_dtype_equals_folded(dtype: torch.dtype) -> None:
    folded, lowered = pair(dtype)
    for shape in ((16,), (5, 16), (2, 3, 16)):
        x = torch.randn(shape).to(dtype)
        assert_near(lowered(x), folded(x))
    assert lowered[0].weight_values.dtype == dtype
    assert lowered[0].weight_index.dtype == torch.int32


def test_lowered_input_gradient_equals_folded() -> None:
    folded, lowered = pair()
    x = torch.randn(5, 16, requires_grad=True)
    (got,), (want,) = (torch.autograd.grad(m(x).sum(), x) for m in (lowered, folded))
    torch.testing.assert_close(got, want)


def test_lowered_bias_can_still_be_trained() -> None:
    folded, lowered = pair()
    x = torch.randn(5, 16)
    (got,), (want,) = (torch.autograd.grad(m(x).sum(), m[0].bias) for m in (lowered, folded))
    torch.testing.assert_close(got, want)
    assert [name for name, _ in lowered.named_parameters()] == ["0.bias"]


def test_lowered_compiles_with_fullgraph() -> None:
    folded, lowered = pair()
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(nodes(gm.graph))
        return gm.forward

    x = torch.randn(5, 16, requires_grad=True)
    torch.compile(lowered, backend=backend, fullgraph=True)(x)
    assert graphs == [2], graphs
    torch.compiler.reset()
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    assert_near(compiled(x), folded(x))
    (got,), (want,) = (torch.autograd.grad(m(x).sum(), x) for m in (compiled, folded))
    torch.testing.assert_close(got, want)


def test_lowered_compiles_with_inductor_and_dynamic_shapes() -> None:
    folded, lowered = pair()
    compiled = torch.compile(lowered, fullgraph=True, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(compiled(x), folded(x))


def test_lowered_exports_one_node_per_weight_and_runs() -> None:
    folded, lowered = pair()
    x = torch.randn(5, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(lowered, (x,), dynamic_shapes=({0: batch},))
    assert nodes(program.graph) == 2, program.graph
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (1, 5, 9):
        x = torch.randn(rows, 16)
        assert_near(program.module()(x), folded(x))
        assert torch.equal(loaded(x), program.module()(x))


@pytest.mark.deep
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lowered_runs_from_an_aotinductor_package(tmp_path: Path) -> None:
    folded, lowered = pair()
    x = torch.randn(5, 16)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(lowered, (x,), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        for rows in (2, 5):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(package(x), folded(x))


def test_lowered_state_dict_holds_plain_tensors_and_round_trips() -> None:
    folded, lowered = pair()
    state = lowered.state_dict()
    assert list(state) == [
        "0.bias",
        "0.weight_values",
        "0.weight_index",
        "2.weight_values",
        "2.weight_index",
    ]
    # What safetensors asks for: plain dense tensors that own their memory, and strings as keys.
    for name, tensor in state.items():
        assert type(tensor) is Tensor, f"{name} is a {type(tensor)}"
        assert tensor.layout == torch.strided, tensor.layout
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    addresses = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert len(addresses) == len(state), "two entries share memory"

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    torch.manual_seed(7)
    other = nmfx.lower(nmfx.sparsify(nn.Sequential(*dense()), {"0": "2:4", "2": "1:8"}), tune=False)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(loaded)
    x = torch.randn(5, 16)
    assert torch.equal(other(x), lowered(x))
    assert_near(other(x), folded(x))
    assert other(x).any()


def test_lowered_state_dict_does_not_load_into_another_pattern() -> None:
    _, lowered = pair()
    other = nmfx.lower(nmfx.sparsify(dense(), {"0": "1:4", "2": "1:8"}), tune=False)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight_values"):
        other.load_state_dict(lowered.state_dict())


def test_lowered_to_bfloat16_is_the_folded_model_to_bfloat16() -> None:
    folded, lowered = pair()
    folded.to(torch.bfloat16)
    lowered.to(torch.bfloat16)
    x = torch.randn(5, 16).to(torch.bfloat16)
    assert_near(lowered(x), folded(x))
    # Rounding the values keeps the pattern, so the dense weight is the rounded one.
    assert torch.equal(lowered[0].weight, folded[0].weight)


def test_lowered_half_with_a_float_input_is_a_clear_error() -> None:
    _, lowered = pair()
    lowered.half()
    with pytest.raises(nmfx.NMError) as error:
        lowered(torch.randn(5, 16))
    assert str(error.value) == (
        "input is torch.float32, the packed weight torch.float16, the bias torch.float16: "
        "move the whole model with .to(dtype), or run under torch.autocast"
    )
    lowered.float()
    assert lowered(torch.randn(5, 16)).dtype == torch.float32


def test_lowered_under_autocast_equals_folded() -> None:
    folded, lowered = pair()
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, wanted = lowered(x), folded(x)
    assert actual.dtype == wanted.dtype == torch.bfloat16, actual.dtype
    assert_near(actual, wanted)


def test_lowered_reads_back_as_the_folded_weight() -> None:
    folded, lowered = pair()
    assert torch.equal(lowered[2].weight, folded[2].weight)
    assert torch.equal(folded[2].weight, nm_project(folded[2].weight, "1:8", 1))
