"""Every message of the model-level functions, word for word; and nothing has changed then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import nmfx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))
        self.odd = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self.body(x)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class DataDependent(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Identity(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


def sparse() -> nn.Module:
    return nmfx.sparsify(Net(), "2:4")


def frozen() -> nn.Module:
    model = sparse()
    nmfx.freeze(model)
    return model


def lowered() -> nn.Module:
    return nmfx.lower(nmfx.sparsify(Net(), "1:4"), tune=False)


def meta() -> nn.Module:
    return sparse().to("meta")


def graph() -> nn.Module:
    return fx.symbolic_trace(Functional())


def sparse_graph() -> nn.Module:
    return nmfx.sparsify(graph(), {"": "2:4"})


def traced_branch() -> nn.Module:
    return nmfx.sparsify(DataDependent(), "2:4")


def reclassed() -> nn.Module:
    model = sparse()
    parametrize.register_parametrization(model.body[0], "weight", Identity())
    return model


def rehooked() -> nn.Module:
    model = sparse()
    original = model.body[0].forward
    model.body[0].forward = lambda *args: original(*args)  # as accelerate does
    return model


def scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(8, 8))


def other(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def wrong_lower(inputs: Any) -> Callable[[nn.Module], Any]:
    return lambda model: nmfx.lower(model, inputs, tune=False)


def rules(rules: Any) -> Callable[[nn.Module], Any]:
    return lambda model: nmfx.sparsify(model, rules)


def strength(lambda_w: Any) -> Callable[[nn.Module], Any]:
    return lambda model: nmfx.sparsify(model, "2:4", lambda_w=lambda_w)


FORM = (
    "is not of the form 'N:M' with 1 <= N <= M <= 64 (ASCII digits, no blanks or signs); write for "
    "example '2:4'"
)
STRADDLE = "in_features=6 is not a multiple of 4, so 2:4 groups would straddle rows"
NEGATIVE = (
    "is not finite and >= 0: SR-STE decays pruned weights towards zero, 0 is plain STE; the "
    "paper's default is 2e-4"
)
WRITE = (
    "; write a tuple of arguments, (x,), a dict of keywords, or a list of these for several calls"
)
FIRST = "call nmfx.sparsify(model, '2:4') first"
RECLASSED = "body.0: its class became ParametrizedNMLinear after it was sparsified; undo that first"
REHOOKED = (
    "body.0: its forward was replaced on the instance after it was sparsified; undo that first"
)
PAPER = "the paper's default is 2e-4"

# name -> (model, call, message)
ERRORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    # patterns
    **{
        f"pattern {text!r}": (Net, rules(text), f"pattern {text!r} {FORM}")
        for text in (
            *("", "2", "2:", ":4", "2:4:8", " 2 : 4 ", "+2:4", "-1:4", "2_0:4_0", "2:4\n", "02:4"),
            *("\uff12:\uff14", "2/4", "2:4 ", "0:4", "2:0", "two:four", "m4n2", "100:200"),
        )
    },
    "pattern 4:2": (
        Net,
        rules("4:2"),
        "pattern 4:2 breaks 1 <= N <= M <= 64; N:M means keep N of every M, for example '2:4'",
    ),
    "pattern 2:65": (
        Net,
        rules("2:65"),
        "pattern 2:65 breaks 1 <= N <= M <= 64; N:M means keep N of every M, for example '2:4'",
    ),
    "pattern (0, 4)": (
        Net,
        rules((0, 4)),
        "pattern 0:4 breaks 1 <= N <= M <= 64; N:M means keep N of every M, for example '2:4'",
    ),
    "pattern (2.0, 4)": (
        Net,
        rules((2.0, 4)),
        "pattern (2.0, 4): N and M must be int, got float; write for example (2, 4)",
    ),
    "pattern (True, 4)": (
        Net,
        rules((True, 4)),
        "pattern (True, 4): N and M must be int, got bool; write for example (2, 4)",
    ),
    "pattern (2, 4, 8)": (
        Net,
        rules((2, 4, 8)),
        "pattern (2, 4, 8) is a tuple; give a string like '2:4' or a tuple like (2, 4)",
    ),
    "pattern None": (
        Net,
        rules(None),
        "pattern None is a NoneType; give a string like '2:4' or a tuple like (2, 4)",
    ),
    "pattern in rule": (Net, rules({"body.*": "2:"}), f"rule 'body.*': pattern '2:' {FORM}"),
    # rules
    "rules empty": (Net, rules({}), "the rules are empty; write for example {'*': '2:4'}"),
    "rules key": (
        Net,
        rules({3: "2:4"}),
        "rule 3: keys are globs over module names, like 'encoder.*'",
    ),
    "rule matches nothing": (
        Net,
        rules({"*": "2:4", "encoder.*": None}),
        "rule 'encoder.*' matches no module of Net; print(nmfx.report(model)) lists the layers",
    ),
    "rule names a parameter": (
        Net,
        rules({"head.weight": "2:4"}),
        "rule 'head.weight' matches no module of Net; print(nmfx.report(model)) lists the layers",
    ),
    "exact name of a container": (
        Net,
        rules({"body": "2:4"}),
        "rule 'body' names a Sequential, which is no linear or conv layer; for all layers below it "
        "write 'body.*'",
    ),
    "exact name of the root": (
        Net,
        rules({"": "2:4"}),
        "rule '' names a Net, which is no linear or conv layer; for all layers below it write '*'",
    ),
    "exact name of an activation": (
        Net,
        rules({"body.1": "2:4"}),
        "rule 'body.1' names a ReLU, which is no linear or conv layer; for all layers below it "
        "write 'body.1.*'",
    ),
    "exact name with an obstacle": (
        Net,
        rules({"odd": "2:4"}),
        f"odd: {STRADDLE}; skip it with {{'odd': None}}",
    ),
    "root with an obstacle": (
        lambda: nn.Linear(6, 8),
        rules({"": "2:4"}),
        f"model: {STRADDLE}; skip it with {{'': None}}",
    ),
    # nothing to do
    "no layers": (
        lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(8)),
        rules("2:4"),
        "Sequential has no linear or conv layer that nmfx could sparsify",
    ),
    "all skipped": (
        lambda: nn.Linear(6, 8),
        rules("2:4"),
        "nothing to sparsify in Linear: all 1 linear and conv weights stay dense, the first one, "
        f"weight, because {STRADDLE}",
    ),
    "all None": (
        Net,
        rules({"*": None}),
        "nothing to sparsify in Net: all 4 linear and conv weights stay dense, the first one, "
        "body.0.weight, because kept dense by rule '*'",
    ),
    # models
    "no module": (list, rules("2:4"), "nmfx works on an nn.Module, got list"),
    "a class": (lambda: nn.Linear, rules("2:4"), "nmfx works on an nn.Module, got type"),
    "a ScriptModule": (
        scripted,
        rules("2:4"),
        "the model is a ScriptModule; sparsify it before torch.jit.script",
    ),
    "unsparsify no module": (
        dict,
        nmfx.unsparsify,
        "nmfx works on an nn.Module, got dict",
    ),
    "report no module": (
        lambda: None,
        nmfx.report,
        "nmfx.report takes an nn.Module, got NoneType",
    ),
    "fold no module": (lambda: "model", nmfx.fold, "nmfx.fold takes an nn.Module, got str"),
    # lambda
    **{
        f"lambda {value!r}": (Net, strength(value), f"lambda_w={value!r} {NEGATIVE}")
        for value in (-2e-4, float("nan"), float("inf"))
    },
    **{
        f"lambda {value!r}": (
            Net,
            strength(value),
            f"lambda_w={value!r} is not a number; {PAPER}",
        )
        for value in ("2e-4", None, True)
    },
    "set_lambda": (
        sparse,
        lambda model: nmfx.set_lambda(model, -1),
        f"lambda_w=-1 {NEGATIVE}",
    ),
    # a second call
    "another pattern": (
        sparse,
        rules("1:4"),
        "body.0: it is 2:4 (keep 2 of every 4) already, not 1:4 (keep 1 of every 4); use "
        "nmfx.set_pattern to change it",
    ),
    "another pattern in a graph": (
        sparse_graph,
        rules({"": "4:8"}),
        "model: it is 2:4 (keep 2 of every 4) already, not 4:8 (keep 4 of every 8); use "
        "nmfx.set_pattern to change it",
    ),
    # verbs on a dense model
    **{
        f"dense {verb.__name__}": (
            Net,
            verb,
            f"nmfx.{verb.__name__}: Net has no sparsified layer; {FIRST}",
        )
        for verb in (*(nmfx.fold, nmfx.freeze, nmfx.unfreeze, nmfx.masks, nmfx.verify, nmfx.trace),)
    },
    "dense set_lambda": (
        Net,
        lambda model: nmfx.set_lambda(model, 0.1),
        f"nmfx.set_lambda: Net has no sparsified layer; {FIRST}",
    ),
    "dense set_pattern": (
        Net,
        lambda model: nmfx.set_pattern(model, "2:4"),
        f"nmfx.set_pattern: Net has no sparsified layer; {FIRST}",
    ),
    "dense attach": (
        Net,
        lambda model: nmfx.attach(model, other(model)),
        f"nmfx.attach: Net has no sparsified layer; {FIRST}",
    ),
    "dense unsparsify": (
        Net,
        nmfx.unsparsify,
        "nmfx.unsparsify: Net has no sparsified layer",
    ),
    "dense graph": (
        graph,
        nmfx.unsparsify,
        "nmfx.unsparsify: Functional has no sparsified layer",
    ),
    "dense lower": (
        Net,
        nmfx.lower,
        "nmfx.lower: no weight of Net is N:M sparse; the first of 4, body.0.weight: its weight "
        "satisfies no N:M pattern that would make it smaller",
    ),
    # set_pattern
    "set_pattern None": (
        sparse,
        lambda model: nmfx.set_pattern(model, {"body.0": None}),
        "rule 'body.0': None would make a layer dense; use nmfx.unsparsify",
    ),
    "set_pattern matches nothing": (
        sparse,
        lambda model: nmfx.set_pattern(model, {"body.0": "1:4", "head": "1:4"}),
        "rule 'head' matches no sparsified layer",
    ),
    "set_pattern axis": (
        sparse,
        lambda model: nmfx.set_pattern(model, {"body.0": "1:4", "body.2": "2:16"}),
        "body.2: its reduced axis of 8 is not a multiple of 16, so 2:16 groups would straddle it; "
        "leave it out with a glob",
    ),
    "set_pattern frozen": (
        frozen,
        lambda model: nmfx.set_pattern(model, "1:4"),
        "body.0: its mask is frozen at 2:4 (keep 2 of every 4); call nmfx.unfreeze first",
    ),
    # meta
    "fold meta": (
        meta,
        nmfx.fold,
        "body.0.weight: it is on the meta device, so there is nothing to fold",
    ),
    "freeze meta": (
        meta,
        nmfx.freeze,
        "body.0.weight: it is on the meta device, so it has no mask yet",
    ),
    "lower meta": (
        meta,
        nmfx.lower,
        "body.0.weight: it is on the meta device, so there is nothing to pack",
    ),
    "verify meta": (
        meta,
        lambda model: nmfx.verify(model, torch.empty(2, 8, device="meta")),
        "body.0.weight: it is on the meta device, so there is nothing to run",
    ),
    # what somebody else put on top
    **{
        f"{what} {name}": (build, verb, message)
        for what, build, message in (
            ("reclassed", reclassed, RECLASSED),
            ("rehooked", rehooked, REHOOKED),
        )
        for name, verb in {
            "fold": nmfx.fold,
            "lower": nmfx.lower,
            "freeze": nmfx.freeze,
            "unfreeze": nmfx.unfreeze,
            "unsparsify": nmfx.unsparsify,
            "set_pattern": lambda model: nmfx.set_pattern(model, "1:2"),
        }.items()
    },
    # attach
    "attach no optimizer": (
        sparse,
        lambda model: nmfx.attach(model, 0.1),
        "nmfx.attach takes a torch.optim.Optimizer, got float",
    ),
    "attach another optimizer": (
        sparse,
        lambda model: nmfx.attach(model, other(model)),
        "SGD owns none of the sparsified weights; attach the optimizer that was built from "
        "model.parameters()",
    ),
    # lower
    "lower inputs": (
        sparse,
        wrong_lower(torch.zeros(2, 8)),
        f"example_inputs holds a Tensor{WRITE}",
    ),
    "lower input in a list": (
        sparse,
        wrong_lower([torch.zeros(2, 8)]),
        f"example_inputs holds a Tensor{WRITE}",
    ),
    "lower nothing in a list": (
        sparse,
        wrong_lower([None]),
        f"example_inputs holds a NoneType{WRITE}",
    ),
    "lower empty": (
        sparse,
        wrong_lower([]),
        "example_inputs=[] holds no call; leave it out or give a tuple",
    ),
    "lower twice": (
        lowered,
        nmfx.lower,
        "nmfx.lower: Net is lowered already, and no other weight of it is N:M sparse; "
        "nmfx.lower(nmfx.fold(model), x) measures again and chooses anew",
    ),
    "unsparsify lowered": (
        lowered,
        nmfx.unsparsify,
        "body.0: weight is packed; its dense weight is gone",
    ),
    # trace
    "trace control flow": (
        traced_branch,
        nmfx.trace,
        "DataDependent does not trace symbolically (symbolically traced variables cannot be used "
        "as inputs to control flow); give example arguments, nmfx.trace(model, *args), to go "
        "through torch.export",
    ),
}


def snapshot(model: Any) -> Any:
    """Everything that a failed call could have changed."""
    if not isinstance(model, nn.Module):
        return model
    modules = [
        (name, id(m), type(m), {k: id(v) for k, v in m.__dict__.items()}, m.training)
        for name, m in model.named_modules()
        if not isinstance(m, torch.jit.ScriptModule)
    ]
    state = {
        name: (id(p), str(p.tolist())) for name, p in model.named_parameters() if not p.is_meta
    }
    code = [m.code for m in model.modules() if isinstance(m, fx.GraphModule)]
    return modules, state, list(model.state_dict()), code, str(nmfx.report(model))


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_message_and_unchanged_model(name: str) -> None:
    build, call, message = ERRORS[name]
    model = build()
    before = snapshot(model)
    with pytest.raises(nmfx.NMError) as error:
        call(model)
    assert str(error.value) == message
    assert snapshot(model) == before, "the failed call changed the model"


def test_errors_are_value_errors() -> None:
    assert issubclass(nmfx.NMError, ValueError)


@pytest.mark.parametrize("build", [Net, graph])
def test_a_second_equal_call_changes_nothing(build: Callable[[], nn.Module]) -> None:
    model = build()
    spec = "2:4" if build is Net else {"": "2:4"}
    nmfx.sparsify(model, spec)
    types = [type(module) for module in model.modules()]
    code = getattr(model, "code", None)
    sites = [
        id(site) for module in model.modules() for site in module.__dict__.get("_nmfx_sites", ())
    ]
    report = str(nmfx.report(model))
    assert nmfx.sparsify(model, spec) is model
    assert [type(module) for module in model.modules()] == types
    assert getattr(model, "code", None) == code
    assert str(nmfx.report(model)) == report
    assert sites == [
        id(site) for module in model.modules() for site in module.__dict__.get("_nmfx_sites", ())
    ]


def test_a_second_call_adds_layers() -> None:
    model = nmfx.sparsify(Net(), {"body.0": "1:4"}, lambda_w=0.5)
    nmfx.freeze(model)
    nmfx.sparsify(model, {"body.2": "2:4", "head": "4:8"})
    rows = [(r.fqn, r.pattern and r.pattern.text, r.state, r.lambda_w) for r in nmfx.report(model)]
    assert rows == [
        ("body.0.weight", "1:4", "frozen", 0.5),
        ("body.2.weight", "2:4", "sparse", 2e-4),
        ("odd.weight", None, "dense", None),
        ("head.weight", "4:8", "sparse", 2e-4),
    ]
    assert {r.fqn: r.reason for r in nmfx.report(model)}["odd.weight"] == "no rule matches"
    model(torch.randn(2, 8)).sum().backward()


def test_a_second_call_with_another_pattern_for_one_layer_adds_nothing() -> None:
    model = nmfx.sparsify(Net(), {"body.0": "2:4"})
    before = snapshot(model)
    with pytest.raises(nmfx.NMError, match=r"^body\.0: it is 2:4"):
        nmfx.sparsify(model, {"body.0": "1:4", "body.2": "1:4"})
    assert snapshot(model) == before


def test_failing_inputs_of_lower_raise_what_the_model_raises() -> None:
    model = sparse().train()
    before = snapshot(model)
    for inputs in ((), (torch.zeros(2, 9),), {"y": torch.zeros(2, 8)}):
        with pytest.raises((TypeError, RuntimeError)):
            nmfx.lower(model, inputs, inplace=True, tune=False)
        assert snapshot(model) == before


@pytest.mark.parametrize("sub", [False, True])
def test_report_messages_are_not_needed_to_find_the_layer(sub: bool) -> None:
    """A nested model's error names the layer by its full name."""
    model = nn.ModuleDict({"deep": Net()}) if sub else Net()
    name = "deep.odd" if sub else "odd"
    with pytest.raises(nmfx.NMError) as error:
        nmfx.sparsify(model, {name: "2:4"})
    assert str(error.value).startswith(f"{name}: in_features=6")
