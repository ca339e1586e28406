"""What PEFT has put into a model: its adapters, and the layers that they are wrapped around.

    q_proj                    lora.Linear        y = base_layer(x) + lora_B(lora_A(x))
      base_layer              nn.Linear          frozen; N:M sparse like any layer
      lora_A.default ...      nn.Linear          trained; dense: small, and of low rank already

Told by their base classes' names: importing peft takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Adapted:
    """What a module has to do with PEFT.

    Attributes:
        reason: why it stays dense.
        added: whether it is part of an adapter, and not of the model that was adapted.
    """

    reason: str
    added: bool


# Whose forward is base_layer(x) and something of x, so that only that layer reads its weight;
# others make another weight of it (DoRA, HRA, BOFT of a convolution). tests/test_peft.py tries.
_CALLS_BASE = {
    f"peft.tuners.{name}.layer" for name in ("lora", "adalora", "ia3", "loha", "lokr", "vera")
}


def find_adapted(model: nn.Module) -> dict[nn.Module, Adapted]:
    """The modules that adapters consist of, and those that cannot be sparse because of one."""
    found: dict[nn.Module, Adapted] = {}
    for module in model.modules():
        if _derives(module, "BaseTunerLayer", "peft.tuners.tuners_utils"):
            _take_layer(module, found)
        elif _derives(module, "ModulesToSaveWrapper", "peft.utils.other"):
            reason = "PEFT trains a copy of it in full (modules_to_save), which stays dense"
            for below in module.modules():
                found.setdefault(below, Adapted(reason, added=False))
    return found


def _take_layer(layer: nn.Module, found: dict[nn.Module, Adapted]) -> None:
    for name, child in layer.named_children():
        if name == "base_layer":
            reader = _reader(layer)
            if reader is not None:
                reason = (
                    f"the {reader} adapter around it may read its weight past the mask; sparsify "
                    f"and nmfx.fold the model before get_peft_model"
                )
                for below in child.modules():
                    found.setdefault(below, Adapted(reason, added=False))
        else:
            reason = f"it is {name} of a PEFT adapter, and adapters stay dense"
            for below in child.modules():
                found.setdefault(below, Adapted(reason, added=True))


def _reader(layer: nn.Module) -> str | None:
    """The name of an adapter that may read the weight of its base layer around that layer."""
    variants = sorted({type(v).__name__ for v in getattr(layer, "lora_variant", {}).values()})
    if variants:  # DoRA, for one
        return variants[0]
    name = type(layer).__name__
    if type(layer).__module__ not in _CALLS_BASE:
        return name
    return name if name in ("MultiheadAttention", "ParamWrapper") else None  # they merge per call


def _derives(module: nn.Module, name: str, where: str) -> bool:
    return any(c.__name__ == name and c.__module__ == where for c in type(module).__mro__)
