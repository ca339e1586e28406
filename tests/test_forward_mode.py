"""Forward-mode derivatives of lowered models: those of the folded one, and never silent zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import nmfx
from nmfx.kernels import semi_structured as semi
from nmfx.mask import nm_project
from nmfx.ops.linear_semi_structured import linear_semi_structured
from nmfx.ops.sr_ste import make_control, sr_ste

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
Function = Callable[[Tensor], Tensor]
Pair = tuple[Function, Function, Tensor]


def both(model: nn.Module, x: Tensor, pattern: str = "2:4", **options: Any) -> Pair:
    """The lowered and the folded model as functions, and an input."""
    sparse = nmfx.sparsify(model.eval(), pattern)
    lowered, folded = nmfx.lower(sparse, tune=False, **options), nmfx.fold(sparse)
    assert any(row.state == "packed" for row in nmfx.report(lowered))
    return lowered, folded, x


def linear() -> Pair:
    return both(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 3)), torch.randn(5, 16))


def conv() -> Pair:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 2, groups=2))
    return both(model, torch.randn(2, 8, 5, 6))


def attention() -> Pair:
    lowered, folded, x = both(nn.MultiheadAttention(16, 2), torch.randn(4, 2, 16))
    return lambda x: lowered(x, x, x)[0], lambda x: folded(x, x, x)[0], x


def experts() -> Pair:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_local_experts": 3}
    made = MixtralExperts(MixtralConfig(**sizes, vocab_size=8))
    made.config._experts_implementation = "eager"
    for weight in made.parameters():
        nn.init.normal_(weight)
    lowered, folded, x = both(made, torch.randn(6, 16))
    chosen, weights = torch.arange(12).view(6, 2) % 3, torch.rand(6, 2)
    return lambda x: lowered(x, chosen, weights), lambda x: folded(x, chosen, weights), x


def semi_structured() -> Pair:
    weight = nm_project(torch.randn(8, 16).half(), "2:4", 1)
    compressed, meta = semi.compress(weight, semi.CUTLASS)
    bias = torch.randn(8).half()

    def fast(x: Tensor) -> Tensor:
        y = linear_semi_structured(x.half(), compressed, meta, bias, 8, 16, torch.float16)
        return y.float()

    return fast, lambda x: nn.functional.linear(x.half(), weight, bias).float(), torch.randn(3, 16)


MODELS = {
    "linear": linear,
    "conv": conv,
    "attention": attention,
    "experts": experts,
    "semi_structured": semi_structured,
}


def dual(f: Function, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))))


def recorded(f: Function, x: Tensor) -> Any:
    """The tangent of a backward whose forward was recorded before."""
    x = x.clone().requires_grad_()
    y = f(x)
    with forward_ad.dual_level():
        direction = forward_ad.make_dual(torch.ones_like(y), y.detach().cos())
        (found,) = torch.autograd.grad(y, x, direction)
        return tuple(forward_ad.unpack_dual(found))


def square(f: Function) -> Function:
    return lambda x: f(x).square().sum()


WAYS: dict[str, Callable[[Function, Tensor], Any]] = {
    "jvp": lambda f, x: jvp(f, (x,), (x.sin(),)),
    "jvp without gradients": torch.no_grad()(lambda f, x: jvp(f, (x,), (x.sin(),))),
    "jvp of an input with gradients": lambda f, x: jvp(f, (x.clone().requires_grad_(),), (x,)),
    "jvp of grad": lambda f, x: jvp(grad(square(f)), (x,), (x.sin(),)),
    "grad of jvp": lambda f, x: grad(lambda x: jvp(f, (x,), (x,))[1].sin().sum())(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "jacfwd of jacrev": lambda f, x: jacfwd(jacrev(square(f)))(x),
    "jacrev of jacfwd": lambda f, x: jacrev(jacfwd(square(f)))(x),
    "hessian": lambda f, x: hessian(square(f))(x),
    "dual": dual,
    "recorded backward": recorded,
}


# Routing under vmap; forward mode of silu's backward.
REFUSED = ("jacfwd", "jacfwd of jacrev", "jacrev of jacfwd", "hessian", "recorded backward")
TORCH_REFUSES = {("experts", way) for way in REFUSED}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_forward_mode_derivatives_are_those_of_the_folded_model(model: str, way: str) -> None:
    if (model, way) in TORCH_REFUSES:
        pytest.skip("torch refuses it for the folded model too")
    lowered, folded, x = MODELS[model]()
    found, expected = WAYS[way](lowered, x), WAYS[way](folded, x)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if model == "semi_structured" else CLOSE
    torch.testing.assert_close(found, expected, **tolerance)
    last = expected[-1] if isinstance(expected, tuple) else expected
    assert last.count_nonzero(), "the test cannot fail"


def test_forward_mode_in_a_batch() -> None:
    lowered, folded, x = linear()

    def per_row(f: Function) -> Tensor:
        return vmap(lambda row: jvp(f, (row,), (row.sin(),))[1])(x)

    torch.testing.assert_close(per_row(lowered), per_row(folded), **CLOSE)


def test_forward_mode_compiled() -> None:
    lowered, folded, x = linear()
    compiled = torch.compile(lambda x: jvp(lowered, (x,), (x.sin(),))[1], fullgraph=True)
    torch.testing.assert_close(compiled(x), jvp(folded, (x,), (x.sin(),))[1], **CLOSE)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_recorded_backward_of_a_sparse_layer_keeps_tangents(frozen: bool) -> None:
    layer = nmfx.sparsify(nn.Linear(16, 8, bias=False), "2:4", lambda_w=0.1)
    if frozen:
        nmfx.freeze(layer)
    x, w = torch.randn(5, 16), layer.weight
    y = layer(x)
    with forward_ad.dual_level():
        direction = forward_ad.make_dual(torch.ones_like(y), y.detach().cos())
        found = torch.autograd.grad(y, w, direction, retain_graph=True)[0]
        tangent = forward_ad.unpack_dual(found).tangent
    expected = y.detach().cos().t() @ x
    if frozen:
        expected = expected.where(nmfx.nm_mask(w.detach(), "2:4", dim=1), 0.0)
    torch.testing.assert_close(tangent, expected)


def test_a_recorded_backward_of_the_op_keeps_tangents() -> None:
    w = torch.randn(8, 16, requires_grad=True)
    masked = sr_ste(w, make_control(0.1, 2), 4, 1)
    with forward_ad.dual_level():
        direction = forward_ad.make_dual(torch.ones_like(w), w.detach().cos())
        (found,) = torch.autograd.grad(masked, w, direction)
        primal, tangent = forward_ad.unpack_dual(found)
    pruned = w.detach().where(~nmfx.nm_mask(w.detach(), "2:4", dim=1), 0.0)
    torch.testing.assert_close(primal, 1 + 0.1 * pruned)
    torch.testing.assert_close(tangent, w.detach().cos())
