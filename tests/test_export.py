"""torch.export: of sparsified, folded and lowered models, and what nmfx does with the graphs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from zoo import build, call, outputs

import nmfx
from nmfx.capture.take_over import exported_nodes
from nmfx.ops.linear_nm import linear_nm
from nmfx.ops.sr_ste import sr_ste

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

MODELS = ["conv_family", "functional", "encoder", "hf_bert"]
DEEP = ["self_attention", "hf_llama", "hf_gpt2", "resnet50", "unet", "hf_vit", "hf_t5"]
STATES = ["sparse", "folded", "lowered"]
names = pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(name, marks=pytest.mark.deep) for name in DEEP)]
)


def state_of(name: str, state: str) -> tuple[nn.Module, Any]:
    model, inputs = build(name)
    model = nmfx.sparsify(model, "2:4")
    if state == "folded":
        model = nmfx.fold(model)
    if state == "lowered":
        model = nmfx.lower(model, inputs, tune=False)
    return model, inputs


def grown(inputs: Any) -> Any:
    """The same inputs with one more in the batch."""
    more = {
        key: torch.cat([value, value[:1]]) if isinstance(value, Tensor) else value
        for key, value in (inputs.items() if isinstance(inputs, dict) else enumerate(inputs))
    }
    return more if isinstance(inputs, dict) else tuple(more.values())


def export(model: nn.Module, inputs: Any, batch: Any = Dim.AUTO) -> torch.export.ExportedProgram:
    def dynamic(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and batch is not None else None

    with torch.no_grad():
        if isinstance(inputs, dict):
            shapes: Any = {key: dynamic(value) for key, value in inputs.items()}
            return torch.export.export(model, (), inputs, dynamic_shapes=shapes)
        return torch.export.export(model, inputs, dynamic_shapes=tuple(map(dynamic, inputs)))


def assert_same(got: nn.Module, want: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        for one in inputs:
            for a, b in zip(outputs(call(got, one)), outputs(call(want, one)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def counts(gm: nn.Module) -> dict[str, int]:
    """How many nodes of nmfx a graph has."""
    names = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]  # type: ignore
    ops = ("nmfx.sr_ste.default", "nmfx.linear_nm.default", "nmfx.conv_nm.default")
    return {op.split(".")[1]: names.count(op) for op in ops if op in names}


@pytest.mark.parametrize("state", STATES)
@names
def test_an_exported_model_computes_the_same_for_any_batch(name: str, state: str) -> None:
    model, inputs = state_of(name, state)
    gm = export(model, inputs).module()
    assert_same(gm, model, inputs, grown(inputs))
    rows = list(nmfx.report(model))
    expected = {
        "sr_ste": sum(row.state == "sparse" for row in rows),
        "linear_nm": sum(row.state == "packed" and row.kind != "conv" for row in rows),
        "conv_nm": sum(row.state == "packed" and row.kind == "conv" for row in rows),
    }
    assert counts(gm) == {op: count for op, count in expected.items() if count}


@pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(n, marks=pytest.mark.deep) for n in DEEP)]
)
def test_what_was_exported_sparse_is_taken_over_by_every_verb(name: str) -> None:
    model, inputs = state_of(name, "sparse")
    program = export(model, inputs)
    want = {row.fqn: (row.pattern, row.shape) for row in nmfx.report(model) if row.pattern}
    more = grown(inputs)

    gm = program.module()
    note = nmfx.report(gm).notes[-1]
    assert note.startswith("weights in nmfx operators of an exported graph: "), note
    folded = nmfx.fold(gm)
    assert_same(folded, model, inputs, more)
    assert counts(gm)["sr_ste"] == len(want), "fold changed the graph that it was given"
    assert not exported_nodes(folded)
    assert not any("_nmfx" in key for m in folded.modules() for key in m.__dict__)
    weights = dict(folded.named_parameters())
    dims = {
        row.fqn: 0 if row.kind in ("addmm", "conv_transpose") else 1 for row in nmfx.report(model)
    }
    for fqn, (pattern, _) in want.items():
        assert nmfx.is_nm(weights[fqn], pattern, dims[fqn]), fqn

    gm = program.module()
    rules = {fqn.rpartition(".")[0]: "2:4" for fqn in want}
    assert nmfx.sparsify(gm, rules) is gm
    assert_same(gm, model, inputs, more)
    rows = {row.fqn: row for row in nmfx.report(gm)}
    assert {fqn: (row.pattern, row.shape) for fqn, row in rows.items() if row.pattern} == want
    assert {row.lambda_w for row in rows.values() if row.pattern} == {2e-4}
    nmfx.set_pattern(gm, "1:4")
    nmfx.set_pattern(gm, "2:4")
    assert_same(gm, model, inputs)

    lowered = nmfx.lower(program.module(), tune=False)
    assert_same(lowered, model, inputs, more)
    packed = [row.fqn for row in nmfx.report(lowered) if row.state == "packed"]
    assert packed, "nothing was packed"


@pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(n, marks=pytest.mark.deep) for n in DEEP)]
)
def test_what_was_exported_lowered_is_taken_over_by_fold(name: str) -> None:
    if name == "self_attention":
        pytest.skip("nothing of it is packed")
    model, inputs = state_of(name, "lowered")
    program = export(model, inputs)
    gm = program.module()
    folded = nmfx.fold(gm)
    assert_same(folded, model, inputs, grown(inputs))
    assert not counts(folded)
    assert counts(gm), "fold changed the graph that it was given"
    dense, weights = nmfx.fold(model), dict(folded.named_parameters())
    for row in nmfx.report(model):
        if row.state == "packed":
            weight = dense.get_parameter(row.fqn)
            weight = weight.t() if row.kind == "addmm" else weight
            assert torch.equal(weights[row.fqn].flatten(), weight.flatten()), row.fqn
    again = nmfx.lower(folded, inputs, tune=False)
    assert_same(again, model, inputs, grown(inputs))
    assert any(row.state == "packed" for row in nmfx.report(again))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.head = nn.Linear(8, 8), nn.Conv2d(8, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(F.silu(self.fc(x)).permute(0, 3, 1, 2)))
        return self.head(h.permute(0, 2, 3, 1))


X = (torch.linspace(-2, 2, 2 * 5 * 5 * 8).reshape(2, 5, 5, 8).sin(),)


def test_gradients_of_an_exported_sparse_graph_are_those_of_the_model() -> None:
    model = nmfx.sparsify(Net(), "2:4", lambda_w=0.25)
    gm = torch.export.export(model, X).module()
    taken = nmfx.sparsify(torch.export.export(model, X).module(), "2:4", lambda_w=0.5)
    for module in (model, gm, taken):
        module(*X).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gm.get_parameter(name).grad, parameter.grad, msg=name)
        # lambda is that of the export; "2:4" found nothing new to sparsify.
        torch.testing.assert_close(taken.get_parameter(name).grad, parameter.grad, msg=name)
    assert [n.target for n in taken.graph.nodes].count(sr_ste) == 2


def test_the_last_layer_of_an_exported_graph_is_told_by_its_use() -> None:
    lowered = nmfx.lower(nmfx.sparsify(Net().eval(), "2:4"), tune=False)
    gm = export(lowered, X).module()
    with pytest.raises(nmfx.NMError, match="lowered already, and no other weight"):
        nmfx.lower(gm, tune=False)
    before = {
        row.fqn: row.state for row in nmfx.report(nmfx.sparsify(gm, {"head": None, "*": "2:4"}))
    }
    assert before == {"fc.weight": "packed", "conv.weight": "packed", "head.weight": "dense"}
    nmfx.sparsify(gm, "2:4")
    rows = {row.fqn: row for row in nmfx.report(gm)}
    assert rows["head.weight"].reason.startswith("the output layer")
    before = nmfx.fold(lowered).fc.weight.clone()  # the graph shares its packed tensors
    state = {name: value.clone() for name, value in gm.state_dict().items()}
    state["fc.weight_values"] *= 2
    gm.load_state_dict(state)
    folded = nmfx.fold(gm)
    assert torch.equal(folded.get_parameter("fc.weight"), 2 * before)
    nmfx.sparsify(gm, {"head": "1:4"})
    assert [node.target for node in gm.graph.nodes].count(linear_nm) == 1
    assert_same(nmfx.fold(gm), gm, X)


def doubled(fc: Any) -> Tensor:
    return (sr_ste(fc.weight, fc._nmfx_control0, 4, 1) * 2).sum()


def test_a_mask_before_something_else_is_refused_and_nothing_changes() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + doubled(self.fc)

    model = nmfx.sparsify(Reads(), {"fc": "2:4"})
    gm = torch.export.export(model, X).module()
    code = gm.code
    for verb in (nmfx.fold, lambda gm: nmfx.sparsify(gm, {"fc": "2:4"})):
        with pytest.raises(nmfx.NMError, match=r"fc\.weight: the graph also reads its weight in"):
            verb(gm)
        assert gm.code == code


@pytest.mark.parametrize("decomposed", [False, True])
def test_rules_that_do_not_hold_leave_an_exported_graph_as_it_was(decomposed: bool) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    if not decomposed:
        nmfx.sparsify(model, {"0": "2:4"})
    program = torch.export.export(model, X)
    gm = (program.run_decompositions() if decomposed else program).module()
    code, modules, state = gm.code, list(gm._modules), list(gm.state_dict())
    verbs: list[tuple[str, Callable[[Any], Any]]] = [
        ("matches no module", lambda gm: nmfx.sparsify(gm, {"nosuch": "2:4"})),
        ("is N:M sparse", lambda gm: nmfx.lower(gm, inplace=True)),
    ]
    for text, verb in verbs[: 1 + decomposed]:
        with pytest.raises(nmfx.NMError, match=text):
            verb(gm)
        assert (gm.code, list(gm._modules), list(gm.state_dict())) == (code, modules, state)
    nmfx.sparsify(gm, {"2": "2:4"})


def test_norms_and_activations_of_an_exported_graph_are_joined() -> None:
    norm = nn.BatchNorm2d(8)
    norm.running_var.uniform_(0.5, 2.0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), norm, nn.SiLU(), nn.Conv2d(8, 8, 1)).eval()
    model = nmfx.sparsify(model, {"?": "2:4"})
    x = (torch.randn(2, 8, 5, 5),)
    want = nmfx.fold(model)
    lowered = nmfx.lower(export(model, x).module(), x, tune=False)
    assert_same(lowered, want, x)
    (first, _) = nmfx.report(lowered)
    assert first.reason == "batch norm folded; silu fused"


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8)])
@pytest.mark.parametrize("verb", ["sparsify", "lower"])
def test_decomposed_linear_layers_are_put_together(shape: tuple[int, ...], verb: str) -> None:
    layers = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.LayerNorm(8)
    model = nn.Sequential(*layers, nn.Linear(8, 4)).eval()
    sparse = nmfx.sparsify(model, "2:4")
    folded, x = nmfx.fold(sparse), (torch.randn(shape),)
    with torch.no_grad():
        gm = torch.export.export(folded, x).run_decompositions().module()
    code = gm.code
    assert "permute" in code
    assert nmfx.report(gm).notes[-1] == (
        "linear layers that are decomposed in a graph (aten.permute and addmm or mm): 0.weight, "
        "2.weight, 4.weight; nmfx.sparsify and lower put them together"
    )
    if verb == "sparsify":
        result = nmfx.sparsify(gm, "2:4")
        assert "permute" not in gm.code
    else:
        result = nmfx.lower(gm, x, tune=False)
        assert gm.code == code
    states = [row.state for row in nmfx.report(result)]
    state = "sparse" if verb == "sparsify" else "packed"
    assert states == [state, state, "dense"]
    assert_same(result, folded, x)
    result.graph.lint()


# --- files and other processes -------------------------------------------------------------------

READ = """
import sys, torch
folder = sys.argv[1]
try:
    torch.export.load(folder + "/lowered.pt2")
