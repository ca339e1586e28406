"""What nmfx::sr_ste and its gradients do with CUDA tensors: which kernels, and why not Triton's.

Needs neither a GPU nor Triton: fake tensors ask, and the functions behind the ops are called.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses import FakeTensorMode

from nmfx.kernels import triton
from nmfx.ops import cuda
from nmfx.ops.sr_ste import ABI, _backward_eager, _project_eager, make_control


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    triton._missing.cache_clear()
    yield
    triton._missing.cache_clear()


def fake(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, 8, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    "name", ["sr_ste", "sr_ste_project", "sr_ste_backward", "sr_ste_gradient", "sr_ste_decay_"]
)
def test_cuda_ops_are_registered(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nmfx::{name}", "CUDA")


def test_why_not_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert triton.why_not(torch.empty(2, 8), 4) == "the weight is on cpu, not on a GPU"
    assert triton.why_not(fake(torch.int32), 4) == "dtype torch.int32 has no N:M order"
    assert triton.why_not(fake(), 1) == "M=1 is outside 2..64"
    assert triton.why_not(fake(), 65) == "M=65 is outside 2..64"
    assert triton.why_not(fake(), 4) == "compute capability 7.5 is below 8.0"
    triton._missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert triton.why_not(fake(), 4) is None
    triton._missing.cache_clear()
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert triton.why_not(fake(), 4) == "triton is not installed"


@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "plain torch"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_cuda_ops_take_either_way(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cpu"
    if kernels:
        pytest.importorskip("triton", reason="triton is not installed: no kernels to call")
        device = "cuda" if torch.cuda.is_available() else "cpu"
    launched: list[str] = []
    launch = triton._launch

    def counted(name: str, *args: object) -> None:
        launched.append(name)
        launch(name, *args)

    monkeypatch.setattr(triton, "_launch", counted)
    monkeypatch.setattr(triton, "why_not", lambda weight, m: None if kernels else "a test")
    weight, grad = torch.randn(2, 3, 8, device=device)
    control = make_control(0.5, 2, device)
    masked, narrow = (_project_eager(weight, control, 4, 1, d) for d in (None, torch.float16))
    decayed = _backward_eager(grad, weight, control, 4, 1, ABI)
    assert torch.equal(cuda.forward(weight, control, 4, 1, ABI), masked)
    assert torch.equal(cuda.project(weight, control, 4, 1, torch.float16), narrow)
    assert torch.equal(cuda.backward(grad, weight, control, 4, 1, ABI), decayed)
    assert cuda.decay_(grad, weight, control, 4, 1, ABI) is None
    assert torch.equal(grad, decayed)
    assert launched == ["project", "project", "gradient", "gradient"] * kernels
