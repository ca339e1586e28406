"""Which of cuSPARSELt's algorithms a layer uses: found by measurement, kept, saved, used.

On the CPU: CUTLASS's form stands in for cuSPARSELt's, and has algorithms because the tests say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from fake_timer import install
from test_lower_semi_structured import SEMI_WINS, Mlp, Reads, X
from torch import Tensor, fx, nn

import nmfx
from nmfx.capture.refs import iter_sites
from nmfx.kernels import semi_structured as semi
from nmfx.ops import linear_semi_structured as op
from nmfx.tuning import algorithms, bench, layers, timer


@pytest.fixture(autouse=True)
def _cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, algorithm) of every product; the fastest is 10 + rows."""
    found: list[tuple[int, int]] = []
    multiply = semi.multiply

    def watched(x: Tensor, *rest: object) -> Tensor:
        found.append((len(x), int(rest[-1])))  # type: ignore[call-overload]
        return multiply(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(op, "multiply", watched)
    monkeypatch.setattr(layers, "fastest_algorithm", lambda x, *rest: 10 + len(x))
    return found


@pytest.mark.parametrize("capture", ["leaf", "graph"])
def test_each_number_of_rows_gets_its_algorithm(
    capture: str, used: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, SEMI_WINS)
    make: Callable[[], nn.Module] = (
        (lambda: fx.symbolic_trace(Reads())) if capture == "graph" else lambda: Mlp().bfloat16()
    )
    model = nmfx.sparsify(make().eval(), {"": "2:4"} if capture == "graph" else "2:4").eval()
    fast = nmfx.lower(model, [(X,), (X[:1],)])
    chosen = {ref.site.algorithms for ref in iter_sites(fast) if ref.site.format}
    assert chosen == {(1, 11, 3, 13)}
    nmfx.save(fast, tmp_path / "fast.safetensors")
    loaded = nmfx.load(tmp_path / "fast.safetensors", into=make().eval())
    for one in (fast, loaded):
        for rows, algorithm in ((1, 11), (3, 13), (9, 13)):
            used.clear()
            one(X.repeat(3, 1)[:rows])
            assert set(used) == {(rows, algorithm)}


def test_a_time_is_remembered_with_its_algorithm(
    used: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NMFX_CACHE", "1")
    monkeypatch.setenv("NMFX_CACHE_DIR", str(tmp_path))
    timed = install(monkeypatch, SEMI_WINS)
    model = nmfx.sparsify(Mlp().bfloat16(), "2:4").eval()
    first = nmfx.lower(model, (X,))
    monkeypatch.setattr(layers, "fastest_algorithm", lambda x, *rest: 20)
    again = nmfx.lower(model, (X,))
    assert timed is not None
    one, other = (
        {ref.name: ref.site.algorithms for ref in iter_sites(m) if ref.site.lowered}
        for m in (first, again)
    )
    assert one == other
    assert set(one.values()) == {(3, 13)}


def test_other_choices_of_the_same_form(
    used: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state_dict holds weights, and fits; a file holds choices too, and says that they differ."""
    install(monkeypatch, SEMI_WINS)
    model = nmfx.sparsify(Mlp().bfloat16(), "2:4").eval()
    one, other = nmfx.lower(model, (X,)), nmfx.lower(model, (X[:1],))
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(X), one(X))
    nmfx.save(one, tmp_path / "one.safetensors")
    with pytest.raises(nmfx.NMError, match=r"algorithms \[1, 11\]\) in the model and semi_struct"):
        nmfx.load(tmp_path / "one.safetensors", into=other)


@pytest.mark.parametrize("bad", [(3,), (3, 64), (3, 1, 3, 2)])
def test_a_file_with_algorithms_that_are_none_is_refused(
    bad: tuple[int, ...],
    used: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, SEMI_WINS)
    fast = nmfx.lower(nmfx.sparsify(Mlp().bfloat16(), "2:4").eval(), (X,))
    ref = next(ref for ref in iter_sites(fast) if ref.site.format)
    ref.site.algorithms = bad
    nmfx.save(fast, tmp_path / "bad.safetensors")
    with pytest.raises(nmfx.NMError, match=r"algorithms=\["):
        nmfx.load(tmp_path / "bad.safetensors", into=Mlp().bfloat16().eval())


def test_the_names_of_times_hold_the_algorithm() -> None:
    ms: Mapping[str, float] = {"dense": 2.0, "semi_structured@17": 1.0}
    assert bench._without_algorithms(ms) == {"dense": 2.0, "semi_structured": 1.0}


@pytest.mark.parametrize("wrong", [(), (2,), (2, 1)])
def test_the_fastest_that_is_right_is_taken(
    wrong: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four algorithms; the higher the number the faster."""
    x, out = torch.ones(2, 4), torch.ones(2, 3)

    def multiply(
        x: Tensor, compressed: Tensor, meta: Tensor, bias: None, out: int, number: int
    ) -> Tensor:
        if number > 2:
            raise RuntimeError("no such algorithm")
        return torch.zeros(2, out) if number in wrong else torch.ones(2, out)

    monkeypatch.setattr(semi, "multiply", multiply)
    monkeypatch.setattr(semi, "_on_gpu", lambda input: True)
    monkeypatch.setattr(
        timer, "measure", lambda runs, **rest: {name: 3.0 - int(name) for name in runs}
    )
    empty = torch.empty(0)
    found = algorithms.fastest_algorithm(x, empty, empty, None, out)
    assert found == max({0, 1, 2} - set(wrong))


def test_no_algorithm_that_is_right_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "_on_gpu", lambda input: True)
    monkeypatch.setattr(semi, "_MOST_ALGORITHMS", 3)
    monkeypatch.setattr(semi, "multiply", lambda *rest: torch.zeros(2, 3))
    monkeypatch.setattr(timer, "measure", lambda runs, **rest: dict.fromkeys(runs, 1.0))
    empty = torch.empty(0)
    with pytest.raises(nmfx.NMError, match="all 3 algorithms differ from dense"):
        algorithms.fastest_algorithm(torch.ones(2, 4), empty, empty, None, torch.ones(2, 3))
