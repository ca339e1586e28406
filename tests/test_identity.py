"""A sparsified model is the model it was: same objects, names, hooks, copies and files."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_reference import mask_, nm_mask, sites
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

import nmfx


class Net(nn.Module):
    """One layer of each kind of capture, and what is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.fc(h).relu().mean(1)) / self.temperature


X = torch.linspace(-2, 2, 2 * 4 * 5).reshape(2, 4, 5).sin()


def masked(net: nn.Module, skip: tuple[str, ...] = ("head.weight",)) -> nn.Module:
    """A dense copy with zeros where 2:4 prunes."""
    net = copy.deepcopy(net)
    mask_(net, {name: site for name, site in sites(net).items() if name not in skip}, 2, 4)
    return net


@pytest.fixture
def dense() -> Net:
    return Net()


@pytest.fixture
def net(dense: Net) -> nn.Module:
    return nmfx.sparsify(copy.deepcopy(dense), "2:4")


def assert_sparse(net: nn.Module, dense: nn.Module) -> None:
    """`net` computes what `dense` does with masked weights."""
    torch.testing.assert_close(net.eval()(X), masked(dense).eval()(X), rtol=0, atol=0)
    assert len(nmfx.masks(net)) == 4


# --- nothing to see ----------------------------------------------------------------------------


def test_sparsify_returns_the_same_object_with_the_same_parts(dense: Net) -> None:
    before = {
        "state": list(dense.state_dict()),
        "parameters": [(name, id(p)) for name, p in dense.named_parameters()],
        "buffers": [(name, id(b)) for name, b in dense.named_buffers()],
        "modules": [(name, id(m)) for name, m in dense.named_modules()],
        "children": [name for name, _ in dense.named_children()],
        "values": [value.clone() for value in dense.state_dict().values()],
    }
    net = nmfx.sparsify(dense, "2:4")
    assert net is dense
    assert list(net.state_dict()) == before["state"]
    assert [(name, id(p)) for name, p in net.named_parameters()] == before["parameters"]
    assert [(name, id(b)) for name, b in net.named_buffers()] == before["buffers"]
    assert [(name, id(m)) for name, m in net.named_modules()] == before["modules"]
    assert [name for name, _ in net.named_children()] == before["children"]
    for value, old in zip(net.state_dict().values(), before["values"], strict=True):
        assert torch.equal(value, old)


def test_isinstance_class_names_and_docs_hold(net: nn.Module) -> None:
    for module, cls in (
        (net.conv, nn.Conv1d),
        (net.attention, nn.MultiheadAttention),
        (net.fc, nn.Linear),
    ):
        assert isinstance(module, cls)
        assert type(module).__module__ == cls.__module__
        assert type(module).__doc__ == cls.__doc__
    assert type(net.head) is nn.Linear, "a skipped layer keeps its class"
    assert type(net.norm) is nn.BatchNorm1d


def test_unsparsify_leaves_nothing(dense: Net) -> None:
    def traces(net: nn.Module) -> list[Any]:
        return [(type(module), list(module.__dict__)) for module in net.modules()]

    before, values = traces(dense), copy.deepcopy(dense.state_dict())
    ids = [id(p) for p in dense.parameters()]
    nmfx.sparsify(dense, "2:4")
    assert traces(dense) != before
    assert nmfx.unsparsify(dense) is dense
    assert traces(dense) == before
    assert [id(p) for p in dense.parameters()] == ids
    for name, value in dense.state_dict().items():
        assert torch.equal(value, values[name])


def test_repr_shows_the_pattern(net: nn.Module) -> None:
    text = repr(net)
    assert "(fc): NMLinear(in_features=8, out_features=8, bias=False, 2:4 (keep 2 of every 4))" in (
        text
    )
    assert "(head): Linear(in_features=8, out_features=3, bias=True)" in text
    assert "in_proj_weight 2:4 (keep 2 of every 4)" in text
    nmfx.freeze(net)
    assert "2:4 (keep 2 of every 4) frozen" in repr(net.fc)
    assert "packed" in repr(nmfx.lower(net, tune=False).fc)


