"""Every model of the zoo computes what an ordinary dense model with masked weights computes."""

from __future__ import annotations

import pytest
import torch
from masked_reference import Expected, eligible, expected, nm_mask, sites
from torch import Tensor, nn
from zoo import ZOO, build, call, outputs, probe_loss
from zoo_entry import HEAD

import nmfx

# A power of two: lambda * w is then exact, g + lambda * w is rounded once in any order of
# operations, and gradients can be compared bit for bit. Large enough to show beside any g here.
LAMBDA = 2.0**-6

# Where a raw read is expected the masked model is no reference: it has no raw weight.
MASKED_ONLY = [name for name in ZOO if not ZOO[name].findings]

# 1:4 keeps a different number, 4:8 changes the group; one model per kind of layer and capture.
OTHER_PATTERNS = [
    (name, pattern)
    for name in ("hf_gpt2", "hf_llama", "resnet50", "unet", "encoder", "cross_attention", "twice")
    for pattern in ((1, 4), (4, 8))
]

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def sparse_names(name: str, m: int = 4) -> set[str]:
    """The parameters that must be masked: all eligible ones except what the entry lists."""
    model, _ = build(name)
    names = eligible(model, m) | set(ZOO[name].functional)
    return names - ZOO[name].skipped.keys()


def reference(name: str, pattern: tuple[int, int], *, train: bool = False) -> Expected:
    model, inputs = build(name)
    names = sparse_names(name, pattern[1])
    torch.manual_seed(0)
    return expected(model, inputs, names, pattern, LAMBDA, ZOO[name].functional, train)


def assert_same(actual: list[Tensor], wanted: list[Tensor], what: str) -> None:
    """Bit equality, with the size of the difference in the message."""
    for got, want in zip(actual, wanted, strict=True):
        gap = (got.detach() - want).abs().max()
        assert torch.equal(got, want), f"{what}: differs by up to {gap:.3g}"


def assert_gradients(model: nn.Module, wanted: Expected) -> None:
    for fqn, parameter in model.named_parameters():
        grad, want = parameter.grad, wanted.grads[fqn]
        if want is None:
            assert grad is None, f"{fqn}: has a gradient, the dense model gives it none"
        elif wanted.uses.get(fqn, 1) == 1:
            assert grad is not None, f"{fqn}: has no gradient"
            assert_same([grad], [want], f"gradient of {fqn}")
        else:  # the sum over several uses depends on its order
            torch.testing.assert_close(grad, want, msg=lambda text, at=fqn: f"{at}: {text}")


def assert_equals_reference(name: str, pattern: tuple[int, int], *, train: bool) -> None:
    wanted = reference(name, pattern, train=train)
    for fqn, decay in wanted.decays.items():
        assert decay.abs().max() > 1e-4, f"{fqn}: the SR-STE term is too small to be tested"
    model, inputs = build(name)
    nmfx.sparsify(model, pattern, lambda_w=LAMBDA).train(train)
    torch.manual_seed(0)
    result = call(model, inputs)
    assert_same(outputs(result), wanted.outputs, "output")
    probe_loss(result).backward()
    assert_gradients(model, wanted)


def test_reference_mask_keeps_the_larger_and_the_earlier() -> None:
    weight = torch.tensor([[1.0, -2.0, 2.0, 0.5, 3.0, -3.0, 3.0, -3.0]])
    assert nm_mask(weight, 2, 4, 1).nonzero()[:, 1].tolist() == [1, 2, 4, 5]
    assert nm_mask(weight.t(), 1, 4, 0).t().nonzero()[:, 1].tolist() == [1, 4]


