"""nmfx's own calls of cuSPARSELt, against a stand-in that checks what it gets and needs no GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmfx.errors import NMError
from nmfx.kernels import cusparselt
from nmfx.kernels import semi_structured as semi

ALGORITHMS = 5
FLAGS = {801: ("-DSTRUCT=512", "-DHAS_CHOICES=1"), 701: ("-DSTRUCT=1024", "-DHAS_CHOICES=0")}
STREAM = 0x5EED


class StandIn:
    """The library and its counters."""

    def __init__(self, path: Path, version: int) -> None:
        self.path, self.version, self.library = path, version, ctypes.CDLL(str(path))
        self.refusals = 0  # that a test is about

    def number(self, name: str) -> ctypes.c_int64:
        return ctypes.c_int64.in_dll(self.library, name)

    @property
    def made(self) -> int:
        """Plans, ever."""
        return self.number("plans_made").value

    def live(self) -> list[int]:
        """Handles, descriptors, selections of an algorithm, plans."""
        return [self.library.how_many(kind) for kind in range(4)]

    def holds(self, plans: int, handles: int = 1) -> list[int]:
        """What `live` is with so many plans."""
        return [handles, 3 * plans, plans * (self.version >= 800), plans]


@pytest.fixture(scope="module", params=FLAGS)
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no g++ on the PATH")
    source = Path(__file__).with_name("cusparselt_stand_in.cpp")
    path = tmp_path_factory.mktemp("cusparselt") / "stand_in.so"
    flags = (*FLAGS[request.param], f"-DALGORITHMS={ALGORITHMS}", "-Wall", "-Wextra", "-Werror")
    command = (compiler, "-std=c++17", "-shared", "-fPIC", *flags, source, "-o", path)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path, request.param


@pytest.fixture
def lib(built: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in as the one that torch has loaded; nothing is left of it after the test."""
    lib = StandIn(*built)
    lib.number("plans_made").value = lib.number("refused").value = 0
    monkeypatch.setattr(cusparselt, "_NAME", str(lib.path))
    monkeypatch.setattr(cusparselt, "_thread", cusparselt._Thread())
    monkeypatch.setattr(cusparselt, "_stream", lambda device: STREAM)
    monkeypatch.setattr(cusparselt, "_current_device", lambda: -1)  # that of a tensor on a CPU
    say(monkeypatch, True, lib.version)
    assert cusparselt.why_not() is None
    yield lib
    cusparselt._thread = cusparselt._Thread()
    cusparselt._library.cache_clear()
    assert lib.live() == lib.holds(0, handles=0), "a test leaves something"
    assert lib.number("refused").value == lib.refusals


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "_on_gpu", lambda input: True)


def say(monkeypatch: pytest.MonkeyPatch, available: bool, version: int | None) -> None:
    """Has torch say so."""
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: available)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    cusparselt._library.cache_clear()