def test_sparsify_touches_no_global_state(dense: Net) -> None:
    def snapshot() -> list[Any]:
        return [
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            list(warnings.filters),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        ]

    before = snapshot()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = nmfx.sparsify(dense, "2:4")
        nmfx.report(net)
        nmfx.verify(net, X)
        nmfx.freeze(net)
        nmfx.unfreeze(net)
        nmfx.set_pattern(net, "1:4")
        nmfx.lower(net, (X,), tune=False)
        nmfx.unsparsify(nmfx.sparsify(nmfx.fold(net), "2:4"))
    assert not caught, [str(w.message) for w in caught]
    assert snapshot() == before


# --- modes, hooks, apply -----------------------------------------------------------------------


def test_training_flag_and_requires_grad_follow(dense: Net) -> None:
    dense.eval()
    dense.fc.weight.requires_grad_(False)
    net = nmfx.sparsify(dense, "2:4")
    assert not any(module.training for module in net.modules())
    assert not net.fc.weight.requires_grad
    net(X).sum().backward()
    assert net.fc.weight.grad is None
    assert net.conv.weight.grad is not None
    net.requires_grad_(False)
    assert not net(X).requires_grad
    net.train()
    assert all(module.training for module in net.modules())


def test_hooks_from_before_and_after_fire_in_order(dense: Net) -> None:
    log: list[str] = []

    def add(tag: str) -> None:
        dense.fc.register_forward_pre_hook(lambda *_: log.append(f"{tag} pre"))
        dense.fc.register_forward_hook(lambda *_: log.append(f"{tag} post"))
        dense.fc.register_full_backward_pre_hook(lambda *_: log.append(f"{tag} backward pre"))
        dense.fc.register_full_backward_hook(lambda *_: log.append(f"{tag} backward"))
        dense.fc.weight.register_hook(lambda _: log.append(f"{tag} weight"))

    add("old")
    nmfx.sparsify(dense, "2:4")
    add("new")
    dense(X).sum().backward()
    forward = ["old pre", "new pre", "old post", "new post"]
    assert log[:4] == forward
    assert log[4:6] == ["old backward pre", "new backward pre"]
    assert sorted(log[6:]) == ["new backward", "new weight", "old backward", "old weight"]
    assert log.index("old backward") < log.index("new backward")
    assert log.index("old weight") < log.index("new weight")


def test_hooks_change_inputs_and_outputs(net: nn.Module) -> None:
    before = net.eval()(X)
    handle = net.fc.register_forward_hook(lambda module, args, out: out * 0)
    zeroed = net(X)
    assert not torch.equal(zeroed, before)
    handle.remove()
    assert torch.equal(net(X), before)


def test_apply_and_reset_parameters_work(net: nn.Module, dense: Net) -> None:
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)

    net.apply(initialise)
    assert torch.equal(net.fc.weight, torch.full((8, 8), 0.5))
    mask = nmfx.masks(net)["fc.weight"]
    assert torch.equal(mask, torch.tensor([True, True, False, False] * 2).expand(8, 8))
    before = net.fc.weight.clone()
    net.fc.reset_parameters()
    assert not torch.equal(net.fc.weight, before)
    dense.load_state_dict(net.state_dict())
    assert_sparse(net, dense)


# --- state dicts -------------------------------------------------------------------------------


