"""fold: a vanilla dense model with exact zeros, equal to the sparsified one bit for bit."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_reference import nm_mask, sites
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nmfx


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Net(nn.Module):
    """Every kind of capture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.gpt = Conv1D(8, 8)
        self.branch = Branches(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.up(self.conv(x))).transpose(1, 2).contiguous()
        h = self.encoder(self.branch(self.gpt(self.drop(h))))
        return self.head(self.fc(h))


X = torch.linspace(-2, 2, 2 * 4 * 5).reshape(2, 4, 5).sin()
MASKED = {
    "conv.weight",
    "up.weight",
    "gpt.weight",
    "branch.weight",
    "encoder.self_attn.in_proj_weight",
    "encoder.self_attn.out_proj.weight",
    "encoder.linear1.weight",
    "encoder.linear2.weight",
    "fc.weight",
}


def sparse(pattern: str = "2:4") -> nn.Module:
    return nmfx.sparsify(Net(), pattern)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "4:4"])
@pytest.mark.parametrize("inplace", [False, True])
def test_folded_equals_sparsified_bit_for_bit_in_eval(pattern: str, inplace: bool) -> None:
    model = sparse(pattern).eval()
    expected = model(X)
    folded = nmfx.fold(model, inplace=inplace)
    assert (folded is model) is inplace
    assert torch.equal(folded(X), expected)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_every_site_has_exact_zeros_and_untouched_kept_weights(pattern: str) -> None:
    model = sparse(pattern)
    n, m = map(int, pattern.split(":"))
    folded = nmfx.fold(model)
    assert set(nmfx.masks(model)) == MASKED
    for name, site in sites(model).items():
        if name not in MASKED:
            continue
        raw, weight = model.get_parameter(name), folded.get_parameter(name)
        kept = nm_mask(raw, n, m, site.dim)
        assert nmfx.is_nm(weight, pattern, site.dim), name
        assert torch.equal(weight[kept], raw[kept]), name
        assert not weight[~kept].any(), name
        assert not torch.signbit(weight[~kept]).any(), f"{name}: -0.0 in a pruned place"
    for name, parameter in folded.named_parameters():
        if name not in MASKED:
            assert torch.equal(parameter, model.get_parameter(name)), name


def test_odd_values_survive_and_minus_zero_is_pruned_to_plus_zero() -> None:
    layer = nn.Linear(8, 1, bias=False)
    nan, inf = float("nan"), float("inf")
    values = [nan, -3.0, inf, 1.0, -0.0, 1e-45, -0.0, -0.0]
    layer.weight.data = torch.tensor([values])
    payload = layer.weight.data.view(torch.int32)
    payload[0, 0] = 0x7FC0_1234
    folded = nmfx.fold(nmfx.sparsify(layer, "2:4"))
    bits = folded.weight.data.view(torch.int32)[0].tolist()
    minus_zero, denormal = -(1 << 31), 1
    assert bits == [0x7FC0_1234, 0, 0x7F80_0000, 0, minus_zero, denormal, 0, 0]


@pytest.mark.parametrize("inplace", [False, True])
def test_folded_model_is_vanilla(inplace: bool) -> None:
    dense = Net()
    classes = [type(m) for m in dense.modules()]
    keys = [sorted(m.__dict__) for m in dense.modules()]
    names = list(dense.state_dict())
    folded = nmfx.fold(nmfx.sparsify(dense, "2:4"), inplace=inplace)
    assert [type(m) for m in folded.modules()] == classes
    assert [sorted(m.__dict__) for m in folded.modules()] == keys
    assert list(folded.state_dict()) == names
    assert "keep" not in repr(folded)


_VANILLA = """
import sys, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nmfx":
            raise AssertionError("nmfx is imported")
sys.meta_path.insert(0, Refuse())
model, x, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(x), expected)
print("vanilla")
"""