def whole(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Small whole numbers: their products and sums are exact."""
    return torch.randint(-2, 3, shape).to(dtype)


def layer(
    rows: int, out: int, into: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    """x, weight, bias."""
    return whole(rows, into, dtype=dtype), whole(out, into, dtype=dtype), whole(out, dtype=dtype)


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, algorithm: int = 0) -> None:
    y = cusparselt.product(x, weight, bias, len(weight), algorithm)
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=0, atol=0)


# --- products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", semi.DTYPES)
@pytest.mark.parametrize("shape", [(8, 16, 16), (8, 48, 32), (40, 16, 64), (128, 32, 48)])
def test_product_is_that_of_linear(
    lib: StandIn, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, weight, bias = layer(*shape, dtype)
    for algorithm in range(ALGORITHMS):  # all but 0 want a workspace
        run(x, weight, None, algorithm)
        run(x, weight, bias, algorithm)
    assert ctypes.c_void_p.in_dll(lib.library, "stream_seen").value == STREAM
    assert lib.live() == lib.holds(2 * ALGORITHMS)


@pytest.mark.parametrize("out", [16, 20, 5])
@pytest.mark.parametrize(("rows", "into"), [(8, 16), (3, 16), (17, 36), (1, 4), (0, 16)])
@pytest.mark.usefixtures("on_gpu")
def test_multiply_fills_up_and_cuts(lib: StandIn, rows: int, into: int, out: int) -> None:
    x, weight, bias = layer(rows, out, into)
    compressed = semi._filled(weight, 16, 16).view(torch.uint8)
    odd = whole(rows * into + 1)[1:].view(rows, into), whole(2 * out)[1::2]  # not aligned
    for input, b in [(x, None), (x, bias), odd]:
        y = semi.multiply(input, compressed, compressed.new_empty(0), b, out)
        assert y.is_contiguous()
        torch.testing.assert_close(y, F.linear(input, weight, b), rtol=0, atol=0)


@pytest.mark.usefixtures("lib", "on_gpu")
def test_too_few_bytes_are_refused() -> None:
    x, compressed = whole(8, 32), torch.zeros(16, 36, dtype=torch.uint8)
    meta = compressed[0, :0]
    assert semi.multiply(x, compressed.repeat(1, 2), meta, None, 16).shape == (8, 16)
    with pytest.raises(NMError, match=r"576 bytes are no compressed \(17, 32\) weight"):
        semi.multiply(x, compressed, meta, None, 17)


@pytest.mark.usefixtures("on_gpu")
def test_algorithms_end_where_the_library_refuses(lib: StandIn) -> None:
    x, weight, _ = layer(8, 16, 16)
    compressed = weight.view(torch.uint8)
    found = list(semi.algorithms(x, compressed, compressed.new_empty(0), 16))
    assert found == list(range(ALGORITHMS))
    assert lib.live() == lib.holds(ALGORITHMS)
    lib.refusals = 1


# --- plans -------------------------------------------------------------------------------------


def test_plan_is_kept(lib: StandIn) -> None:
    x, weight, bias = layer(8, 16, 32)
    run(x, weight, bias)
    bias += 1  # the address is in the plan, not what is there
    run(whole(8, 32), whole(16, 32), bias)
    assert lib.made == 1


def test_plan_is_of_rows_bias_algorithm_and_dtype(lib: StandIn) -> None:
    x, weight, bias = layer(8, 16, 32)
    others = [
        (x, weight, bias),
        (whole(16, 32), weight, bias),
        (x, weight, bias.clone()),
        (x, weight, None),
        (x, weight, bias, 1),
        (x.half(), weight.half(), bias.half()),
        (x, whole(32, 32), None),
    ]
    for count, other in enumerate(others, 1):
        run(*other)
        assert lib.made == count


def test_plans_that_are_too_many_are_given_back(
    lib: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cusparselt, "_MOST_PLANS", 3)
    weight = whole(16, 32)

    def new(rows: int) -> bool:
        made = lib.made
        run(whole(rows, 32), weight)
        return lib.made > made

    assert all(new(8 * count) for count in range(1, 4))
    assert not new(8)  # so the one of 16 rows was not asked for the longest
    assert new(32)
    assert lib.live() == lib.holds(3)
    assert [new(rows) for rows in (8, 24, 32)] == [False] * 3
    assert new(16)
    assert lib.live() == lib.holds(3)


def test_refused_algorithm_leaves_nothing(lib: StandIn) -> None:
    x, weight, bias = layer(8, 16, 32)
    for number in (ALGORITHMS, -1):
        with pytest.raises(RuntimeError, match="cusparseLtMatmulAlgSetAttribute answers 3"):
            run(x, weight, bias, number)
        assert lib.live() == lib.holds(0)
    lib.refusals = 2
    run(x, weight, bias)


def test_any_call_that_fails_leaves_nothing(lib: StandIn) -> None:
    x, weight, bias = layer(8, 16, 32)
    calls = 11  # handle, 3 descriptors, product, bias, 2 for the algorithm, plan, workspace, run
    for calls_before in range(calls):
        cusparselt._thread = cusparselt._Thread()
        lib.number("fails_after").value = calls_before
        with pytest.raises(RuntimeError, match=r"cuSPARSELt: cusparseLt\w+ answers 3"):
            run(x, weight, bias)
        plans, handles = int(calls_before == calls - 1), int(calls_before > 0)
        assert lib.live() == lib.holds(plans, handles), calls_before
    lib.number("fails_after").value = -1
    lib.refusals = calls
    run(x, weight, bias)


def test_struct_is_aligned_and_lies_in_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt, "_ALIGNMENT", 256)  # more than any allocator gives by itself
    for memory in [cusparselt._Memory() for _ in range(20)]:
        begin = ctypes.addressof(memory.bytes)
        end = begin + ctypes.sizeof(memory.bytes)
        assert begin <= memory.at <= end - cusparselt._STRUCT
        assert memory.at % 256 == 0


# --- threads and processes ---------------------------------------------------------------------


def test_thread_has_its_own_until_it_ends(lib: StandIn) -> None:
    x, weight, bias = layer(8, 16, 32)
    run(x, weight, bias)
    counts = []

    def other() -> None:
        run(x, weight, bias)
        run(x, weight, bias)
        counts.append((lib.made, lib.live()))

    for _ in range(2):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert lib.live() == lib.holds(1)
    assert counts == [(made, lib.holds(2, handles=2)) for made in (2, 3)]


def test_threads_at_once(lib: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt, "_MOST_PLANS", 2)
    weight, errors = whole(16, 16), []

    def work() -> None:
        try:
            for step in range(30):
                run(whole(8 * (1 + step % 3), 16), weight)
        except Exception as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert lib.live() == lib.holds(0, handles=0)
    assert lib.made == 4 * 30


# After Python's exit functions CUDA may be gone, and in a fork it is; both forget plans.
ENDS = """
import atexit, ctypes, os, sys, threading
count = lambda name: print(name, [library.how_many(kind) for kind in (0, 3)], flush=True)
atexit.register(lambda: count("exit"))  # runs after what is registered later
import torch
from nmfx.kernels import cusparselt
library = ctypes.CDLL(sys.argv[1])
cusparselt._declare(library)
cusparselt._library, cusparselt._stream = lambda: library, lambda device: 0
cusparselt._current_device = lambda: -1
made, end = threading.Event(), threading.Event()
def run():
    x = torch.ones(16, 16).half()
    cusparselt.product(x, x, None, 16, 0)
def work():
    run()
    made.set()
    end.wait()
thread = threading.Thread(target=work)
thread.start()
made.wait()
run()
if os.fork() == 0:
    count("fork")
    os._exit(0)
os.wait()
end.set()
thread.join()
"""


def test_ends_of_processes_leave_the_library_alone(built: tuple[Path, int]) -> None:
    command = (sys.executable, "-W", "ignore", "-c", ENDS, built[0])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert done.stdout.splitlines() == ["fork [2, 2]", "exit [1, 1]"]


# --- the library -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "version", "name", "reason"),
    [
        (False, None, "", "this torch comes without cuSPARSELt"),
        (True, 602, "", "version 602 of cuSPARSELt is none that nmfx knows"),
        (True, 1000000, "", "version 1000000 of cuSPARSELt is none that nmfx knows"),
        (True, 801, "libnone.so.0", "libnone.so.0 cannot be called: .*libnone.so.0.*"),
        (True, 801, "libc.so.6", "libc.so.6 cannot be called: .*cusparseLtInit"),
    ],
)
def test_why_not(
    monkeypatch: pytest.MonkeyPatch, available: bool, version: int, name: str, reason: str
) -> None:
    monkeypatch.setattr(cusparselt, "_NAME", name)
    monkeypatch.setattr(cusparselt, "_current_device", lambda: -1)
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUSPARSELT)
    say(monkeypatch, available, version)
    try:
        found, line = cusparselt.why_not(), semi.status(torch.device("cuda"))
        with pytest.raises(RuntimeError, match=f"^{reason}$"):
            run(*layer(8, 16, 16))
    finally:
        cusparselt._library.cache_clear()
    assert found is not None
    assert line.startswith("semi-structured layers run on cuSPARSELt")
    assert ", through torch" in line
    assert line.endswith(f": {found}")


def test_status_with_the_library(lib: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUSPARSELT)
    line = semi.status(torch.device("cuda"))
    assert line.startswith("semi-structured layers run on cuSPARSELt")
    assert "through torch" not in line


def test_library_that_torch_did_not_load_is_not_called(
    built: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    another = shutil.copy(built[0], tmp_path / "another.so")
    monkeypatch.setattr(cusparselt, "_NAME", str(another))
    say(monkeypatch, True, built[1])
    try:
        assert f"{another} cannot be called" in str(cusparselt.why_not())
    finally:
        cusparselt._library.cache_clear()


def test_a_product_runs_on_the_device_of_its_input(
    lib: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = [3], []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, now[0] = now[0], index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cusparselt, "_current_device", lambda: now[0])
    monkeypatch.setattr(cusparselt, "_stream", lambda device: seen.append((device, now[0])) or 0)
    x, weight = torch.randn(8, 32).half(), torch.randn(16, 32).half()
    y = cusparselt.product(x, weight, None, 16, 0)
    torch.testing.assert_close(y, F.linear(x, weight))
    assert (seen, now) == ([(-1, -1)], [3])
