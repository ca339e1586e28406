"""Training and lowering on a GPU. Skipped without one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import nmfx
from nmfx.capture.packed import compress_weight
from nmfx.kernels import semi_structured as semi
from nmfx.kernels.triton_packed import unpack
from nmfx.mask import nm_mask, nm_project
from nmfx.ops import compiled as compiled_ops
from nmfx.ops.conv_nm import conv_nm
from nmfx.ops.conv_semi_structured import conv_semi_structured
from nmfx.ops.linear_nm import linear_nm
from nmfx.packing import pack, pack_conv

pytestmark = [
    pytest.mark.gpu,
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


# --- lowering ---------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1024, 2048)
        self.fc2 = nn.Linear(2048, 1040, bias=False)
        self.head = nn.Linear(1040, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x).relu()))


def masked(pattern: str = "2:4") -> nn.Module:
    torch.manual_seed(0)
    return nmfx.sparsify(Mlp().cuda().bfloat16(), pattern).eval()


def semi_structured(model: nn.Module) -> list[str]:
    return [row.fqn for row in nmfx.report(model) if row.state == "semi_structured"]


def test_semi_structured_layers_compute_what_dense_ones_do() -> None:
    reason = semi.backend_of(torch.device("cuda"))
    if isinstance(reason, str):
        pytest.skip(reason)
    for pattern in ("2:4", "1:4", "1:16"):
        model = masked(pattern)
        folded, fast = nmfx.fold(model), nmfx.lower(model, tune=False)
        assert semi_structured(fast) == ["fc1.weight", "fc2.weight"]
        for name in ("fc1", "fc2"):
            assert torch.equal(fast.get_submodule(name).weight, folded.get_submodule(name).weight)
        for shape in ((1, 1024), (13, 1024), (2, 64, 1024), (0, 1024), (1024,)):
            x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(fast(x), folded(x), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 8,
    reason="CUTLASS's kernels are for compute capability 8.x",
)
def test_cutlass_computes_what_dense_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    test_semi_structured_layers_compute_what_dense_ones_do()


def test_lowered_on_a_gpu_is_measured_and_right() -> None:
    model = masked()
    x = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16)
    folded, fast = nmfx.fold(model), nmfx.lower(model, (x,))
    torch.testing.assert_close(fast(x), folded(x), rtol=2e-2, atol=2e-2)
    report = nmfx.report(fast)
    assert torch.cuda.get_device_name() in str(report)
    assert all(row.ms_dense for row in report if row.pattern is not None)


def test_a_lowered_model_neither_waits_nor_breaks_cuda_graphs() -> None:
    fast = nmfx.lower(masked(), tune=False)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = fast(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fast(x)
        graph.replay()
        assert torch.equal(out, wanted)
        torch.compiler.reset()
        compiled = torch.compile(fast, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            torch.testing.assert_close(compiled(x), wanted, rtol=2e-2, atol=2e-2)


def test_a_choice_of_the_gpu_is_saved_and_runs_again(tmp_path: Path) -> None:
    """Semi-structured with its algorithms, packed, and both in one layer."""
    few, many = (torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16) for rows in (1, 4096))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 8192), nn.ReLU()).cuda().bfloat16()
    model = nmfx.sparsify(model, "2:4").eval()
    folded = nmfx.fold(model)
    for inputs, keep in (
        ([(many,)], None),
        ([(few,)], None),
        ([(few,), (many,)], ("packed", "semi_structured")),
    ):
        fast = nmfx.lower(model, inputs, keep=keep)
        print(nmfx.report(fast))
        nmfx.save(fast, tmp_path / "model.safetensors")
        again = nmfx.load(tmp_path / "model.safetensors", into=copy.deepcopy(folded))
        for x in (few, many):
            torch.testing.assert_close(fast(x), folded(x), rtol=2e-2, atol=2e-2)
            assert torch.equal(again(x), fast(x))
        compiled = torch.compile(fast, fullgraph=True, mode="reduce-overhead")
        with torch.no_grad():
            for x in (few, many, few):
                torch.testing.assert_close(compiled(x), fast(x), rtol=2e-2, atol=2e-2)


def test_all_algorithms_compute_the_same() -> None:
    if semi.backend_of(torch.device("cuda")) is not semi.CUSPARSELT:
        pytest.skip("no cuSPARSELt")
    weight = nm_project(torch.randn(256, 512, device="cuda").bfloat16(), "2:4", 1)
    tensors = semi.compress(weight, semi.CUSPARSELT)
    x = torch.randn(64, 512, device="cuda").bfloat16()
    numbers = list(semi.algorithms(x, *tensors, 256))
    assert numbers == list(range(len(numbers)))
    for number in numbers:
        y = semi.multiply(x, *tensors, None, 256, number)
        torch.testing.assert_close(y, F.linear(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:16", "4:8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_packed_products_of_any_rows(pattern: str, dtype: torch.dtype) -> None:
    """Few rows, and many, for which the weight is unpacked; inputs of any strides."""
    n, m = map(int, pattern.split(":"))
    for out, columns in ((4096, 4096), (1000, 480), (272, 2048)):
        weight = nm_project(torch.randn(out, columns, device="cuda").to(dtype), pattern, 1)
        values, index = pack(weight, pattern)
        assert torch.equal(unpack(values, index, out, columns, n, m), weight)
        for rows in (0, 1, 3, 8, 13, 16, 33, 64, 65, 300):
            x = torch.randn(columns, rows, device="cuda").to(dtype).t()
            y = linear_nm(x, values, index, None, out, columns, n, m)
            wanted = F.linear(x.double(), weight.double())
            error = (y.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
            assert error < {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_compute_what_dense_ones_do(kernel: int) -> None:
    """As products of patches, packed and compressed; of many rows with the weight unpacked."""
    reason = semi.backend_of(torch.device("cuda"))
    torch.manual_seed(0)
    weight = torch.randn(272, 64, kernel, kernel, device="cuda").bfloat16()
    weight = nm_project(weight, "2:4", 1)
    bias = torch.randn(272, device="cuda").bfloat16()
    packed = pack_conv(weight, 1, "2:4")
    for batch, side in ((0, 7), (1, 3), (1, 7), (3, 20)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(batch, 64, side, side, device="cuda").bfloat16()
            x = x.to(memory_format=layout)
            window = 2, kernel // 2, 1, 1
            wanted = F.conv2d(x, weight, bias, *window)
            found = [conv_nm(x, *packed, bias, *window, weight.shape, 2, 4)]
            if not isinstance(reason, str):
                compressed, meta, _ = compress_weight(weight, 1)
                tensors = compressed, meta, bias
                found.append(conv_semi_structured(x, *tensors, *window, weight.shape, weight.dtype))
            for y in found:
                torch.testing.assert_close(y, wanted, rtol=2e-2, atol=4e-2)
                assert y.stride() == wanted.stride() or not batch


def test_a_model_of_convolutions_is_measured_and_right() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(256, 512, 1), nn.ReLU(), nn.Conv2d(512, 256, 3, padding=1)]
    head = nn.Linear(256 * 14 * 14, 8)
    model = nn.Sequential(*convs, nn.Flatten(), head).cuda().bfloat16()
    x = torch.randn(8, 256, 14, 14, device="cuda").bfloat16()
    x = x.to(memory_format=torch.channels_last)
    model = nmfx.sparsify(model, "2:4").eval()
    folded, fast = nmfx.fold(model), nmfx.lower(model, (x,))
    torch.testing.assert_close(fast(x), folded(x), rtol=3e-2, atol=3e-2)
    assert all(row.ms_dense for row in nmfx.report(fast) if row.pattern is not None)


def test_packed_products_on_streams_and_in_inference_mode() -> None:
    weight = nm_project(torch.randn(4096, 4096, device="cuda").bfloat16(), "2:4", 1)
    values, index = pack(weight, "2:4")
    xs = [torch.randn(r, 4096, device="cuda").bfloat16() for r in (1, 8, 16, 40)]

    def product(x: Tensor) -> Tensor:
        return linear_nm(x, values, index, None, 4096, 4096, 2, 4)

    wanted = [product(x) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, x in zip(streams, xs, strict=True):
            with torch.cuda.stream(stream), torch.inference_mode():
                found.append(product(x))
    torch.cuda.synchronize()
    for number, y in enumerate(found):
        assert torch.equal(y, wanted[number % len(xs)])


def test_masks_are_those_of_the_cpu() -> None:
    weight = torch.randn(64, 96)
    weight[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    weight[1] = 1.0
    for pattern in ("2:4", "1:16", "4:8", "3:6"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = weight.to(dtype)
            assert torch.equal(nm_mask(w.cuda(), pattern, 1).cpu(), nm_mask(w, pattern, 1))


def test_packed_layers_move_to_a_gpu_and_compressed_ones_stay_there() -> None:
    model = masked().cpu()
    folded = nmfx.fold(model).cuda()
    x = torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
    moved = nmfx.lower(model, tune=False).cuda()
    torch.testing.assert_close(moved(x), folded(x), rtol=2e-2, atol=2e-2)
    compressed = nmfx.lower(model.cuda(), tune=False)
    if semi.backend_of(torch.device("cuda")) is semi.CUSPARSELT:
        with pytest.raises(nmfx.NMError, match="runs on the GPU it was compressed on"):
            compressed.cpu()(x.cpu())