def test_state_dicts_go_from_and_to_the_dense_model(dense: Net, net: nn.Module) -> None:
    other = Net()
    assert net.load_state_dict(other.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    assert_sparse(net, other)
    dense.load_state_dict(net.state_dict())
    for name, value in dense.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_load_state_dict_assign_keeps_the_mask(net: nn.Module) -> None:
    other = Net()
    net.load_state_dict(other.state_dict(), assign=True)
    assert_sparse(net, other)


def test_state_dict_files_load_with_weights_only(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Net()
    other.load_state_dict(loaded)
    assert_sparse(net, other)


# --- copies ------------------------------------------------------------------------------------


def assert_independent(twin: nn.Module, net: nn.Module, dense: nn.Module) -> None:
    assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
    assert list(twin.state_dict()) == list(net.state_dict())
    assert_sparse(twin, dense)
    nmfx.set_pattern(twin, "1:4")
    nmfx.set_lambda(twin, 0.5)
    with torch.no_grad():
        twin.fc.weight.zero_()
    assert_sparse(net, dense)
    assert {row.lambda_w for row in nmfx.report(net) if row.pattern} == {2e-4}


def test_deepcopy_is_independent(net: nn.Module, dense: Net) -> None:
    assert_independent(copy.deepcopy(net), net, dense)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_is_independent(net: nn.Module, dense: Net, protocol: int) -> None:
    assert_independent(pickle.loads(pickle.dumps(net, protocol)), net, dense)


def test_torch_save_of_the_module_loads(net: nn.Module, dense: Net) -> None:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert_independent(torch.load(file, weights_only=False), net, dense)


def test_a_shallow_copy_shares_the_weights(net: nn.Module) -> None:
    twin = copy.copy(net.fc)
    assert type(twin) is type(net.fc)
    assert twin.weight is net.fc.weight
    x = torch.randn(2, 8)
    assert torch.equal(twin(x), net.fc(x))


@pytest.mark.parametrize("state", ["sparse", "frozen", "packed"])
def test_copies_keep_their_state(dense: Net, state: str) -> None:
    net = nmfx.sparsify(dense, "2:4").eval()
    if state == "frozen":
        nmfx.freeze(net)
        with torch.no_grad():
            net.fc.weight.neg_().add_(0.3)  # the fixed mask is no longer that of the weight
    if state == "packed":
        net = nmfx.lower(net, tune=False)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(X), net(X))
        assert [row.state for row in nmfx.report(twin)] == [row.state for row in nmfx.report(net)]
        assert state in {row.state for row in nmfx.report(twin)}
        assert str(nmfx.report(twin)) == str(nmfx.report(net)), "reasons are lost"


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_of_an_attached_layer_decay_inside_backward(duplicate: Any) -> None:
    layer = nmfx.sparsify(nn.Linear(8, 8), "2:4", lambda_w=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)  # kept: an attachment is weak
    nmfx.attach(layer, optimizer)
    twin = duplicate(layer)
    (row,) = nmfx.report(twin)
    assert (row.attached, row.lambda_w) == (False, 0.5)
    assert [c.tolist() for c in controls(twin)] == [[0.5, 2.0]]
    assert [c.tolist() for c in controls(layer)] == [[0.0, 2.0]]
    nmfx.set_pattern(twin, "1:4")
    assert nmfx.report(layer).rows[0].pattern == nmfx.Pattern(2, 4)


class Rebuilt(nn.Linear):
    """Its copies are new layers, which are dense."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin = type(self)(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin


class Shared(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self


class Copied(nn.Linear):
    """The usual pattern."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            setattr(twin, name, copy.deepcopy(value, memo))
        return twin


@pytest.mark.parametrize("kind", [Rebuilt, Shared])
def test_fold_and_lower_refuse_a_copy_that_is_none(kind: Any) -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), kind(8, 8), nn.Linear(8, 4)), "2:4")
    x = torch.randn(2, 8)
    wanted, classes = model(x), [type(m) for m in model.modules()]
    for name, verb in {"fold": nmfx.fold, "lower": nmfx.lower}.items():
        with pytest.raises(nmfx.NMError) as error:
            verb(model)
        assert str(error.value) == (
            f"nmfx.{name}: 1.weight is sparse, and the copy of the model has no such copy of it, "
            f"by the __deepcopy__ of {kind.__name__}; pass inplace=True, or drop that method"
        )
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), wanted)
    assert torch.equal(nmfx.fold(model, inplace=True)(x), wanted)


