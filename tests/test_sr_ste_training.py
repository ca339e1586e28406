"""sr_ste inside models, in eager mode: schedules, autocast, checkpointing, reuse, memory."""

from __future__ import annotations

import pytest
import torch
from saved_tensors import saved_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nmfx
from nmfx.capture.refs import iter_sites
from nmfx.capture.site import mask_name
from nmfx.mask import nm_mask, nm_project

RULES = {"0": "2:4", "2": "2:4"}


def dense() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def sparse(lambda_w: float = 0.25) -> nn.Sequential:
    return nmfx.sparsify(dense(), RULES, lambda_w=lambda_w)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def decay_over_weight(model: nn.Module, grads: dict[str, Tensor], plain: dict[str, Tensor]) -> dict:
    """What each pruned weight got on top of `plain`, over that weight: lambda, if all is well.

    Asserts that nothing else got anything on top.
    """
    masks, found = nmfx.masks(model), {}
    for name, parameter in model.named_parameters():
        extra = grads[name] - plain[name]
        if name in masks:
            pruned, weight = extra[~masks[name]], parameter.detach()[~masks[name]]
            found[name] = round(float((pruned / weight).median()), 4)
            torch.testing.assert_close(pruned, found[name] * weight)
            extra = extra[masks[name]]
        assert not extra.any(), f"{name}: {extra}"
    return found


def test_model_gradient_is_that_of_the_masked_model_plus_decay() -> None:
    model, x = sparse(0.25), torch.randn(5, 16)
    reference = dense()
    with torch.no_grad():
        for i in (0, 2):
            reference[i].weight.copy_(nm_project(reference[i].weight, "2:4", 1))
    plain = gradients(reference, reference(x).square().sum())
    grads = gradients(model, model(x).square().sum())
    for name, parameter in model.named_parameters():
        expected = plain[name]
        if name.endswith("weight"):
            pruned = parameter.detach().masked_fill(nm_mask(parameter, "2:4", 1), 0.0)
            expected = expected + 0.25 * pruned
        assert torch.equal(grads[name], expected), f"{name}: {grads[name]} != {expected}"


def test_backward_uses_the_lambda_of_its_forward() -> None:
    model, x = sparse(0.25), torch.randn(5, 16)
    twin = sparse(0.0)
    plain = gradients(twin, twin(x).sum())
    out = model(x)
    nmfx.set_lambda(model, 0.5)
    after = model(x)
    first, second = gradients(model, out.sum()), gradients(model, after.sum())
    assert set(decay_over_weight(model, first, plain).values()) == {0.25}
    assert set(decay_over_weight(model, second, plain).values()) == {0.5}


@pytest.mark.parametrize("new", ["1:4", "3:4", "2:8"])
def test_backward_uses_the_pattern_of_its_forward(new: str) -> None:
    model, x = sparse(0.25), torch.randn(5, 16)
    expected = gradients(model, model(x).sum())
    out = model(x)
    nmfx.set_pattern(model, new)
    actual = gradients(model, out.sum())
    for name, want in expected.items():
        assert torch.equal(actual[name], want), f"{name} after set_pattern({new})"
    changed = gradients(model, model(x).sum())
    assert not torch.equal(changed["0.weight"], expected["0.weight"]), "set_pattern did nothing"


def test_a_freeze_between_forward_and_backward_leaves_the_backward_alone() -> None:
    model, x = sparse(0.25), torch.randn(5, 16)
    expected = gradients(model, model(x).sum())
    out = model(x)
    nmfx.freeze(model)
    actual = gradients(model, out.sum())
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_decay_is_the_same_in_train_and_eval_mode(mode: str) -> None:
    model, twin, x = sparse(0.25), sparse(0.0), torch.randn(5, 16)
    getattr(model, mode)()
    plain = gradients(twin, twin(x).sum())
    found = decay_over_weight(model, gradients(model, model(x).sum()), plain)
    assert found == {"0.weight": 0.25, "2.weight": 0.25}, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_masks_in_float32_and_multiplies_in_half(dtype: torch.dtype) -> None:
    model, reference, x = sparse(0.25), dense(), torch.randn(5, 16)
    with torch.no_grad():
        for i in (0, 2):
            reference[i].weight.copy_(nm_project(reference[i].weight, "2:4", 1))
    with torch.autocast("cpu", dtype=dtype):
        out, wanted = model(x), reference(x)
        assert out.dtype == dtype, out.dtype
        assert torch.equal(out, wanted), f"{out} != {wanted}"
        grads, plain = gradients(model, out.sum()), gradients(reference, wanted.sum())
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    found = decay_over_weight(model, grads, plain)
    assert found == {"0.weight": 0.25, "2.weight": 0.25}, found


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    model, x = sparse(0.25), torch.randn(5, 16)

    def backward(run: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        run(inputs).square().sum().backward()
        return {"input": inputs.grad, **{n: p.grad for n, p in model.named_parameters()}}

    wanted = backward(model)
    actual = backward(lambda t: checkpoint(model, t, use_reentrant=use_reentrant))
    for name, want in wanted.items():
        assert torch.equal(actual[name], want), name


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


def test_a_module_called_twice_decays_twice_inside_backward() -> None:
    model, x = nmfx.sparsify(Twice(), "2:4", lambda_w=0.25), torch.randn(5, 16)
    grads = gradients(model, model(x).sum())
    nmfx.set_lambda(model, 0.0)
    plain = gradients(model, model(x).sum())
    mask = nmfx.masks(model)["fc.weight"]
    expected = plain["fc.weight"] + 0.5 * model.fc.weight.detach().masked_fill(mask, 0.0)
    torch.testing.assert_close(grads["fc.weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_layers_give_pruned_weights_exactly_nothing(dtype: torch.dtype) -> None:
    model, twin = sparse(0.25).to(dtype), sparse(0.0).to(dtype)
    x = torch.randn(5, 16).to(dtype)
    plain = gradients(twin, twin(x).sum())
    wanted = model(x)
    nmfx.freeze(model)
    out = model(x)
    assert torch.equal(out, wanted), "freezing changed the output"
    grads = gradients(model, out.sum())
    for name, mask in nmfx.masks(model).items():
        assert not grads[name][~mask].any(), f"{name}: {grads[name][~mask]}"
        assert torch.equal(grads[name][mask], plain[name][mask]), name
    assert torch.equal(grads["0.bias"], plain["0.bias"])


def test_frozen_layers_pass_a_nan_gradient_to_kept_weights_only() -> None:
    model = nmfx.sparsify(nn.Linear(8, 2), "2:4")
    nmfx.freeze(model)
    (model(torch.randn(1, 8)) * float("nan")).sum().backward()
    mask = nmfx.masks(model)["weight"]
    assert model.weight.grad[mask].isnan().all()
    assert not model.weight.grad[~mask].any(), model.weight.grad


def test_eager_saves_no_more_than_a_dense_model() -> None:
    x = torch.randn(5, 16)
    plain, model = dense(), sparse()
    extra = saved_bytes(model, x) - saved_bytes(plain, x)
    assert extra == 2 * 16, f"{extra} bytes"  # the float64 [lambda, N] of each layer


def test_frozen_eager_saves_no_more_than_a_dense_model() -> None:
    x = torch.randn(5, 16)
    plain, model = dense(), sparse()
    nmfx.freeze(model)
    # The masks belong to the layers; a forward does not copy them.
    masks = tuple(ref.store.__dict__[mask_name(ref.index)] for ref in iter_sites(model))
    extra = saved_bytes(model, x, ignore=masks) - saved_bytes(plain, x)
    assert extra == 0, f"{extra} bytes"
