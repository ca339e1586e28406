"""What sparsify, fold, lower, deepcopy and unsparsify leave of every model of the zoo."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from masked_reference import sites
from torch import Tensor, fx, nn
from zoo import ZOO, build, call, outputs

import nmfx

# Where a raw read is expected, fold and lower change what it reads.
MASKED_ONLY = [name for name in ZOO if not ZOO[name].findings]

# Its sparse weights are used by no layer that has a packed kernel: lower folds these, and says so.
NOTHING_PACKED = {"products"}

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The outputs with gradients enabled, where torch's attention fast paths are off."""
    return [out.detach() for out in outputs(call(model, inputs))]


def assert_same(actual: list[Tensor], wanted: list[Tensor], what: str) -> None:
    for got, want in zip(actual, wanted, strict=True):
        gap = (got - want).abs().max()
        assert torch.equal(got, want), f"{what}: differs by up to {gap:.3g}"


def differs(actual: list[Tensor], wanted: list[Tensor]) -> bool:
    return any(not torch.equal(got, want) for got, want in zip(actual, wanted, strict=True))


def make_copyable(model: nn.Module, inputs: Any) -> None:
    """What legacy weight_norm computed with gradients enabled cannot be deep-copied, says torch."""
    with torch.no_grad():
        call(model, inputs)


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Per module: its class and its attributes; plain values as they are, containers by keys."""
    found = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        state: dict[str, Any] = {}
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, tuple, set, type(None))):
                state[name] = value if not isinstance(value, set) else set(value)
            else:
                state[name] = list(value) if isinstance(value, dict) else type(value)
        found[fqn] = (type(module), state)
    return found


@pytest.mark.parametrize("name", ZOO)
def test_zoo_sparsify_keeps_keys_parameters_and_classes(name: str) -> None:
    model, _ = build(name)
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    classes = {fqn: type(module) for fqn, module in model.named_modules()}

    assert nmfx.sparsify(model, "2:4") is model
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters)
    for fqn, parameter in parameters.items():
        assert after[fqn] is parameter, f"{fqn} was replaced"
    modules = dict(model.named_modules())
    assert modules.keys() - classes.keys() <= {"_nmfx"}, "only a graph gets a module of nmfx's"
    for fqn, before in classes.items():
        assert isinstance(modules[fqn], before), f"{fqn}: {type(modules[fqn])} is no {before}"


@pytest.mark.parametrize("name", ZOO)
def test_zoo_state_dict_loads_into_a_dense_model_and_back(name: str) -> None:
    model, inputs = build(name)
    dense = run(model, inputs)
    nmfx.sparsify(model, "2:4")
    sparse = run(model, inputs)

    other, _ = build(name)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert_same(run(other, inputs), dense, "dense model loaded from the sparse one")
    nmfx.sparsify(other, "2:4")
    other.load_state_dict(model.state_dict())
    assert_same(run(other, inputs), sparse, "sparse model loaded from the sparse one")


@pytest.mark.parametrize("name", ZOO)
def test_zoo_unsparsify_restores_everything(name: str) -> None:
    model, inputs = build(name)
    dense = run(model, inputs)  # first, because a forward may leave attributes of its own
    before = anatomy(model)
    nmfx.sparsify(model, "2:4")
    assert differs(run(model, inputs), dense), "sparsify changed nothing"
    assert anatomy(model) != before, "anatomy() does not see what sparsify adds"

    assert nmfx.unsparsify(model) is model
    after = anatomy(model)
    for fqn, state in before.items():
        assert after[fqn] == state, f"{fqn or type(model).__name__}: {after[fqn]} != {state}"
    assert after.keys() == before.keys()
    assert_same(run(model, inputs), dense, "unsparsified model")


@pytest.mark.parametrize("name", MASKED_ONLY)
def test_zoo_fold_is_a_dense_model_with_equal_outputs(name: str) -> None:
    model, inputs = build(name)
    before = anatomy(model)
    where = sites(model, ZOO[name].functional)
    nmfx.sparsify(model, "2:4")
    masks = nmfx.masks(model)
    sparse = run(model, inputs)

    make_copyable(model, inputs)
    folded = nmfx.fold(model)
    for fqn, (cls, _) in before.items():
        now = type(folded.get_submodule(fqn))
        # fx makes a class per GraphModule object, so for a copied graph its bases must agree.
        same = now.__bases__ == cls.__bases__ if issubclass(cls, fx.GraphModule) else now is cls
        assert same, f"{fqn}: {now}"
    assert list(folded.state_dict()) == list(model.state_dict())
    for fqn, mask in masks.items():
        weight = folded.get_parameter(fqn)
        assert nmfx.is_nm(weight, "2:4", where[fqn].dim), f"{fqn} is not 2:4 after fold"
        assert torch.equal(weight != 0, mask), f"{fqn}: the zeros are not those of the mask"
    assert_same(run(folded, inputs), sparse, "folded model")
    assert_same(run(model, inputs), sparse, "the model that was folded out of place")

    assert nmfx.fold(model, inplace=True) is model
    assert_same(run(model, inputs), sparse, "model folded in place")


@pytest.mark.parametrize("name", ZOO)
def test_zoo_deepcopy_works_and_diverges(name: str) -> None:
    model, inputs = build(name)
    nmfx.sparsify(model, "2:4")
    masks, sparse = nmfx.masks(model), run(model, inputs)
    make_copyable(model, inputs)
    twin = deepcopy(model)
    assert_same(run(twin, inputs), sparse, "copy")

    nmfx.set_pattern(twin, "1:4")
    assert differs(run(twin, inputs), sparse), "set_pattern did not reach the copy"
    with torch.no_grad():
        for fqn in masks:
            parameter = twin.get_parameter(fqn)
            parameter.copy_(parameter.flip(sites(twin, ZOO[name].functional)[fqn].dim))
    for fqn, mask in nmfx.masks(twin).items():
        assert mask.sum() * 2 == masks[fqn].sum(), f"{fqn}: the copy does not follow 1:4"
    for fqn, mask in nmfx.masks(model).items():
        assert torch.equal(mask, masks[fqn]), f"{fqn}: the copy changed the original's mask"
    assert_same(run(model, inputs), sparse, "original after its copy changed")
    nmfx.unsparsify(twin)
    assert_same(run(model, inputs), sparse, "original after its copy was unsparsified")


@pytest.mark.parametrize("name", MASKED_ONLY)
def test_zoo_lower_stays_close_to_the_folded_model(name: str) -> None:
    model, inputs = build(name)
    nmfx.sparsify(model, "2:4")
    make_copyable(model, inputs)
    with torch.no_grad():
        wanted = outputs(call(nmfx.fold(model), inputs))
        lowered = nmfx.lower(model, inputs, tune=False)
        result = outputs(call(lowered, inputs))
    for got, want in zip(result, wanted, strict=True):
        rtol = 1e-4 if want.dtype == torch.float32 else 2e-2  # bfloat16 has 8 bits
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().max()))
    for key, value in lowered.state_dict().items():
        assert type(value) is Tensor, f"{key} is a {type(value).__name__}"
    rows = nmfx.report(lowered).rows
    packed = [row.fqn for row in rows if row.state == "packed"]
    assert bool(packed) != (name in NOTHING_PACKED), f"packed: {packed}"
    folded = {row.fqn for row in rows if row.kind == "conv" and row.reason.endswith("; folded")}
    volumes = {row.fqn for row in rows if row.kind == "conv" and len(row.shape) == 5}
    assert folded == volumes, "exactly the 3-D convolutions have no packed kernel"