def test_a_layer_that_copies_itself_item_by_item_folds_and_is_not_attached() -> None:
    model = nmfx.sparsify(nn.Sequential(Copied(8, 8), nn.Linear(8, 4)), "2:4", lambda_w=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # kept: an attachment is weak
    nmfx.attach(model, optimizer)
    twin, x = copy.deepcopy(model), torch.randn(2, 8)
    assert [row.attached for row in nmfx.report(twin)] == [False, False]
    assert [c.tolist() for c in controls(twin[0])] == [[0.5, 2.0]]
    assert [c.tolist() for c in controls(model[0])] == [[0.0, 2.0]]
    assert [row.attached for row in nmfx.report(model)] == [True, False]
    nmfx.set_pattern(twin, "1:4")
    assert nmfx.report(model).rows[0].pattern == nmfx.Pattern(2, 4)
    assert torch.equal(nmfx.fold(model)(x), model(x))
    fast = nmfx.lower(nmfx.sparsify(nn.Sequential(Copied(8, 8)), {"0": "1:4"}), tune=False)
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))


class ReadsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.r = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.r(nn.functional.linear(x, self.q.weight) if hasattr(self.q, "weight") else x)


@pytest.mark.parametrize("verb", [copy.deepcopy, nmfx.fold, nmfx.unsparsify])
def test_a_parent_whose_child_was_exchanged_is_copied(verb: Any) -> None:
    model, x = nmfx.sparsify(ReadsChild(), {"r": "2:4", "*": "2:4"}), torch.randn(2, 8)
    model.q = nn.Identity()
    wanted = model(x)
    twin = verb(model)
    assert type(twin) is ReadsChild
    assert "_nmfx_sites" not in twin.__dict__
    if verb is not nmfx.unsparsify:
        assert torch.equal(twin(x), wanted)
        assert torch.equal(nmfx.fold(model, inplace=True)(x), wanted)


_LOADER = """
import sys, torch
torch.set_num_threads(1)
path = sys.argv[1]
net = torch.load(path + "/module.pt", weights_only=False)
import nmfx
x, expected = torch.load(path + "/expected.pt")
assert torch.equal(net(x), expected), "another output"
assert type(net[0]).__name__ == "NMConv1d"
assert type(net[3].self_attn).__name__ == "NMMultiheadAttention"
assert isinstance(net[0], torch.nn.Conv1d)
states = [row.state for row in nmfx.report(net)]
assert states == ["frozen"] + 3 * ["sparse"] + 2 * ["dense"], states
net(x).sum().backward()
nmfx.set_pattern(net, {"3*": "1:4"})
nmfx.unsparsify(net)
assert type(net[0]) is torch.nn.Conv1d
print("loaded")
"""


