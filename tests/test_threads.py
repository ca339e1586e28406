"""Threads: tracing does not disturb models that others run, and models may be shared."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import nmfx
from nmfx.capture.generate import generated_class
from nmfx.capture.tracer import ThreadAwareTracer


def together(*jobs: Callable[[], Any]) -> None:
    """Runs jobs at once, started by a barrier; raises the first error of any."""
    barrier, errors = threading.Barrier(len(jobs)), []

    def run(job: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            job()
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def plain(layers: int = 12) -> nn.Module:
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(8, 8), nn.Tanh())])


def test_plain_models_run_while_others_trace() -> None:
    """The symbolic tracer of fx patches nn.Module for the whole process while it runs."""
    original = nn.Module.__call__, nn.Module.__getattr__
    done, runs, traces = threading.Event(), [0], [0]
    sparse = nmfx.sparsify(plain(), "2:4")

    def trace() -> None:
        for _ in range(20):
            gm = nmfx.trace(sparse)
            assert sum("sr_ste" in str(n.target) for n in gm.graph.nodes) == 11
            traces[0] += 1

    def first() -> None:
        try:
            trace()
        finally:
            done.set()

    def run() -> None:
        model, x = plain(), torch.randn(2, 8)
        expected = model(x)
        while not done.is_set():
            assert torch.equal(model(x), expected)
            runs[0] += 1

    together(first, trace, run, run)
    assert traces[0] == 40
    assert runs[0] > 0, "nothing ran beside the tracing"
    assert (nn.Module.__call__, nn.Module.__getattr__) == original


class Meets(nn.Module):
    """Lets another thread run in the middle of its being traced."""

    def __init__(self, during: Callable[[], None]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.during = during

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        self.during()
        return self.fc(h)


def test_a_module_that_another_thread_runs_is_not_recorded() -> None:
    """Deterministic: the other thread runs exactly while this one traces."""
    other, x, results = plain(2), torch.randn(2, 8), []
    expected = other(x)

    def during() -> None:
        thread = threading.Thread(target=lambda: results.append(other(x)))
        thread.start()
        thread.join()

    graph = ThreadAwareTracer().trace(Meets(during))
    assert [node.op for node in graph.nodes].count("call_module") == 2
    assert len(results) == 1
    assert torch.equal(results[0], expected)


def test_the_traced_model_itself_runs_in_another_thread() -> None:
    """Reading its parameters gives this thread tensors, and the tracing one proxies."""
    results: list[Any] = []
    x = torch.randn(2, 8)

    def during() -> None:
        thread = threading.Thread(target=lambda: results.append(model.fc(x)))
        thread.start()
        thread.join()

    model = Meets(during)
    expected = model.fc(x)
    graph = ThreadAwareTracer().trace(model)
    assert [node.op for node in graph.nodes] == ["placeholder", *["call_module"] * 2, "output"]
    assert type(results[0]) is Tensor
    assert torch.equal(results[0], expected)


def test_two_traces_wait_for_each_other() -> None:
    order: list[str] = []

    def during() -> None:
        thread = threading.Thread(
            target=lambda: (ThreadAwareTracer().trace(plain(1)), order.append("second"))
        )
        thread.start()
        thread.join(0.2)
        order.append("first")
        threads.append(thread)

    threads: list[threading.Thread] = []
    ThreadAwareTracer().trace(Meets(during))
    threads[0].join()
    assert order == ["first", "second"]


def test_sparsify_patches_nothing() -> None:
    """Leaf tracing needs no lock: no other thread can see it."""
    seen = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(looked(x))

    def looked(x: Any) -> Any:
        seen.append((nn.Module.__call__, nn.Module.__getattr__))
        return x

    original = nn.Module.__call__, nn.Module.__getattr__
    nmfx.sparsify(Looks(8, 8), "2:4")(torch.randn(1, 8))
    assert set(seen) == {original}


def test_threads_sparsify_their_own_models_while_others_run() -> None:
    expected_types = [type(m) for m in nmfx.sparsify(plain(), "2:4").modules()]
    done = threading.Event()
    dense, x = plain(), torch.randn(2, 8)
    reference = nmfx.sparsify(copy.deepcopy(dense), "2:4")(x)

    def sparsify(m: int) -> Callable[[], None]:
        def job() -> None:
            for _ in range(8):
                model = nmfx.sparsify(copy.deepcopy(dense), f"1:{m}")
                nmfx.freeze(model)
                nmfx.unfreeze(model)
                nmfx.set_pattern(model, "2:4")
                assert torch.equal(model(x), reference)
                assert [type(m) for m in model.modules()] == expected_types

        return job

    def run() -> None:
        expected = dense(x)
        while not done.is_set():
            assert torch.equal(dense(x), expected)

    def jobs() -> None:
        try:
            together(sparsify(2), sparsify(4), sparsify(8))
        finally:
            done.set()

    together(jobs, run)


def test_a_class_is_made_once_when_threads_ask_in_the_middle_of_its_making() -> None:
    made: list[type] = []

    def forward() -> Callable[..., Any]:
        made.append(nn.Linear)
        time.sleep(0.05)
        return nn.Linear.forward

    def make() -> None:
        classes.append(generated_class(nn.Linear, ("test of threads",), forward))

    classes: list[type] = []
    together(make, make, make)
    assert len(made) == 1
    assert len(set(classes)) == 1


def test_one_class_is_made_when_threads_ask_at_once() -> None:
    class Fresh(nn.Linear):
        pass

    layers = [Fresh(8, 8) for _ in range(8)]
    together(*[lambda layer=layer: nmfx.sparsify(layer, "2:4") for layer in layers])
    assert len({type(layer) for layer in layers}) == 1


@pytest.mark.parametrize("kind", ["attention", "branches", "leaf"])
def test_threads_share_one_sparsified_module(kind: str) -> None:
    class Branches(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    class Self(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x, x, need_weights=False)[0]

    build = {"attention": lambda: Self(8, 2), "branches": lambda: Branches(8, 8)}
    model = nmfx.sparsify(build.get(kind, lambda: nn.Linear(8, 8))(), "2:4")
    inputs = [torch.randn(5, 3, 8) for _ in range(4)]
    expected = [model(x) for x in inputs]
    raw = {name: p.clone() for name, p in model.named_parameters()}

    def job(i: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(50):
                assert torch.equal(model(inputs[i]), expected[i])

        return run

    def watch() -> None:
        for _ in range(200):
            for name, p in model.named_parameters():
                assert torch.equal(p, raw[name]), f"{name}: a masked weight became visible"

    together(*[job(i) for i in range(4)], watch)


class Slow(nn.Linear):
    """Its forward lets another thread in between reading the weight and using it."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1):
            weight = self.weight
            self.meet()
        assert self.weight is weight
        return super().forward(x)

    def meet(self) -> None:
        MEETING.wait(timeout=20)