except RuntimeError:  # torch logs the reason
    print("refused")
import nmfx
for name in ("sparse", "lowered"):
    program = torch.export.load(folder + "/" + name + ".pt2")
    inputs, wanted = torch.load(folder + "/" + name + ".pt")
    with torch.no_grad():
        print(name, torch.equal(program.module()(*inputs), wanted))
"""


def fresh(code: str, *arguments: object) -> tuple[str, str]:
    """(stdout, stderr) of a new process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=Path(nmfx.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return done.stdout, done.stderr


def test_a_program_is_loaded_in_a_process_that_imports_nmfx(tmp_path: Path) -> None:
    sparse = nmfx.sparsify(Net().eval(), "2:4")
    for name, model in (("sparse", sparse), ("lowered", nmfx.lower(sparse, X, tune=False))):
        program = export(model, X)
        torch.export.save(program, tmp_path / f"{name}.pt2")
        with torch.no_grad():
            torch.save((X, program.module()(*X)), tmp_path / f"{name}.pt")
    out, error = fresh(READ, tmp_path)
    assert out == "refused\nsparse True\nlowered True\n", error
    assert "We failed to resolve torch.ops.nmfx.linear_nm.default to an operator." in error


MAKERS: dict[str, Callable[[nn.Module], fx.GraphModule]] = {
    "traced": fx.symbolic_trace,
    "exported": lambda model: export(model, X).module(),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_graphs_are_exported_again(make: Callable[[nn.Module], fx.GraphModule]) -> None:
    gm = nmfx.sparsify(make(Net().eval()), "2:4")
    again = export(gm, X).module()
    assert_same(again, gm, X, grown(X))
    assert counts(again) == {"sr_ste": 2}
    lowered = nmfx.lower(gm, X, tune=False)
    again = export(lowered, X).module()
    assert_same(again, lowered, X, grown(X))
    assert counts(again) == {"linear_nm": 1, "conv_nm": 1}
    assert_same(nmfx.fold(again), lowered, X)


PACKAGE = """
import sys, torch
{imports}
runner = torch._inductor.aoti_load_package(sys.argv[1])
inputs, wanted = torch.load(sys.argv[2])
print([torch.allclose(runner(x), y, rtol=1e-4, atol=1e-5) for x, y in zip(inputs, wanted)])
"""


@pytest.mark.deep
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_aotinductor_package_runs_in_a_process_that_imports_nmfx(tmp_path: Path) -> None:
    lowered = nmfx.lower(nmfx.sparsify(Net().eval(), {"?*": "2:4"}), X, tune=False)
    assert {row.state for row in nmfx.report(lowered)} == {"packed"}
    program = export(lowered, X, Dim("batch", min=1, max=64))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    inputs = [X[0], torch.cat([X[0], X[0], X[0]])]
    with torch.no_grad():
        torch.save((inputs, [lowered(x) for x in inputs]), tmp_path / "data.pt")
    data = tmp_path / "data.pt"
    assert fresh(PACKAGE.format(imports="import nmfx"), path, data) == ("[True, True]\n", "")
    _, error = fresh(PACKAGE.format(imports=""), path, data)
    assert "Could not find schema for nmfx::" in error, error
