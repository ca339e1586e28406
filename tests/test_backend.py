"""torch.compile(backend=nmfx.backend): packed where it pays, right when weights change."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import DENSE_WINS, PACKED_WINS, install
from torch import Tensor, fx, nn
from zoo import build, call, outputs

import nmfx
from nmfx.capture import program
from nmfx.mask import nm_project
from nmfx.ops.conv_nm import conv_nm
from nmfx.ops.linear_nm import linear_nm

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

X = torch.linspace(-2, 2, 2 * 8 * 4 * 4).reshape(2, 8, 4, 4).sin()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16, 24)
        self.back = nn.Parameter(torch.randn(24, 16))
        self.bias = nn.Parameter(torch.randn(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x)).permute(0, 2, 3, 1)
        h = F.gelu(self.fc(h), approximate="tanh").flatten(0, 2)
        return self.head(torch.addmm(self.bias, h, self.back))


DIMS = {"conv.weight": 1, "fc.weight": 1, "back": 0}


def pruned(pattern: str = "2:4") -> Net:
    """A plain model that somebody else pruned."""
    model = Net().eval()
    with torch.no_grad():
        for name, dim in DIMS.items():
            weight = model.get_parameter(name)
            weight.copy_(nm_project(weight, pattern, dim))
    return model


class Inner:
    """An inner backend that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        assert len(inputs) == len(gm.graph.find_nodes(op="placeholder"))
        gm.graph.lint()
        self.graphs.append(gm)
        return gm.forward

    def packed(self) -> list[Any]:
        return [n for gm in self.graphs for n in gm.graph.nodes if n.target in (linear_nm, conv_nm)]


def compiled(model: nn.Module, inner: Any = "eager", **options: Any) -> Any:
    given = {"inner": inner, "tune": False, **options}
    return torch.compile(model, backend=nmfx.backend, options=given, fullgraph=True)


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.fqn.removeprefix("_orig_mod."): row.reason for row in nmfx.report(model)}