def test_a_saved_module_loads_in_a_fresh_process(tmp_path: Path) -> None:
    conv, attention = nn.Conv1d(4, 8, 3, padding=1), nn.TransformerEncoderLayer(8, 2, 16)
    net = nn.Sequential(conv, nn.Flatten(1), nn.Linear(40, 8), attention).eval()
    nmfx.sparsify(net, {"0": "2:4"})
    nmfx.freeze(net)
    nmfx.sparsify(net, {"3.self_attn*": "2:4", "2": "4:8"})
    torch.save(net, tmp_path / "module.pt")
    torch.save((X, net(X)), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LOADER, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "loaded\n", done.stderr


# --- conversions -------------------------------------------------------------------------------


def controls(net: nn.Module) -> list[Tensor]:
    return [
        value
        for module in net.modules()
        for key, value in module.__dict__.items()
        if key.startswith("_nmfx_control")
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_dtype_conversions_leave_schedule_and_masks_alone(
    net: nn.Module, dense: Net, dtype: torch.dtype, frozen: bool
) -> None:
    if frozen:
        nmfx.freeze(net)
    net.to(dtype)
    for control in controls(net):
        assert control.dtype == torch.float64
        assert control.tolist() == [2e-4, 2.0], "the control tensor was rounded"
    reference = masked(dense).to(dtype).eval() if frozen else masked(copy.deepcopy(dense).to(dtype))
    out = net.eval()(X.to(dtype))
    assert out.dtype == dtype
    assert torch.equal(out, reference.eval()(X.to(dtype)))
    net(X.to(dtype)).sum().backward()
    assert net.fc.weight.grad.dtype == dtype
    assert all(mask.dtype == torch.bool for mask in nmfx.masks(net).values())


def test_methods_named_after_dtypes_work(net: nn.Module, dense: Net) -> None:
    assert net.double() is net
    assert net.fc.weight.dtype == torch.float64
    assert net.type(torch.float32).fc.weight.dtype == torch.float32
    assert_sparse(net.float(), dense)
    assert net.half().bfloat16().fc.weight.dtype == torch.bfloat16


def test_meta_models_are_sparsified_and_materialised() -> None:
    with torch.device("meta"):
        net = nmfx.sparsify(Net(), "1:4", lambda_w=0.125)
    assert all(p.is_meta for p in net.parameters())
    assert [control.device.type for control in controls(net)] == ["cpu"] * 4
    assert net(X.to("meta")).shape == (2, 3)
    net.to_empty(device="cpu")
    assert [control.tolist() for control in controls(net)] == [[0.125, 1.0]] * 4
    other = Net()
    net.load_state_dict(other.state_dict())
    pattern_mask = nm_mask(other.fc.weight, 1, 4, 1)
    assert torch.equal(nmfx.masks(net)["fc.weight"], pattern_mask)


def test_a_model_that_visits_the_meta_device_keeps_its_schedule(net: nn.Module, dense: Net) -> None:
    net.to("meta").to_empty(device="cpu")
    net.load_state_dict(dense.state_dict())
    assert [control.tolist() for control in controls(net)] == [[2e-4, 2.0]] * 4
    assert_sparse(net, dense)


def test_share_memory_shares_the_weights(net: nn.Module, dense: Net) -> None:
    net.share_memory()
    assert net.fc.weight.is_shared()
    assert_sparse(net, dense)


def test_inference_mode_calls_leave_a_trainable_model(dense: Net) -> None:
    with torch.inference_mode():
        nmfx.sparsify(dense, "2:4")
    dense(X).sum().backward()
    with torch.inference_mode():
        nmfx.set_lambda(dense, 0.1)
        nmfx.set_pattern(dense, "1:4")
        dense(X)
    dense(X).sum().backward()
    with torch.inference_mode():
        nmfx.freeze(dense)
    dense(X).sum().backward()


# --- other people's wrappers -------------------------------------------------------------------


def test_averaged_model_averages_and_is_sparse(net: nn.Module, dense: Net) -> None:
    average = AveragedModel(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    average.update_parameters(net)
    average.update_parameters(net)
    assert list(average.module.state_dict()) == list(dense.state_dict())
    with torch.no_grad():
        for parameter, old in zip(average.module.parameters(), dense.parameters(), strict=True):
            old.copy_(parameter)
    assert_sparse(average.module, dense)


def test_ddp_trains_a_sparsified_model(net: nn.Module, dense: Net, tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        wrapped(X).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    alone = nmfx.sparsify(dense, "2:4")
    alone(X).square().sum().backward()
    for (name, a), b in zip(net.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("plain", [False, True])
def test_replicas_of_data_parallel_see_masked_weights(plain: bool) -> None:
    dense = nn.MultiheadAttention(8, 2)
    attention, x = nmfx.sparsify(copy.deepcopy(dense), "2:4"), torch.randn(3, 2, 8)
    replica = attention._replicate_for_data_parallel()
    for name, parameter in attention.named_parameters(recurse=False):
        # DataParallel sets the broadcast copies as plain attributes, not as parameters.
        setattr(replica, name, parameter.detach().clone() if plain else parameter)
    expected = masked(dense, ())(x, x, x)[0]
    assert torch.equal(replica(x, x, x)[0], expected)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_parametrization_added_later_is_masked(net: nn.Module) -> None:
    parametrize.register_parametrization(net.fc, "weight", Double())
    x = torch.randn(2, 8)
    raw = net.fc.parametrizations.weight.original
    weight = torch.where(nm_mask(raw, 2, 4, 1), raw * 2, 0.0)
    assert torch.equal(net.fc(x), x @ weight.t())
    nmfx.set_lambda(net, 0.5)
    assert nmfx.masks(net)["fc.weight"].shape == (8, 8)


@pytest.mark.parametrize(
    "verb",
    [
        nmfx.unsparsify,
        nmfx.fold,
        nmfx.lower,
        nmfx.freeze,
        nmfx.unfreeze,
        lambda net: nmfx.set_pattern(net, "1:2"),
    ],
    ids=["unsparsify", "fold", "lower", "freeze", "unfreeze", "set_pattern"],
)
def test_verbs_refuse_a_class_that_somebody_else_changed(net: nn.Module, verb: Any) -> None:
    parametrize.register_parametrization(net.fc, "weight", Double())
    before = [(type(m), sorted(m.__dict__)) for m in net.modules()]
    with pytest.raises(nmfx.NMError) as error:
        verb(net)
    assert str(error.value) == (
        "fc: its class became ParametrizedNMLinear after it was sparsified; undo that first"
    )
    assert [(type(m), sorted(m.__dict__)) for m in net.modules()] == before
    assert {row.state for row in nmfx.report(net) if row.pattern} == {"sparse"}
    parametrize.remove_parametrizations(net.fc, "weight")
    nmfx.unsparsify(net)
    assert type(net.fc) is nn.Linear


COMPUTED = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "prune": (
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        lambda layer: prune.remove(layer, "weight"),
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("what", COMPUTED)
def test_verbs_refuse_a_weight_that_is_computed_since(
    net: nn.Module, what: str, tmp_path: Path
) -> None:
    """Else `fold` would write to what the next forward computes anew."""
    put, take = COMPUTED[what]
    put(net.fc)
    net.eval()
    before, states = net(X), [(type(m), sorted(m.__dict__)) for m in net.modules()]
    verbs = {
        "fold": nmfx.fold,
        "fold in place": lambda net: nmfx.fold(net, inplace=True),
        "lower": lambda net: nmfx.lower(net, tune=False),
        "save": lambda net: nmfx.save(net, tmp_path / "model.safetensors"),
        "unsparsify": nmfx.unsparsify,
        "freeze": nmfx.freeze,
    }
    for name, verb in verbs.items():
        with pytest.raises(nmfx.NMError) as error:
            verb(net)
        text = str(error.value)
        start = "fc.weight: since it was sparsified, its weight is computed by torch.nn.utils."
        assert text.startswith(start + what), (name, text)
    assert {row.fqn: row.reason for row in nmfx.report(net)}["fc.weight"] in text
    assert [(type(m), sorted(m.__dict__)) for m in net.modules()] == states
    assert torch.equal(net(X), before)
    assert not list(tmp_path.iterdir())
    take(net.fc)
    wanted = net(X)
    assert torch.equal(nmfx.fold(net)(X), wanted)


def without_child(attention: nn.Module) -> None:
    del attention.out_proj


def with_another_child(attention: nn.Module) -> None:
    attention.out_proj = nn.Identity()


def with_none(attention: nn.Module) -> None:
    attention.out_proj = None


def without_weight(attention: nn.Module) -> None:
    attention.out_proj._parameters["weight"] = None


@pytest.mark.parametrize("take", [without_child, with_another_child, with_none, without_weight])
def test_verbs_refuse_a_layer_whose_weight_is_gone(
    take: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    attention = nmfx.sparsify(nn.MultiheadAttention(8, 2), {"": "2:4", "out_proj": "2:4"})
    take(attention)
    verbs: dict[str, Callable[[nn.Module], object]] = {
        "masks": nmfx.masks,
        "freeze": nmfx.freeze,
        "set_pattern": lambda net: nmfx.set_pattern(net, "1:4"),
        "verify": lambda net: nmfx.verify(net, X, X, X),
        "fold": nmfx.fold,
        "lower": lambda net: nmfx.lower(net, tune=False),
        "save": lambda net: nmfx.save(net, tmp_path / "model.safetensors"),
        "preview": lambda net: nmfx.preview(net, "2:4"),
        "unsparsify": nmfx.unsparsify,
    }
    for name, verb in verbs.items():
        with pytest.raises(nmfx.NMError) as error:
            verb(attention)
        text = "out_proj.weight: its weight is gone since it was sparsified; give the layer a"
        assert str(error.value).startswith(text), (name, error.value)
    rows = {row.fqn: row for row in nmfx.report(attention)}
    assert "is gone" in rows["out_proj.weight"].reason
    assert rows["in_proj_weight"].state == "sparse"


def test_an_attention_without_its_projection_is_reported() -> None:
    attention = nn.MultiheadAttention(8, 2)
    without_child(attention)
    rows = {row.fqn: row.reason for row in nmfx.report(attention)}
    assert rows == {"in_proj_weight": "not sparsified", "out_proj.weight": "it has no weight"}


# torch itself warns that torch.jit is deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of torch's own nn.LSTM
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "lstm"])
def test_torch_jit_trace_records_the_masks(kind: str, grad: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    layers = {
        "linear": (nn.Linear(8, 8), torch.randn(2, 3, 8)),
        "conv": (nn.Conv2d(8, 8, 3), torch.randn(2, 8, 5, 5)),
        "lstm": (nn.LSTM(8, 8), torch.randn(3, 2, 8)),
    }
    layer, x = layers[kind]
    model = nmfx.sparsify(nn.Sequential(layer), {"0": "2:4"})
    if frozen:
        nmfx.freeze(model)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (x,))

    def run(net: Any) -> tuple[Tensor, list[Tensor]]:
        found = net(x)
        found = found[0] if isinstance(found, tuple) else found
        return found, list(torch.autograd.grad(found.square().sum(), list(model.parameters())))

    for mine, its in zip(run(model)[1], run(traced)[1], strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(run(model)[0], run(traced)[0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_weight_of_another_kind_is_refused_before_any_is_pruned(
    frozen: bool, inplace: bool
) -> None:
    model = nmfx.sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(16, 16)), {"[01]": "2:4"})
    if frozen:
        nmfx.freeze(model)
        model[1].weight = nn.Parameter(torch.randn(32, 32))
    else:
        model[1].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    before = model[0].weight.detach().clone()
    for verb in (nmfx.fold, nmfx.lower):
        with pytest.raises(nmfx.NMError, match=r"^1\.weight: it was replaced since "):
            verb(model, inplace=inplace)
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", ["weight_values", "weight_index"])
def test_packed_tensors_that_are_gone_or_cut_are_refused(name: str) -> None:
    x = torch.randn(2, 16)
    for change in (lambda t: None, lambda t: t[:-1].clone()):
        model = nmfx.sparsify(nn.Sequential(nn.Linear(16, 16)), {"0": "2:4"})
        fast = nmfx.lower(model, (x,), tune=False)
        fast[0]._buffers[name] = change(fast[0]._buffers[name])
        with pytest.raises(nmfx.NMError, match=r"^0\.weight: "):
            nmfx.fold(fast)