MEETING = threading.Barrier(2)


def test_two_threads_inside_one_scoped_forward_see_masked_weights() -> None:
    """Deterministic: both threads are inside the forward at the same time."""
    model, x = nmfx.sparsify(Slow(8, 8), "2:4"), torch.randn(3, 8)
    assert nmfx.report(model).rows[0].capture == "scoped"
    results: list[Tensor] = []
    together(lambda: results.append(model(x)), lambda: results.append(model(x)))
    mask = nmfx.masks(model)["weight"]
    expected = nn.functional.linear(x, torch.where(mask, model.weight, 0.0), model.bias)
    assert torch.equal(results[0], expected)
    assert torch.equal(results[1], expected)
    assert isinstance(model.weight, nn.Parameter)


def test_gradients_of_threads_add_up() -> None:
    model = nmfx.sparsify(nn.MultiheadAttention(8, 2), "2:4", lambda_w=0.0)
    x = torch.randn(5, 3, 8)

    def step() -> None:
        model(x, x, x)[0].sum().backward()

    step()
    single = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    together(step, step, step, step)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 4 * single[name], msg=name)


def test_fx_itself_would_break() -> None:
    """What the thread-aware tracer is for; if this fails, torch has fixed it."""
    other, x, errors = plain(2), torch.randn(2, 8), []

    def run() -> None:
        try:
            other(x)
        except NameError as error:
            errors.append(error)

    def during() -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    fx.Tracer().trace(Meets(during))
    assert "module is not installed as a submodule" in str(errors[0])
