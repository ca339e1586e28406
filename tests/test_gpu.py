"""Training on a GPU: eager against the CPU, compiled against eager. Skipped without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import nmfx
from nmfx.ops import compiled as compiled_ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),  # torch's own, of the GPU's compiler
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.Linear(64, 8),
    )


def sparse(pattern: str) -> nn.Module:
    return nmfx.sparsify(net(), {"[03]": pattern}, lambda_w=2.0**-4)


def step(model: Callable[..., Tensor], module: nn.Module, x: Tensor, half: bool) -> list[Tensor]:
    """The output and all gradients."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        out = model(x)
        loss = F.mse_loss(out.float(), torch.ones_like(out, dtype=torch.float32))
    return [out.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


def check(actual: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == want.dtype
        error = (got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm()
        assert error < tolerance, error


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:16"])
def test_a_gpu_computes_what_the_cpu_does(pattern: str) -> None:
    model, x = sparse(pattern), torch.randn(4, 16, 4, 4)
    wanted = step(model, model, x, half=False)
    model = copy.deepcopy(model).cuda()
    check(step(model, model, x.cuda(), half=False), wanted, 1e-3)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:16"])
def test_compiled_equals_eager(pattern: str, half: bool) -> None:
    model, x = sparse(pattern).cuda(), torch.randn(4, 16, 4, 4, device="cuda")
    wanted = step(model, model, x, half)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    actual, codes = run_and_get_code(lambda: step(compiled, model, x, half))
    check(actual, wanted, 2e-2 if half else 1e-3)
    m = nmfx.Pattern.parse(pattern).m
    called = any("torch.ops.nmfx" in code for code in codes)
    assert called is (m >= compiled_ops.GPU_KERNELS_FROM_M)


def test_no_mask_reaches_the_host() -> None:
    model, x = sparse("2:4").cuda(), torch.randn(4, 16, 4, 4, device="cuda")
    step(model, model, x, half=True)  # the first call compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, model, x, half=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