def assert_equal(fast: Any, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        for x in inputs or (X,):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


NONE = "its weight satisfies no N:M pattern that would make it smaller"


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_what_is_nm_is_packed_and_computes_the_same(inner: str, dynamic: bool | None) -> None:
    model = pruned()
    state = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    options = {"inner": inner, "tune": False}
    fast = torch.compile(
        model, backend=nmfx.backend, options=options, dynamic=dynamic, fullgraph=True
    )
    assert_equal(fast, model, X, X[:1], torch.cat([X, X, X]))
    assert reasons(fast) == reasons(model)
    assert reasons(model)["conv.weight"] == "compiled: packed"
    assert reasons(model)["fc.weight"] == "compiled: packed"
    assert reasons(model)["head.weight"] == f"compiled: dense: {NONE}"
    for name, parameter in model.named_parameters():
        assert id(parameter) == state[name][0]
        assert torch.equal(parameter, state[name][1])


def test_the_graph_holds_packed_layers_with_their_activations() -> None:
    model, inner = pruned(), Inner()
    assert_equal(compiled(model, inner), model)
    assert [node.kwargs.get("activation") for node in inner.packed()] == ["relu", "gelu_tanh", None]
    (gm,) = inner.graphs
    assert not any(word in gm.code for word in ("relu(", "conv2d(", "gelu(", "addmm("))
    inputs = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    assert not any("conv_parameters_weight" in name for name in inputs), inputs
    assert any("head_parameters_weight" in name for name in inputs), inputs


@pytest.mark.parametrize(
    ("ms", "count", "text"),
    [
        (PACKED_WINS, 3, "packed: packed 3.00x as fast as dense"),
        (DENSE_WINS, 0, "dense: packed 0.33x as fast as dense"),
    ],
    ids=["packed", "dense"],
)
def test_what_is_slower_packed_stays_dense(
    ms: dict[str, float], count: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = install(monkeypatch, ms)
    model, inner = pruned(), Inner()
    assert_equal(compiled(model, inner, tune=True), model)
    assert len(inner.packed()) == count
    assert reasons(model)["fc.weight"] == f"compiled: {text}"
    assert [rows for _, rows in timer.asked] == [2 * 8 * 4, 32, 32], "not timed on what it meets"
    assert all(asked == {"dense", "packed"} for asked, _ in timer.asked)


def test_measured_for_real_it_computes_the_same() -> None:
    model = pruned("1:8")
    fast = compiled(model, tune=True)
    assert_equal(fast, model)
    found = reasons(model)
    assert "as fast as dense" in found["conv.weight"], found
    assert "as fast as dense" in found["fc.weight"], found


@pytest.mark.parametrize(
    "name",
    [
        "hf_bert",
        "conv_family",
        "encoder",
        *(pytest.param(one, marks=pytest.mark.deep) for one in ("hf_llama", "hf_gpt2", "resnet50")),
    ],
)
def test_models_of_the_zoo_compute_the_same(name: str) -> None:
    model, inputs = build(name)
    model, inner = nmfx.fold(nmfx.sparsify(model, "2:4")), Inner()
    fast = torch.compile(model, backend=nmfx.backend, options={"inner": inner, "tune": False})
    with torch.no_grad():
        for got, want in zip(
            outputs(call(fast, inputs)), outputs(call(model, inputs)), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    found = reasons(model).values()
    assert sum(reason == "compiled: packed" for reason in found) == len(inner.packed())
    if name == "encoder":  # one operator that computes it all
        fused = "compiled: dense: the graph reads its weight in _transformer_encoder_layer_fwd"
        assert fused in found
    else:
        assert inner.packed()
    assert all(reason.startswith("compiled: ") for reason in found), found


class Nonzero(nn.Module):
    """A size that only running tells."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[x[:, 0] > 0])


def test_sizes_that_only_running_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = install(monkeypatch, PACKED_WINS)
    model, inner = Nonzero().eval(), Inner()
    with torch.no_grad():
        model.fc.weight.copy_(nm_project(model.fc.weight, "2:4"))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = compiled(model, inner, tune=True)
        assert_equal(fast, model, torch.randn(9, 16), torch.randn(5, 16))
    assert len(inner.packed()) == len(inner.graphs)
    asked = [rows for _, rows in timer.asked]
    assert asked == [1, 8, 128] * len(inner.graphs), "assumed, as by lower(model)"


# --- weights that change -------------------------------------------------------------------------


def test_weights_that_change_are_packed_again() -> None:
    model, inner = pruned(), Inner()
    fast = compiled(model, inner)
    assert_equal(fast, model)
    weight = model.fc.weight
    with torch.no_grad():
        weight.mul_(2)
    assert_equal(fast, model)
    assert reasons(model)["fc.weight"] == (
        "compiled: packed; packed again, as its weight was changed (times: 1)"
    )
    assert reasons(model)["conv.weight"] == "compiled: packed"
    weight.data = weight.data * 2
    assert_equal(fast, model)
    weight.data = weight.data * 2
    weight.data = weight.data * 2  # may get the memory that the last call saw
    assert_equal(fast, model)
    model.load_state_dict(pruned().state_dict())
    assert_equal(fast, model)
    with torch.inference_mode():
        weight.neg_()
    assert_equal(fast, model)
    model.fc.weight = nn.Parameter(nm_project(torch.randn(24, 16), "2:4"))
    assert_equal(fast, model)
    assert len(inner.packed()) == 3 * len(inner.graphs)


def test_threads_wait_until_a_changed_weight_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned()
    fast = compiled(model, Inner())
    assert_equal(fast, model)
    started, pack = threading.Event(), program.pack_weight

    def slowly(*args: Any) -> Any:
        started.set()
        time.sleep(0.3)
        return pack(*args)

    monkeypatch.setattr(program, "pack_weight", slowly)
    with torch.no_grad():
        model.fc.weight.mul_(3)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(assert_equal, fast, model)
        started.wait(60)
        second = pool.submit(assert_equal, fast, model)
        first.result()
        second.result()


def test_weights_that_lose_their_pattern_run_dense_until_they_have_it_again() -> None:
    model = pruned()
    fast = compiled(model)
    assert_equal(fast, model)
    sparse = model.back.detach().clone()
    with torch.no_grad():
        model.back.add_(1.0)
    for _ in range(2):
        assert_equal(fast, model)
    with torch.no_grad():
        model.back.mul_(-1.0)
    assert_equal(fast, model)
    gm = fx.symbolic_trace(model)  # only a graph shows that `back` is a weight
    assert reasons(gm)["back"] == (
        "compiled: packed; its weight was changed and is no longer 2:4: its graph runs dense"
    )
    with torch.no_grad():
        model.back.copy_(sparse)
    assert_equal(fast, model)
    assert "times: 1" in reasons(gm)["back"]


@pytest.mark.parametrize("version", [0, 3])
def test_another_parameter_on_the_same_memory_is_told_apart(version: int) -> None:
    model = pruned()
    fast = compiled(model)
    assert_equal(fast, model)
    other = nn.Parameter(model.fc.weight.data)
    with torch.no_grad():
        for _ in range(model.fc.weight._version):
            other.mul_(1.5)
    assert other._version == model.fc.weight._version
    assert other.data_ptr() == model.fc.weight.data_ptr()
    model.fc.weight = other
    assert_equal(fast, model)


def test_two_models_of_one_class_do_not_share_weights() -> None:
    one, two = pruned(), pruned("1:4")
    fast = [compiled(model) for model in (one, two)]
    for _ in range(2):
        assert_equal(fast[0], one)
        assert_equal(fast[1], two)


# --- what it leaves alone ------------------------------------------------------------------------


def test_with_gradients_the_inner_backend_gets_the_graph_as_it_is() -> None:
    model, inner = pruned(), Inner()
    fast = compiled(model, inner)
    x = X.clone().requires_grad_()
    fast(x).sum().backward()
    assert not inner.packed()
    got = model.fc.weight.grad
    model.fc.weight.grad = None
    model(x).sum().backward()
    torch.testing.assert_close(got, model.fc.weight.grad)
    assert reasons(model)["fc.weight"] == (
        "compiled: dense: gradients are recorded, and packed weights have none; call it under "
        "torch.no_grad() or torch.inference_mode()"
    )
    assert_equal(fast, model)  # compiled once more, for calls without gradients
    assert len(inner.packed()) == 3
    assert reasons(model)["fc.weight"].endswith("| packed")
    model.requires_grad_(False)
    torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Parameter(nm_project(torch.randn(8, 8), "2:4"))
        self.both = nn.Parameter(nm_project(torch.randn(8, 8), "2:4"))
        self.cube = nn.Conv3d(8, 8, 1)
        self.wide = nn.Linear(8, 8, bias=False)
        self.up = nn.ConvTranspose1d(8, 8, 1)
        with torch.no_grad():
            for weight in (self.cube.weight, self.wide.weight, self.up.weight):
                weight.copy_(nm_project(weight, "1:8", 0 if weight is self.up.weight else 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.twice) + self.twice.sum()
        h = torch.addmm(self.both[0], F.linear(h, self.both), self.both)
        h = self.cube(h[..., None, None, None]).flatten(1)
        h = F.linear(h, self.wide.weight, h.sum(0)[:1])
        return self.up(h[..., None])


def test_what_cannot_be_packed_says_why() -> None:
    model, inner = Odd().eval(), Inner()
    fast = compiled(model, inner)
    assert_equal(fast, model, torch.randn(4, 8))
    assert not inner.packed()
    assert reasons(fx.symbolic_trace(model)) == {
        "twice": "compiled: dense: its weight is read by more than linear layers",
        "both": "compiled: dense: the graph reads its weight in two ways",
        "cube.weight": "compiled: dense: 3-D conv has no packed kernel yet",
        "wide.weight": "compiled: dense: its bias is not one number for each output",
        "up.weight": "compiled: dense: 1-D conv_transpose has no packed kernel yet",
    }


def test_inference_tensors_stay_dense() -> None:
    with torch.inference_mode():
        model = pruned()
        inner = Inner()
        torch.testing.assert_close(compiled(model, inner)(X), model(X))
        assert not inner.packed()
        assert "an inference tensor" in reasons(model)["fc.weight"]


def test_lowered_and_sparsified_models_pass_through() -> None:
    model = nmfx.sparsify(Net().eval(), "2:4")
    inner = Inner()
    assert_equal(compiled(model, inner), model)
    assert not inner.packed()
    lowered = nmfx.lower(model, (X,), tune=False)
    count = sum(row.state == "packed" for row in nmfx.report(lowered))
    assert count == 2
    assert_equal(compiled(lowered), lowered)
    folded = nmfx.fold(model)
    inner = Inner()
    assert_equal(compiled(folded, inner), folded)
    assert len(inner.packed()) == 2


def test_autocast_and_bfloat16() -> None:
    model = pruned()
    fast = compiled(model, "aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = fast(X), model(X)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
    model.bfloat16()
    x = X.bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=5e-2, atol=5e-2)


def test_what_was_compiled_and_is_gone_is_not_reported() -> None:
    model = pruned()
    fast = compiled(model)
    assert_equal(fast, model)
    torch.compiler.reset()
    del fast
    gc.collect()
    assert not any("compiled" in reason for reason in reasons(model).values())


# --- options, the name, and Inductor -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mode", "text"),
    [
        ({"iner": "eager"}, None, 'backend="nmfx" has the options inner and tune, not iner'),
        ({"inner": "nothing"}, None, "inner='nothing' is no backend of torch.compile"),
        ({"inner": nmfx.backend}, None, "the inner backend of nmfx cannot be nmfx itself"),
        ({"inner": 3}, None, "inner=3 is no backend of torch.compile"),
        ({"tune": 1}, None, "tune=1 is neither True nor False"),
        ({"inner": "eager"}, "max-autotune", "mode='max-autotune' is Inductor's, and the inner"),
    ],
)
def test_options_are_checked(options: dict[str, Any], mode: str | None, text: str) -> None:
    gm = fx.symbolic_trace(nn.Identity())
    with pytest.raises(nmfx.NMError) as error:
        nmfx.backend(gm, [X], options=options, mode=mode)
    assert str(error.value).startswith(text), error.value


ENTRY = "[torch_dynamo_backends]\nnmfx = nmfx.backend:backend\n"


def test_its_name_is_found_through_the_entry_point(tmp_path: Path) -> None:
    folder = tmp_path / "some-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: some\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(ENTRY)
    code = (
        "import torch, sys; m = torch.nn.Linear(8, 8); m.weight.data[:, ::2] = 0;"
        "f = torch.compile(m, backend='nmfx', options={'inner': 'eager', 'tune': False});\n"
        "with torch.no_grad(): print(torch.allclose(f(torch.ones(2, 8)), m(torch.ones(2, 8))))\n"
        "import nmfx; print(nmfx.report(m).rows[0].reason)"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(nmfx.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "True\ncompiled: packed\n", done.stderr


@pytest.mark.deep
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
def test_inductor_compiles_what_came_of_it(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PACKED_WINS)
    model = pruned()
    for dynamic in (None, True):
        torch.compiler.reset()
        fast = torch.compile(model, backend=nmfx.backend, mode=mode, dynamic=dynamic)
        assert_equal(fast, model, X, torch.cat([X, X, X]))
        with torch.no_grad():
            model.fc.weight.mul_(2)
        assert_equal(fast, model)
        assert "packed again" in reasons(model)["fc.weight"]
        with torch.no_grad():
            model.fc.weight.add_(1)
        assert_equal(fast, model)
        model = pruned()


@pytest.mark.deep
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_with_freezing_a_change_makes_the_graph_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = install(monkeypatch, PACKED_WINS)
    model = pruned()
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        fast = torch.compile(model, backend=nmfx.backend, options={})
        assert_equal(fast, model)
        assert any("prepacked" in asked for asked, _ in timer.asked), "no rival: freezing has it"
        assert reasons(model)["fc.weight"].startswith("compiled: packed")
        model.fc.weight.mul_(2)
        assert_equal(fast, model)
        assert "its graph runs dense" in reasons(model)["fc.weight"]
