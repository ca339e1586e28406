"""torch.compile of every sparsified model: as few graphs as the dense one, and equal results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import ZOO, build, call, outputs, probe_loss

import nmfx

# One of each capture and kind of layer; small, for Inductor compiles C++ for every kernel.
INDUCTOR_FAST = ("self_attention", "twice", "functional_graph")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    # torch's own: in frames between graph breaks, and when Inductor is imported.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No compiled code from, or for, another test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def sparse(name: str) -> tuple[nn.Module, Any]:
    model, inputs = build(name)
    return nmfx.sparsify(model, "2:4", lambda_w=2.0**-6), inputs


def breaks(model: nn.Module, inputs: Any) -> int:
    """How many graph breaks Dynamo counts in one call."""
    torch.compiler.reset()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    count = torch._dynamo.explain(model)(*args, **kwargs).graph_break_count
    torch.compiler.reset()
    return max(0, count)  # graphs - 1, so -1 when Dynamo found nothing to compile


def step(run: Callable[..., Any], model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Outputs and gradients of one forward and backward, by name."""
    model.zero_grad()
    result = call(run, inputs)
    probe_loss(result).backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs(result))}
    for fqn, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {fqn}"] = parameter.grad
    return found


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float) -> None:
    assert got.keys() == wanted.keys()
    for key, want in wanted.items():
        slack = rtol if want.dtype == torch.float32 else 2e-2  # bfloat16 has 8 bits
        atol = slack * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(
            got[key], want, rtol=slack, atol=atol, msg=lambda text, at=key: f"{at}: {text}"
        )


def assert_compiled_equals_eager(name: str, backend: str, rtol: float) -> None:
    """In one graph, or, where that fails for the dense model too, in no more pieces than it."""
    model, inputs = sparse(name)
    wanted = step(model, model, inputs)
    try:
        got = step(torch.compile(model, backend=backend, fullgraph=True), model, inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        dense, _ = build(name)
        torch.compiler.reset()
        whole = torch.compile(dense, backend=backend, fullgraph=True)
        with pytest.raises(type(error)):  # else only the sparsified model fails
            step(whole, dense, inputs)
        assert breaks(model, inputs) <= breaks(dense, inputs)
        got = step(torch.compile(model, backend=backend), model, inputs)
    assert_close(got, wanted, rtol)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_compiled_equals_eager(name: str) -> None:
    assert_compiled_equals_eager(name, "aot_eager", rtol=1e-5)


@pytest.mark.parametrize("name", INDUCTOR_FAST)
def test_zoo_inductor_equals_eager(name: str) -> None:
    assert_compiled_equals_eager(name, "inductor", rtol=1e-4)


@pytest.mark.deep
@pytest.mark.parametrize("name", [name for name in ZOO if name not in INDUCTOR_FAST])
def test_zoo_inductor_equals_eager_everywhere(name: str) -> None:
    assert_compiled_equals_eager(name, "inductor", rtol=1e-4)


@pytest.mark.parametrize("name", ["hf_llama", "unet", "cross_attention", "functional_graph"])
def test_zoo_schedule_recompiles_nothing(name: str) -> None:
    model, inputs = sparse(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = []
    for lambda_w, pattern in ((0.0, "2:4"), (2.0**-6, "2:4"), (2.0**-3, "1:4"), (0.5, "3:4")):
        nmfx.set_lambda(model, lambda_w)
        nmfx.set_pattern(model, pattern)
        seen.append(step(compiled, model, inputs))
        assert_close(seen[-1], step(model, model, inputs), rtol=1e-5)
    assert counter.frame_count == 1, f"{counter.frame_count} compilations"
    # The control: every change of the schedule did reach the compiled code.
    for before, after in itertools.pairwise(seen):
        assert any(not torch.equal(before[key], after[key]) for key in before)
