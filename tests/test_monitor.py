"""nmfx.Monitor: what it measures, what it costs in memory, and that it can be resumed."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nmfx
from nmfx.capture.refs import iter_sites
from nmfx.mask_bits import count_ones, mask_bits
from nmfx.metrics import kept_energy
from nmfx.schedule import masked_and_mask, site_mask

X = torch.linspace(-2, 2, 64).sin().reshape(4, 16)


def make() -> nn.Module:
    return nmfx.sparsify(
        nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)), {"0": "2:4", "2": "1:8"}
    )


def train(model: nn.Module, steps: int, monitor: Any = None) -> list[dict[str, float]]:
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        if monitor is not None:
            found.append(monitor.step())
    return found


@given(st.integers(0, 400), st.integers(0, 2**32))
def test_bits_are_counted_exactly(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=generator) < 0.3
    bits = mask_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-size // 64) * 8
    assert int(count_ones(bits)) == int(mask.sum())
    other = torch.rand(size, generator=generator) < 0.7
    assert int(count_ones(bits ^ mask_bits(other))) == int((mask != other).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fast_mask_is_the_mask_also_where_zeros_are_kept(dtype: torch.dtype) -> None:
    model = nmfx.sparsify(
        nn.Sequential(nn.Linear(16, 8), nn.Conv2d(8, 8, 3)).to(dtype), {"*": "2:4"}
    )
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].weight[1, :3] = -0.0
        model[1].weight[2:4] = 0.0
    for ref in iter_sites(model):
        masked, mask = masked_and_mask(ref)
        assert torch.equal(mask, site_mask(ref))
        assert torch.equal(masked, torch.where(mask, ref.parameter, 0.0))
    nmfx.freeze(model)
    for ref in iter_sites(model):
        assert torch.equal(masked_and_mask(ref)[1], site_mask(ref))


def test_values_against_masks_taken_by_hand() -> None:
    model = make()
    monitor = nmfx.Monitor(model, every=3)
    start = nmfx.masks(model)
    assert train(model, 2, monitor) == [{}, {}]
    (values,) = train(model, 1, monitor)
    now = nmfx.masks(model)
    assert values["nmfx/step"] == 3
    sizes = {name: mask.numel() for name, mask in now.items()}
    flips = nmfx.sad(start, now)
    for name, size in sizes.items():
        assert values[f"nmfx/flips_per_step/{name}"] == flips.per_layer[name] / size / 3
        assert values[f"nmfx/sad_since_start/{name}"] == flips.per_layer[name] / size
        weight = model.get_parameter(name)
        assert values[f"nmfx/kept_energy/{name}"] == pytest.approx(kept_energy(weight, now[name]))
        assert values[f"nmfx/lambda_w/{name}"] == 2e-4
    assert values["nmfx/density/0.weight"] == 0.5
    assert values["nmfx/density/2.weight"] == 0.125
    assert values["nmfx/flips_per_step"] == flips.per_weight / 3
    assert flips.total > 0
    # The next one counts from this one, and the distance still from the start.
    second = train(model, 3, monitor)[-1]
    later = nmfx.masks(model)
    assert second["nmfx/flips_per_step"] == nmfx.sad(now, later).per_weight / 3
    assert second["nmfx/sad_since_start"] == nmfx.sad(start, later).per_weight
    assert [point["nmfx/step"] for point in monitor.history] == [3, 6]


def test_frozen_layers_neither_flip_nor_decay_and_other_layers_come_and_go() -> None:
    model = make()
    monitor = nmfx.Monitor(model, every=1)
    nmfx.freeze(model)
    values = train(model, 1, monitor)[0]
    assert values["nmfx/flips_per_step"] == 0.0
    assert values["nmfx/lambda_w"] == 0.0
    nmfx.unfreeze(model)
    nmfx.set_pattern(model, {"0": "1:4"})
    assert monitor.step()["nmfx/density/0.weight"] == 0.25
    model.append(nn.Linear(16, 8))
    nmfx.sparsify(model, {"3": "2:4"})
    assert monitor.step()["nmfx/sad_since_start/3.weight"] == 0.0
    lowered = nmfx.lower(model, tune=False)
    with pytest.raises(nmfx.NMError, match="lowered"):
        nmfx.Monitor(lowered)
    nmfx.lower(model, inplace=True, tune=False)
    count = len(monitor.history)
    assert monitor.step() == {}
    assert len(monitor.history) == count


def test_training_is_the_same_with_and_without() -> None:
    torch.manual_seed(1)
    one = make()
    torch.manual_seed(1)
    two = make()
    train(one, 5)
    state = torch.random.get_rng_state()
    train(two, 5, nmfx.Monitor(two, every=1))
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


def test_without_every_it_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("nmfx.monitor.time.perf_counter", lambda: clock[0])
    model = make()
    monitor = nmfx.Monitor(model, budget=0.02)
    measure = monitor._measure

    def slow() -> dict[str, float]:
        clock[0] += 0.3
        return measure()

    monkeypatch.setattr(monitor, "_measure", slow)
    monitor.measure()
    measured = 0
    for _ in range(3000):
        clock[0] += 0.1
        measured += bool(monitor.step())
    assert 0.8 < measured * 0.3 / (0.02 * 300) <= 1.0
    monitor = nmfx.Monitor(model, budget=1.0)
    clock[0] += 1.0
    assert monitor.step()


def test_memory_is_bounded() -> None:
    model = make()
    monitor = nmfx.Monitor(model, every=1, history=5)
    train(model, 20, monitor)
    assert len(monitor.history) == 5
    held = {id(t): t.nbytes for table in (monitor._start, monitor._latest) for t in table.values()}
    assert sum(held.values()) <= 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1) // 8


def test_a_resumed_monitor_goes_on_as_if_nothing_had_happened() -> None:
    model = make()
    monitor = nmfx.Monitor(model, every=2)
    train(model, 5, monitor)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "monitor": monitor.state_dict()}, file)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    other = make()
    other.load_state_dict(content["model"])
    resumed = nmfx.Monitor(other, every=2)
    resumed.load_state_dict(content["monitor"])
    assert list(resumed.history) == list(monitor.history)
    assert train(model, 4, monitor) == train(other, 4, resumed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.update(version=9),
        lambda s: s.pop("step"),
        lambda s: s.update(start=3),
        lambda s: s["start"].popitem(),
        lambda s: s["latest"].update({"0.weight": torch.zeros(3)}),
        lambda s: s.update(history=[{"a": "b"}]),
        lambda s: s.update(history=7),
    ],
)
def test_a_state_that_is_none_is_refused(damage: Callable[[Any], Any]) -> None:
    model = make()
    monitor = nmfx.Monitor(model, every=1)
    train(model, 2, monitor)
    state, before = monitor.state_dict(), list(monitor.history)
    damage(state)
    with pytest.raises(nmfx.NMError):
        monitor.load_state_dict(state)
    assert list(monitor.history) == before
    assert train(model, 1, monitor)[0]["nmfx/step"] == 3


def test_a_table_for_spreadsheets(tmp_path: Path) -> None:
    model = make()
    monitor = nmfx.Monitor(model, every=1)
    train(model, 3, monitor)
    path = tmp_path / "history.csv"
    monitor.to_csv(path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["nmfx/step"]) for row in rows] == [1, 2, 3]


def test_bad_arguments() -> None:
    for bad in ({"every": 0}, {"every": 1.5}, {"budget": 0}, {"budget": 2}, {"history": 0}):
        with pytest.raises(nmfx.NMError, match=next(iter(bad))):
            nmfx.Monitor(make(), **bad)  # type: ignore[arg-type]
    with pytest.raises(nmfx.NMError, match="no sparsified layer"):
        nmfx.Monitor(nn.Linear(4, 4))