def test_reference_equals_a_hand_written_masked_linear() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = nm_mask(self.weight, 2, 4, 1)
            passed = self.weight + (self.weight * kept - self.weight).detach()  # straight through
            once = nn.functional.linear(x, passed, self.bias)
            return nn.functional.linear(once.relu(), passed, self.bias)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x).relu())

    plain, x = Plain(), torch.randn(3, 8)
    masked = Masked()
    masked.weight = nn.Parameter(plain.inner.weight.detach().clone())
    masked.bias = nn.Parameter(plain.inner.bias.detach().clone())
    out = masked(x)
    probe_loss(out).backward()
    kept = nm_mask(masked.weight, 2, 4, 1)
    by_hand = masked.weight.grad + 2 * LAMBDA * torch.where(kept, 0.0, masked.weight.detach())

    got = expected(plain, (x,), ["inner.weight"], (2, 4), LAMBDA)
    torch.testing.assert_close(got.outputs[0], out.detach())
    torch.testing.assert_close(got.grads["inner.weight"], by_hand)
    assert got.uses == {"inner.weight": 2}, got.uses


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MASKED_ONLY)
def test_zoo_output_and_gradients_equal_the_masked_model(name: str, train: bool) -> None:
    # Dropout draws the same numbers on both sides: nmfx consumes none.
    assert_equals_reference(name, (2, 4), train=train)


@pytest.mark.parametrize(
    ("name", "pattern"), OTHER_PATTERNS, ids=[f"{x}-{n}:{m}" for x, (n, m) in OTHER_PATTERNS]
)
def test_zoo_other_patterns_equal_the_masked_model(name: str, pattern: tuple[int, int]) -> None:
    assert_equals_reference(name, pattern, train=False)


@pytest.mark.parametrize("name", MASKED_ONLY)
def test_zoo_inference_equals_the_masked_model(name: str) -> None:
    # Without gradients torch's attention takes fast paths of its own, which read raw weights.
    wanted = reference(name, (2, 4)).outputs
    model, inputs = build(name)
    nmfx.sparsify(model, "2:4")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = outputs(call(model, inputs))
        for got, want in zip(result, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_sparsifies_exactly_the_expected_weights(name: str) -> None:
    entry, (model, _) = ZOO[name], build(name)
    every = sites(model, entry.functional)
    names = sparse_names(name)
    assert names == every.keys() - entry.skipped.keys(), "the entry's list of skips is wrong"
    nmfx.sparsify(model, "2:4")

    masks = nmfx.masks(model)
    assert masks.keys() == names, f"unexpected: {sorted(masks.keys() ^ names)}"
    for fqn, mask in masks.items():
        want = nm_mask(model.get_parameter(fqn), 2, 4, every[fqn].dim)
        assert torch.equal(mask, want), f"{fqn}: {int((mask != want).sum())} mask entries differ"
    rows = {row.fqn: row for row in nmfx.report(model).rows}
    assert {fqn for fqn, row in rows.items() if row.state == "sparse"} == names
    for fqn, fragment in entry.skipped.items():
        assert rows[fqn].state == "dense", f"{fqn}: {rows[fqn].state}"
        assert fragment in rows[fqn].reason, f"{fqn}: {fragment!r} not in {rows[fqn].reason!r}"


@pytest.mark.parametrize("name", ZOO)
def test_zoo_sparsifies_95_percent_of_the_eligible_weights(name: str) -> None:
    model, _ = build(name)
    heads = {fqn for fqn, reason in ZOO[name].skipped.items() if reason == HEAD}
    able = (eligible(model, 4) | ZOO[name].functional.keys()) - heads
    nmfx.sparsify(model, "2:4")
    share = len(nmfx.masks(model).keys() & able) / len(able)
    assert share >= 0.95, f"{share:.1%} of {len(able)} eligible weights are sparse"


@pytest.mark.parametrize("name", ZOO)
def test_zoo_verify_finds_only_what_the_entry_lists(name: str) -> None:
    model, inputs = build(name)
    nmfx.sparsify(model, "2:4")
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    found = nmfx.verify(model, *args, **kwargs)
    assert dict(found) == ZOO[name].findings, f"raw reads: {dict(found)}"
    with torch.no_grad():
        found = nmfx.verify(model, *args, **kwargs)
    assert dict(found) == ZOO[name].findings, f"raw reads without gradients: {dict(found)}"
