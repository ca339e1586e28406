"""Modes are restored, also when Ctrl-C comes while they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nmfx.calls import evaluation_mode


class Interrupted(nn.Linear):
    """Ctrl-C comes once, when it is put back into training."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "training" and value and "waiting" in self.__dict__:
            del self.__dict__["waiting"]
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def test_an_interrupt_while_modes_are_restored_leaves_none() -> None:
    model = nn.Sequential(nn.ReLU(), Interrupted(2, 2), nn.Dropout(), nn.ReLU().eval())
    before = [module.training for module in model.modules()]
    model[1].__dict__["waiting"] = True
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model, [((torch.ones(2),), {})]):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
