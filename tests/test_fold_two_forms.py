"""fold of layers that hold their weight in two forms: the dense model again, and again lowered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from two_forms import CALLS, KEEP, TWO, X, dense, sparse, states, timed

import nmfx
from nmfx.mask import same_values


@pytest.mark.parametrize("capture", TWO)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_two_forms_become_the_folded_model(
    capture: str, inplace: bool, loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch)
    model = sparse(capture)
    folded = nmfx.fold(model)
    fast = nmfx.lower(model, CALLS, keep=KEEP)
    assert [states(fast)[name] for name in TWO[capture]] == ["packed+dense"] * len(TWO[capture])
    if loaded:
        nmfx.save(fast, tmp_path / "fast.safetensors")
        fast = nmfx.load(tmp_path / "fast.safetensors", into=dense(capture))
    again = nmfx.fold(fast, inplace=inplace)
    assert (again is fast) == inplace
    assert list(again.state_dict()) == list(folded.state_dict())
    for (name, got), (_, want) in zip(
        again.named_parameters(), folded.named_parameters(), strict=True
    ):
        assert same_values(got, want), name
        assert got.requires_grad, name
    for x in (X[:2], X):
        torch.testing.assert_close(again(x), folded(x))
    again(X).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    faster = nmfx.lower(again, CALLS, keep=KEEP)
    assert [states(faster)[name] for name in TWO[capture]] == ["packed+dense"] * len(TWO[capture])