def test_a_folded_model_loads_without_nmfx(tmp_path: Path) -> None:
    layers = nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 8)
    folded = nmfx.fold(nmfx.sparsify(nn.Sequential(*layers), "2:4"))
    torch.save((folded, X, folded(X)), tmp_path / "folded.pt")
    done = subprocess.run(
        [sys.executable, "-c", _VANILLA, str(tmp_path / "folded.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "vanilla\n", done.stderr


def test_a_copy_leaves_the_sparsified_model_alone() -> None:
    model = sparse()
    state = copy.deepcopy(model.state_dict())
    report = str(nmfx.report(model))
    folded = nmfx.fold(model)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert str(nmfx.report(model)) == report


def test_inplace_keeps_parameters_and_optimizer() -> None:
    model = sparse()
    ids = [id(p) for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmfx.fold(model, inplace=True)
    assert [id(p) for p in model.parameters()] == ids
    assert [p.data_ptr() for p in model.parameters()] == pointers, "the memory is not reused"
    before = model.fc.weight.clone()
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.fc.weight, before)


def test_a_frozen_model_folds_with_its_fixed_masks() -> None:
    model = sparse().eval()
    nmfx.freeze(model)
    masks = nmfx.masks(model)
    with torch.no_grad():
        for name in MASKED:
            weight = model.get_parameter(name)
            weight.copy_(torch.where(masks[name], weight, 100.0))
    expected = model(X)
    folded = nmfx.fold(model)
    assert torch.equal(folded(X), expected)
    for name, site in sites(folded).items():
        if name in MASKED:
            assert nmfx.is_nm(folded.get_parameter(name), "2:4", site.dim)
            assert not folded.get_parameter(name)[~masks[name]].any()


def test_an_attached_model_folds() -> None:
    model = sparse()
    handle = nmfx.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert nmfx.is_nm(nmfx.fold(model).fc.weight, "2:4", 1)
    nmfx.fold(model, inplace=True)
    assert handle.parameters == []
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_fold(dtype: torch.dtype) -> None:
    model = sparse().to(dtype).eval()
    expected = model(X.to(dtype))
    folded = nmfx.fold(model)
    assert torch.equal(folded(X.to(dtype)), expected)
    assert folded.fc.weight.dtype == dtype


def test_memory_formats_and_strides_fold() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)).to(
        memory_format=torch.channels_last
    )
    nmfx.sparsify(model, "2:4")
    x = torch.randn(2, 8, 5, 5)
    expected, folded = model(x), nmfx.fold(model)
    assert folded[0].weight.stride() == model[0].weight.stride()
    assert torch.equal(folded(x), expected)


def test_hooks_and_modes_survive() -> None:
    model = sparse().train()
    model.drop.eval()
    calls: list[str] = []
    model.fc.register_forward_hook(lambda *_: calls.append("hook"))
    folded = nmfx.fold(model, inplace=True)
    assert folded.training
    assert not folded.drop.training
    folded(X)
    assert calls == ["hook"]


def test_folding_twice_is_an_error_and_folding_again_after_sparsify_is_not() -> None:
    folded = nmfx.fold(sparse())
    with pytest.raises(nmfx.NMError, match="has no sparsified layer"):
        nmfx.fold(folded)
    again = nmfx.fold(nmfx.sparsify(copy.deepcopy(folded), "2:4"))
    for (name, a), b in zip(again.named_parameters(), folded.parameters(), strict=True):
        assert torch.equal(a, b), f"{name}: folding a folded model changed it"


def test_a_folded_model_exports_as_an_ordinary_one() -> None:
    folded = nmfx.fold(nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "2:4"))
    program = torch.export.export(folded, (torch.randn(2, 8),))
    targets: list[Any] = [str(node.target) for node in program.graph.nodes]
    assert not any("nmfx" in target for target in targets), targets


def test_partly_sparsified_models_fold_what_is_sparsified() -> None:
    model = nmfx.sparsify(Net(), {"fc": "1:4", "conv": "2:4"})
    raw = copy.deepcopy(model.state_dict())
    folded = nmfx.fold(model)
    changed = {
        name for name, value in folded.state_dict().items() if not torch.equal(value, raw[name])
    }
    assert changed == {"fc.weight", "conv.weight"}


VERBS = {
    "fold": nmfx.fold,
    "lower": lambda model, **options: nmfx.lower(model, tune=False, **options),
}
READING_VERBS = {
    "masks": nmfx.masks,
    "freeze": nmfx.freeze,
    "verify": lambda model: nmfx.verify(model, torch.randn(2, 8)),
    "Monitor": nmfx.Monitor,
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_a_replaced_weight_that_m_does_not_divide_is_named(verb: str, inplace: bool) -> None:
    model = sparse()
    model.fc.weight = nn.Parameter(torch.randn(8, 6))
    raw = copy.deepcopy(model.state_dict())
    with pytest.raises(nmfx.NMError) as error:
        VERBS[verb](model, inplace=inplace)
    assert str(error.value) == (
        "fc.weight: it was replaced since it was sparsified, and its dimension 1 of 6 is not a "
        "multiple of 4; give it (8, 8) again"
    )
    assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    assert {row.state for row in nmfx.report(model) if row.pattern} == {"sparse"}


@pytest.mark.parametrize("verb", READING_VERBS)
def test_what_reads_masks_names_it_too(verb: str) -> None:
    model = sparse()
    monitor = nmfx.Monitor(model, every=1)
    model.fc.weight = nn.Parameter(torch.randn(8, 6))
    for act in (lambda: READING_VERBS[verb](model), monitor.step):
        with pytest.raises(nmfx.NMError, match=r"^fc\.weight: it was replaced since"):
            act()
    assert {row.state for row in nmfx.report(model) if row.pattern} == {"sparse"}


@pytest.mark.parametrize("verb", sorted(READING_VERBS.keys() - {"masks", "freeze"}))
def test_a_weight_that_does_not_fit_its_fixed_mask_is_named(verb: str) -> None:
    model = sparse()
    monitor = nmfx.Monitor(model, every=1)
    nmfx.freeze(model)
    model.fc.weight = nn.Parameter(torch.randn(8, 4))
    for act in (lambda: READING_VERBS[verb](model), monitor.step):
        with pytest.raises(nmfx.NMError, match=r"^fc\.weight: it was replaced since its mask"):
            act()


@pytest.mark.parametrize("verb", VERBS)
def test_a_script_module_beside_it_is_left_alone(verb: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.script = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.script(self.fc(x))

    model, x = nmfx.sparsify(Mixed(), {"fc": "2:4"}), torch.randn(2, 8)
    wanted = model(x).detach()
    torch.testing.assert_close(VERBS[verb](model, inplace=True)(x), wanted)


@pytest.mark.parametrize("verb", VERBS)
def test_inference_tensors_are_not_written_to(verb: str) -> None:
    with torch.inference_mode():
        model = nmfx.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "2:4")
    x = torch.randn(2, 8)
    with torch.no_grad():
        wanted = model(x)
    with pytest.raises(nmfx.NMError, match=r"^0\.weight: it was made under torch\.inference_mode"):
        VERBS[verb](model, inplace=True)
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
        torch.testing.assert_close(VERBS[verb](model)(x), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(VERBS[verb](model, inplace=True)(x), wanted)
