"""lower with semi-structured layers, on the CPU: every machine here "has" CUTLASS.

What differs on a GPU is which kernel multiplies (test_semi_structured.py) and whose clock is read.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_timer import DENSE_WINS, install
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import nmfx
from nmfx.capture.lowering import Target
from nmfx.kernels import semi_structured as semi
from nmfx.tuning import timer

X = torch.linspace(-2, 2, 3 * 64).reshape(3, 64).sin().bfloat16()
SEMI_WINS = {"dense": 3.0, "prepacked": 3.0, "packed": 2.0, "semi_structured": 1.0}
STATES = {
    "fc1.weight": "semi_structured",
    "fc2.weight": "semi_structured",
    "head.weight": "dense",
}


@pytest.fixture(autouse=True)
def _cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.fc2 = nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.norm(self.fc1(x)).relu()))


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(72, 64).bfloat16())
        self.v = nn.Parameter(torch.randn(4, 72).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w).relu(), self.v)


def sparse(pattern: str = "2:4") -> nn.Module:
    return nmfx.sparsify(Mlp().bfloat16(), pattern).eval()


def lowered(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module | None = None, inplace: bool = False
) -> nn.Module:
    install(monkeypatch, SEMI_WINS)
    return nmfx.lower(sparse() if model is None else model, (X,), inplace=inplace)


def states(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.state for row in nmfx.report(model)}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "1:16"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_outputs_and_weights_are_those_of_the_folded_model(
    pattern: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse(pattern)
    folded = nmfx.fold(model)
    fast = lowered(monkeypatch, model, inplace)
    assert (fast is model) is inplace
    assert states(fast) == STATES
    torch.testing.assert_close(fast(X), folded(X))
    for name in ("fc1", "fc2"):
        assert torch.equal(getattr(fast, name).weight, getattr(folded, name).weight)
    assert isinstance(fast.fc1, nn.Linear)


@pytest.mark.parametrize("pattern", ["3:4", "4:8", "8:16"])
def test_a_pattern_that_the_hardware_lacks_is_no_candidate(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(states(lowered(monkeypatch, sparse(pattern))).values()) == {"packed", "dense"}


def test_the_report_shows_bytes_times_and_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    report = nmfx.report(lowered(monkeypatch))
    rows = {row.fqn: row for row in report}
    row = rows["fc1.weight"]
    assert (row.bytes_dense, row.bytes) == (
        96 * 64 * 2,
        semi.compressed_bytes(96, 64, semi.CUTLASS),
    )
    assert (row.ms_dense, row.ms_chosen, row.ratio) == (3.0, 1.0, 3.0)
    assert "semi-structured 3.00x, " in row.reason
    assert any("carry 100% of the multiply-adds" in note for note in report.notes)
    assert "semi_structured" in str(report)


def test_the_state_dict_holds_plain_tensors_and_round_trips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast = lowered(monkeypatch)
    state = fast.state_dict()
    assert {k for k in state if k.startswith("fc1")} == {
        "fc1.bias",
        "fc1.weight_compressed",
        "fc1.weight_meta",
        "fc1.weight_format",
    }
    assert all(type(value) is Tensor for value in state.values())
    assert state["fc1.weight_compressed"].dtype == torch.uint8
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = lowered(monkeypatch, nmfx.sparsify(Mlp().bfloat16(), "2:4").eval())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(X), fast(X))


@pytest.mark.parametrize("graph", [False, True], ids=["module", "graph"])
@pytest.mark.parametrize("damage", ["dtype", "converted", "no format"])
def test_bytes_of_something_else_are_not_loaded(
    damage: str, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(dtype: torch.dtype) -> nn.Module:
        net: nn.Module = Reads() if graph else Mlp()
        net = fx.symbolic_trace(net) if graph else net
        install(monkeypatch, SEMI_WINS)
        return nmfx.lower(nmfx.sparsify(net.to(dtype), "2:4").eval(), (X.to(dtype),))

    fast = make(torch.bfloat16)
    state = fast.state_dict()
    if damage == "dtype":
        state = make(torch.float16).state_dict()
    elif damage == "converted":
        state = {key: value.bfloat16() for key, value in state.items()}
    else:
        state = {key: value for key, value in state.items() if not key.endswith("_format")}
    before = fast(X)
    with pytest.raises(nmfx.NMError, match=r"this layer holds CUTLASS torch.bfloat16, and what"):
        fast.load_state_dict(state)
    assert torch.equal(fast(X), before)


def test_copies_and_pickles_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = lowered(monkeypatch)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert states(twin) == STATES
        assert torch.equal(twin(X), fast(X))


def test_another_dtype_is_an_error_and_never_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = lowered(monkeypatch).half()
    with pytest.raises(nmfx.NMError, match=r"input is torch.float16, the packed weight torch.b"):
        fast(X.half())
    assert fast.bfloat16()(X).isfinite().all()


def test_it_compiles_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = lowered(monkeypatch)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(fast, fullgraph=True)(X), fast(X))


def test_gradients_reach_what_is_not_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse()
    folded, fast = nmfx.fold(model), lowered(monkeypatch, model)
    for m in (folded, fast):
        m(X).float().square().sum().backward()
    for name in ("fc1.bias", "head.weight", "norm.weight"):
        grads = [m.get_parameter(name).grad for m in (fast, folded)]
        torch.testing.assert_close(*grads)


def test_hf_conv1d_is_compressed_along_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Conv1D(72, 64), nn.Linear(72, 4)).bfloat16()
    model = nmfx.sparsify(model, {"0": "2:4"})
    folded, fast = nmfx.fold(model), lowered(monkeypatch, model)
    assert states(fast)["0.weight"] == "semi_structured"
    torch.testing.assert_close(fast(X), folded(X))
    assert torch.equal(fast[0].weight, folded[0].weight)


def test_weights_that_a_graph_reads_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nmfx.sparsify(fx.symbolic_trace(Reads()), "2:4")
    folded, fast = nmfx.fold(model), lowered(monkeypatch, model)
    assert states(fast)["w"] == "semi_structured"
    assert "nmfx_linear_semi_structured" in fast.code
    torch.testing.assert_close(fast(X), folded(X))
    assert torch.equal(copy.deepcopy(fast)(X), fast(X))


# --- all or nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_an_interruption_leaves_a_folded_model(
    inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse()
    folded = nmfx.fold(model)
    lower, calls = Target.lower, []

    def second_fails(self: Target, *args: object) -> None:
        lower(self, *args)
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Target, "lower", second_fails)
    with pytest.raises(KeyboardInterrupt):
        lowered(monkeypatch, model, inplace)
    if inplace:
        assert list(model.state_dict()) == list(folded.state_dict())
        for name, weight in folded.named_parameters():
            assert torch.equal(model.get_parameter(name), weight)
    else:
        assert states(model)["fc1.weight"] == "sparse"


def test_a_slower_whole_model_becomes_dense_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse()
    folded = nmfx.fold(model)
    install(monkeypatch, SEMI_WINS, whole=(1.0, 2.0, 1.0))
    fast = nmfx.lower(model, (X,))
    assert set(states(fast).values()) == {"dense"}
    for name, weight in folded.named_parameters():
        assert torch.equal(fast.get_parameter(name), weight)


def test_a_library_that_refuses_is_reported_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object) -> Tensor:
        raise RuntimeError("CUDA error: operation not supported\nmore")

    monkeypatch.setattr("nmfx.tuning.layers.linear_semi_structured", refuses)
    fast = lowered(monkeypatch)
    assert set(states(fast).values()) == {"packed", "dense"}
    notes = nmfx.report(fast).notes
    assert (
        "fc1.weight: semi_structured failed and was not used: CUDA error: operation not supported"
        in notes
    )


@pytest.mark.parametrize("tune", [True, False])
def test_a_library_that_cannot_compress_is_reported(
    tune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(weight: Tensor, backend: semi.Backend) -> tuple[Tensor, Tensor]:
        raise RuntimeError("CUDA error: architecture mismatch")

    monkeypatch.setattr(semi, "compress", fails)
    if tune:
        fast = lowered(monkeypatch)
        assert set(states(fast).values()) == {"packed", "dense"}
        text = "fc1.weight: semi_structured failed and was not used: CUDA error: architecture"
        assert any(note.startswith(text) for note in nmfx.report(fast).notes)
    else:
        only_semi_structured(monkeypatch)
        fast = nmfx.lower(sparse(), tune=False)
        assert set(states(fast).values()) == {"dense"}
        assert "could not be compressed: CUDA error" in next(iter(nmfx.report(fast))).reason


def test_autocast_to_another_dtype_is_no_place_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Casts(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.float16):
                return self.head(self.fc2(self.fc1(x).relu()))

    model = nmfx.sparsify(Casts().bfloat16(), "2:4").eval()
    fast = lowered(monkeypatch, model)
    assert "semi_structured" not in states(fast).values()
    assert any("autocast asks for torch.float16" in note for note in nmfx.report(fast).notes)


def test_a_library_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "nmfx.tuning.layers.linear_semi_structured",
        lambda x, *rest: x.new_zeros(x.shape[0], rest[3]),
    )
    fast = lowered(monkeypatch)
    assert set(states(fast).values()) == {"packed", "dense"}
    assert any("semi_structured differs from dense" in note for note in nmfx.report(fast).notes)


def test_dense_wins_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {**DENSE_WINS, "semi_structured": 1.0})
    assert set(states(nmfx.lower(sparse(), (X,))).values()) == {"dense"}


# --- on a GPU -------------------------------------------------------------------------------------


def only_semi_structured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmfx.tuning.layers._no_packed", lambda layer: "no Triton")


def test_untimed_on_a_gpu_compresses_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    only_semi_structured(monkeypatch)
    assert states(nmfx.lower(sparse(), tune=False)) == STATES
    report = nmfx.report(nmfx.lower(sparse("4:8"), tune=False))
    assert {row.state for row in report} == {"dense"}
    reason = next(row.reason for row in report)
    assert "more than 2 nonzeros" in reason
    assert "no Triton" in reason


def test_preview_knows_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, SEMI_WINS)
    rows = {row.fqn: row for row in nmfx.preview(Mlp().bfloat16(), "2:4", (X,))}
    row = rows["fc1.weight"]
    assert row.state == "would be semi_structured"
    assert row.bytes == semi.compressed_bytes(96, 64, semi.CUTLASS)


def test_preview_of_a_lowered_model_says_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for net in (Mlp().bfloat16(), fx.symbolic_trace(Reads())):
        fast = lowered(monkeypatch, nmfx.sparsify(net, "2:4").eval())
        row = next(iter(nmfx.preview(fast, "2:4", (X,))))
        assert row.reason == "it is lowered already"
        assert row.bytes_dense in (96 * 64 * 2, 72 * 64 * 2)


def test_gpu_time_is_taken_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    class Device:
        def __init__(self, device: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *args: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    device = torch.device("cuda")
    found = timer.measure(
        {"dense": lambda: log.append("run")},
        lambda: log.append("evict"),
        0.0,
        device,
        captured=False,
    )
    assert found == {"dense": 2.5}
    assert log[:2] == ["run", "evict"], "a warm-up, then the caches are emptied"
    assert log[2:7] == ["sleep", "record", "run", "record", "wait"]


def test_ddp_takes_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It broadcasts them, and torch.distributed sends no 16-bit integers."""
    fast = lowered(monkeypatch)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fast)
        assert torch.equal(wrapped(X), fast(X))
        fast.register_buffer("short", torch.zeros(2, dtype=torch.int16))
        with pytest.raises(RuntimeError, match="scalar type"):
            nn.parallel.DistributedDataParallel(fast)
    finally:
        dist.destroy_process_group()
