"""sr_ste under torch.func: grad, vmap, jvp, Jacobians, per-sample gradients, ensembles."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from strategies import DTYPES
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import nmfx
from nmfx.mask import nm_mask, nm_project
from nmfx.ops.sr_ste import make_control, sr_ste

LAMBDA = 0.25


def project(weight: Tensor, lambda_w: float = LAMBDA) -> Tensor:
    return sr_ste(weight, make_control(lambda_w, 2), 4, -1)


def loss(weight: Tensor, x: Tensor, lambda_w: float = LAMBDA) -> Tensor:
    return torch.tanh(x @ project(weight, lambda_w).t()).square().sum()


def by_autograd(weight: Tensor, x: Tensor, lambda_w: float = LAMBDA) -> Tensor:
    leaf = weight.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, x, lambda_w), leaf)[0]


def weight_and_input(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 8).to(dtype), torch.randn(5, 8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_func_grad_equals_autograd(dtype: torch.dtype) -> None:
    weight, x = weight_and_input(dtype)
    assert torch.equal(grad(loss)(weight, x), by_autograd(weight, x))


def test_func_vjp_is_the_gradient_formula() -> None:
    weight, _ = weight_and_input()
    g = torch.randn_like(weight)
    out, pull = vjp(project, weight)
    assert torch.equal(out, nm_project(weight, "2:4"))
    pruned = weight.masked_fill(nm_mask(weight, "2:4"), 0.0)
    assert torch.equal(pull(g)[0], g + LAMBDA * pruned)


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap_over_weights_equals_a_loop(in_dim: int) -> None:
    weights = torch.randn(4, 3, 8)
    moved = weights.movedim(0, in_dim)
    out = vmap(project, in_dims=in_dim)(moved)
    assert torch.equal(out, torch.stack([project(weight) for weight in weights]))


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_vmap_keeps_the_group_dimension(dim: int) -> None:
    weights, control = torch.randn(5, 8, 4), make_control(LAMBDA, 2)
    out = vmap(lambda weight: sr_ste(weight, control, 4, dim))(weights)
    wanted = torch.stack([sr_ste(weight, control, 4, dim) for weight in weights])
    assert torch.equal(out, wanted)


def test_vmap_over_controls_equals_a_loop() -> None:
    weight = torch.randn(3, 8)
    controls = torch.stack([make_control(0.1, 1), make_control(0.2, 3)])
    out = vmap(lambda control: sr_ste(weight, control, 4, 1))(controls)
    assert torch.equal(out, torch.stack([sr_ste(weight, control, 4, 1) for control in controls]))
    both = vmap(lambda w, control: sr_ste(w, control, 4, 1))(
        torch.stack([weight, -weight]), controls
    )
    assert torch.equal(both, torch.stack([out[0], -out[1]]))


def test_vmap_of_grad_over_weights_equals_a_loop() -> None:
    weights, x = torch.randn(4, 3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    actual = vmap(grad(loss), in_dims=(0, None))(weights, x)
    torch.testing.assert_close(actual, torch.stack([by_autograd(w, x) for w in weights]))


def test_vmap_of_grad_over_inputs_equals_a_loop() -> None:
    weight, x = weight_and_input()
    actual = vmap(grad(loss), in_dims=(None, 0))(weight, x)
    torch.testing.assert_close(actual, torch.stack([by_autograd(weight, row) for row in x]))


def test_nested_vmap_equals_two_loops() -> None:
    weights = torch.randn(2, 4, 3, 8)
    out = vmap(vmap(project))(weights)
    assert torch.equal(out, project(weights)), "the last dimension is the group dimension"


def test_jvp_passes_the_tangent_straight_through() -> None:
    weight, _ = weight_and_input()
    tangent = torch.randn_like(weight)
    out, out_tangent = jvp(project, (weight,), (tangent,))
    assert torch.equal(out, nm_project(weight, "2:4"))
    assert torch.equal(out_tangent, tangent)


def test_forward_ad_without_functorch_passes_the_tangent_straight_through() -> None:
    weight, _ = weight_and_input()
    tangent = torch.randn_like(weight)
    with torch.autograd.forward_ad.dual_level():
        out = project(torch.autograd.forward_ad.make_dual(weight, tangent))
        primal, out_tangent = torch.autograd.forward_ad.unpack_dual(out)
    assert torch.equal(primal, nm_project(weight, "2:4"))
    assert torch.equal(out_tangent, tangent)


def test_jacfwd_equals_jacrev_for_the_straight_through_estimator() -> None:
    weight, x = weight_and_input()

    def output(weight: Tensor) -> Tensor:
        return torch.tanh(x @ project(weight, 0.0).t())

    torch.testing.assert_close(jacfwd(output)(weight), jacrev(output)(weight))


def test_jacrev_rows_are_gradients() -> None:
    weight, x = weight_and_input()

    def output(weight: Tensor) -> Tensor:
        return torch.tanh(x[:2] @ project(weight).t()).flatten()

    rows = []
    for i in range(6):
        leaf = weight.clone().requires_grad_()
        rows.append(torch.autograd.grad(output(leaf)[i], leaf)[0])
    torch.testing.assert_close(jacrev(output)(weight), torch.stack(rows))


def hessian_by_hand(weight: Tensor, x: Tensor, lambda_w: float) -> Tensor:
    """d grad / d weight: the loss's own Hessian at w~, straight through, plus the decay's."""

    def plain(masked: Tensor) -> Tensor:
        return torch.tanh(x @ masked.t()).square().sum()

    own = torch.autograd.functional.hessian(plain, nm_project(weight, "2:4"))
    decay = lambda_w * (~nm_mask(weight, "2:4")).to(weight.dtype)
    return own + torch.diag_embed(decay.flatten()).view(own.shape)


@pytest.mark.parametrize("lambda_w", [0.0, LAMBDA])
def test_hessian_is_that_of_the_masked_loss_plus_the_decay(lambda_w: float) -> None:
    weight, x = weight_and_input()
    wanted = hessian_by_hand(weight, x, lambda_w)
    # Forward over reverse: the derivative of the gradient formula. Reverse over reverse would add
    # the decay itself once more, as any backward through sr_ste does.
    torch.testing.assert_close(hessian(lambda w: loss(w, x, lambda_w))(weight), wanted)


def test_reverse_over_reverse_hessian_of_the_straight_through_estimator() -> None:
    weight, x = weight_and_input()
    actual = jacrev(grad(loss))(weight, x, 0.0)
    torch.testing.assert_close(actual, hessian_by_hand(weight, x, 0.0))


# --- models --------------------------------------------------------------------------------------


def model(lambda_w: float = LAMBDA, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)).double()
    return nmfx.sparsify(net, {"0": "2:4", "3": "1:4"}, lambda_w=lambda_w)


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def model_loss(net: nn.Module) -> Callable:
    def compute(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(net, parameters, (x.unsqueeze(0),))
        return nn.functional.cross_entropy(out, y.unsqueeze(0))

    return compute


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


def assert_tree_close(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(
            actual[name], want, msg=lambda text, name=name: f"{name}: {text}"
        )


def gradients_one_by_one(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    rows = []
    for xi, yi in zip(x, y, strict=True):
        net.zero_grad()
        nn.functional.cross_entropy(net(xi.unsqueeze(0)), yi.unsqueeze(0)).backward()
        rows.append({name: p.grad.clone() for name, p in net.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_per_sample_gradients_equal_a_loop() -> None:
    net, (x, y) = model(), batch()
    actual = vmap(grad(model_loss(net)), in_dims=(None, 0, 0))(parameters_of(net), x, y)
    assert_tree_close(actual, gradients_one_by_one(net, x, y))


def test_per_sample_gradients_of_frozen_layers_equal_a_loop() -> None:
    net, (x, y) = model(), batch()
    nmfx.freeze(net)
    actual = vmap(grad(model_loss(net)), in_dims=(None, 0, 0))(parameters_of(net), x, y)
    assert_tree_close(actual, gradients_one_by_one(net, x, y))


def ensemble() -> tuple[list[nn.Module], nn.Module, dict[str, Tensor]]:
    """Three models, their skeleton on the meta device, and their stacked parameters."""
    members = [model(seed=seed) for seed in (1, 2, 3)]
    stacked, _ = stack_module_state(members)
    return members, deepcopy(members[0]).to("meta"), stacked


def test_ensemble_forward_equals_a_loop() -> None:
    members, base, stacked = ensemble()
    x, _ = batch()
    out = vmap(lambda p, x: functional_call(base, p, (x,)), in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(out, torch.stack([member(x) for member in members]))


def test_ensemble_gradients_equal_a_loop() -> None:
    members, base, stacked = ensemble()
    x, y = batch()
    per_member = vmap(grad(model_loss(base)), in_dims=(None, 0, 0))
    stacked = {name: tensor.detach() for name, tensor in stacked.items()}
    actual = vmap(per_member, in_dims=(0, None, None))(stacked, x, y)
    loops = [gradients_one_by_one(member, x, y) for member in members]
    wanted = {name: torch.stack([loop[name] for loop in loops]) for name in loops[0]}
    assert_tree_close(actual, wanted)


def test_functional_call_with_other_weights_masks_those() -> None:
    net, other, (x, _) = model(seed=1), model(seed=2), batch()
    out = functional_call(net, parameters_of(other), (x,))
    assert torch.equal(out, other(x))


@pytest.mark.xfail(
    torch.__version__ < (2, 14),
    raises=torch._dynamo.exc.TorchRuntimeError,
    reason="torch < 2.14 compiles no custom operator with a gradient under torch.func transforms",
)
def test_compiled_per_sample_gradients_equal_eager() -> None:
    net, (x, y) = model(), batch()
    per_sample = vmap(grad(model_loss(net)), in_dims=(None, 0, 0))
    compiled = torch.compile(per_sample, backend="aot_eager")
    parameters = parameters_of(net)
    assert_tree_close(compiled(parameters, x, y), per_sample(parameters, x, y))
