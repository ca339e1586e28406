"""A sparsified model computes what the masked reference does, or the audit says why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nmfx
from sweep import reference
from sweep.case import Case, call, outputs
from sweep.compare import Gap, compare, nudge_
from sweep.reference import Measured
from sweep.steps import SILENT, Explained, Note, Wrong, step

# A power of two: lambda * w is then exact, and g + lambda * w is rounded once in any order.
LAMBDA = 2.0**-6


def masks_by_hand(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """Name -> mask of every sparsified parameter, computed from the dense model's weights once.

    The dimension is that of the model's structure; where that does not tell (experts in one 3-D
    parameter), nmfx's own.
    """
    from nmfx.capture.refs import iter_sites

    layers = reference.layer_weights(case.model)
    for ref in iter_sites(model):
        if ref.name not in case.masks:
            dim = layers[ref.name][1] if ref.name in layers else ref.site.dim
            weight = case.model.get_parameter(ref.name)
            case.masks[ref.name] = reference.nm_mask(weight, 2, 4, dim)
    return {ref.name: case.masks[ref.name] for ref in iter_sites(model)}


def sparsified(case: Case, rules: Any = "2:4") -> nn.Module:
    """A fresh copy of the dense model, sparsified."""
    return nmfx.sparsify(case.fresh(), rules, lambda_w=LAMBDA)


def measure(case: Case, model: nn.Module, train: bool) -> Measured:
    """Outputs and gradients of one call."""
    return reference.run(model.train(train), case.inputs_for(train))


class Twins:
    """A sparsified model and its masked reference, of the same weights."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.case, self.model = case, model
        self.masks = masks_by_hand(case, model)
        self.masked = case.fresh()
        self.pruned = reference.mask_(self.masked, self.masks)

    def wanted(self, train: bool) -> Measured:
        """The reference's outputs and gradients."""
        inputs = self.case.inputs_for(train)
        return reference.masked(self.masked.train(train), inputs, self.pruned, LAMBDA)

    def inference(self) -> Gap:
        """How far outputs without gradients are apart."""
        with torch.no_grad():
            wanted = outputs(call(self.masked.eval(), self.case.inputs_for(False)))
            got = outputs(call(self.model.eval(), self.case.inputs_for(False)))
        return compare(got, wanted)


def check_against_reference(case: Case, model: nn.Module, note: Note) -> None:
    """Verify; outputs with and without gradients, and gradients, in eval and train mode."""
    raw: dict[str, set[str]] = {}
    with step(note, "verify"):
        raw = _verify(case, model)
        note("raw", sorted(raw))
        if raw:
            raise Explained(_raw_text(raw))
    twins = Twins(case, model)
    with step(note, "no_grad"):
        # torch's fused inference paths round differently from what nmfx makes of them.
        gap = twins.inference()
        if gap.wrong(1e-5):
            gap = Twins(case, sparsified(case)).inference()
        _judge(gap, raw, 1e-5)
    with step(note, "eval"):
        _check_mode(twins, twins.wanted(False), raw, False, note)
    wanted = _wanted_in_training(twins, note)
    if wanted is not None:
        with step(note, "train"):
            _check_mode(twins, wanted, raw, True, note)


def _verify(case: Case, model: nn.Module) -> dict[str, set[str]]:
    torch.manual_seed(0)
    inputs = case.inputs_for(False)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return nmfx.verify(model, *args, **kwargs)


def _raw_text(raw: dict[str, set[str]]) -> str:
    name = sorted(raw)[0]
    return f"verify names {len(raw)}: {name} read by {', '.join(sorted(raw[name]))}"


def _wanted_in_training(twins: Twins, note: Note) -> Measured | None:
    try:
        return twins.wanted(True)
    except Exception as error:  # noqa: BLE001 (the dense model's own)
        note("train", f"n/a: dense does not: {type(error).__name__}: {error}"[:200])
        return None


def _check_mode(twins: Twins, wanted: Measured, raw: Any, train: bool, note: Note) -> None:
    case = twins.case
    got = measure(case, twins.model, train)
    gap = gap_of(got, wanted)
    if not train:
        used = sum(got.grads[name] is not None for name in twins.masks)
        note("exact", gap.equal)
        note("reached", f"{used} of {len(twins.masks)}")
    if not gap.wrong(1e-5):
        return
    if raw:
        _check_without(case, raw, train)
    again = Twins(case, sparsified(case))  # a model that keeps state may differ in later calls
    gap = gap_of(measure(case, again.model, train), again.wanted(train))
    _judge(gap, raw, _tolerance(case, train))


def gap_of(got: Measured, wanted: Measured) -> Gap:
    """The larger gap, of outputs or of gradients."""
    gap = compare(got.outputs, wanted.outputs)
    if gap.wrong(0.0):
        gap.what = f"output {gap.what}"
    scale = max((float(g.abs().max()) for g in wanted.grads.values() if _has(g)), default=0.0)
    for name, want in wanted.grads.items():
        grad = got.grads[name]
        if (grad is None) != (want is None):
            return Gap(float("inf"), f"gradient of {name}: {_none(grad)}, reference {_none(want)}")
        if grad is not None and want is not None:
            one = compare([grad], [want], floor=1e-3 * scale)
            if one.size > gap.size:
                gap = Gap(one.size, f"gradient of {name}", False)
            gap.equal &= one.equal
    return gap


def _has(grad: Tensor | None) -> bool:
    return grad is not None and grad.numel() > 0


def _none(grad: Tensor | None) -> str:
    return "none" if grad is None else "one"


def _tolerance(case: Case, train: bool) -> float:
    """Rounding of sums in another order: more where the dense model itself moves more.

    It does not repeat itself, or a change of its weights in the last digits moves its gradients as
    far, of which up to a thousandth is taken for rounding.
    """
    first, second = (measure(case, case.fresh(), train) for _ in range(2))
    repeated = gap_of(second, first).size
    moved = gap_of(measure(case, nudge_(case.fresh(), 0), train), first).size
    return max(1e-5, 10 * repeated, min(moved, 1e-3))


def _judge(gap: Gap, raw: Any, most: float) -> None:
    if not gap.wrong(most):
        return
    if raw:
        raise Explained(f"differs by {gap.size:.1e} where the raw reads are")
    raise Wrong(f"{SILENT}: {gap.what} differs by {gap.size:.1e} and verify names nothing")


def _check_without(case: Case, raw: dict[str, set[str]], train: bool) -> None:
    """With what verify named kept dense, everything else must be exact."""
    rules = {name.rpartition(".")[0]: None for name in raw} | {"*": "2:4"}
    model = nmfx.sparsify(case.fresh(), rules, lambda_w=LAMBDA)
    left = _verify(case, model)
    twins = Twins(case, model)
    gap = gap_of(measure(case, model, train), twins.wanted(train))
    if left or gap.wrong(_tolerance(case, train)):
        raise Wrong(f"{SILENT}: without what verify names {gap.what} differs by {gap.size:.1e}")
    raise Explained(f"raw reads named by verify ({len(raw)}); with these dense, equal")
