"""What a model must hold before, while and after it is sparse, step by step.

Every step is "pass", "explained: why" (the audit named what the masked reference cannot know),
"nmerror: its text" or "fail: what". A wrong result that `nmfx.verify` does not name is a failure
whose text starts with SILENT: no user would have seen it.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import nmfx
from sweep import reference
from sweep.case import Case, call, outputs, probe_loss
from sweep.compare import Gap, compare, within
from sweep.equality import LAMBDA, gap_of, masks_by_hand, measure, sparsified
from sweep.reference import Measured
from sweep.steps import SILENT, Explained, Note, Wrong, step

# nmfx.masks sorts; above so many weights what folding keeps, and outputs, tell as much.
MASKS_READ = 3_000_000


def check_install(case: Case, note: Note) -> nn.Module | None:
    """Sparsify, keys, identity, the report; the sparsified model, if there is one."""
    model = case.fresh()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    modes = [module.training for module in model.modules()]
    done = False
    with step(note, "sparsify"):
        returned = nmfx.sparsify(model, "2:4", lambda_w=LAMBDA)
        if returned is not model:
            raise Wrong("another object was returned")
        if list(model.state_dict()) != keys:
            raise Wrong("state_dict has other keys")
        after = dict(model.named_parameters())
        if list(after) != list(parameters) or any(after[k] is not p for k, p in parameters.items()):
            raise Wrong("the parameters are other objects")
        if [module.training for module in model.modules()] != modes:
            raise Wrong("a training flag changed")
        done = True
    if not done:
        return None
    with step(note, "report"):
        _check_report(case, model, note)
    return model


def _check_report(case: Case, model: nn.Module, note: Note) -> None:
    rows = {row.fqn: row for row in nmfx.report(model).rows}
    parameters = dict(case.model.named_parameters(remove_duplicate=False))
    names: dict[int, set[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), set()).add(name)
    layers = {n for n in reference.layer_weights(case.model) if n in parameters}
    missing = [name for name in layers if not names[id(parameters[name])] & rows.keys()]
    if missing:
        raise Wrong(f"{len(missing)} weights are not listed, the first: {missing[0]}")
    silent = [name for name, row in rows.items() if row.pattern is None and not row.reason]
    if silent:
        raise Wrong(f"{silent[0]} stays dense without a reason")
    wanted = masks_by_hand(case, model)
    parts = nmfx.masks(model) if sum(m.numel() for m in wanted.values()) < MASKS_READ else {}
    for name, mask in parts.items():
        if not torch.equal(mask, wanted[name]):
            raise Wrong(f"{name}: {int((mask != wanted[name]).sum())} mask entries differ")
    unique = {id(p): p.numel() for p in case.model.parameters()}
    sparse = sum(mask.numel() for mask in wanted.values())
    note("share", sparse / max(sum(unique.values()), 1))
    listed = {id(parameters[name]) for name in rows if name in parameters}
    large = [
        name
        for name, p in case.model.named_parameters()
        if p.ndim > 2 and id(p) not in listed and p.numel() >= 1024
    ]
    note("unlisted", large[:4])


def check_training(case: Case, model: nn.Module, note: Note, steps: int = 3) -> nn.Module:
    """A few optimizer steps; returns the trained model in eval mode."""
    with step(note, "steps"):
        train = note("get", "train")
        _train(case, model, steps, not str(train).startswith("n/a"))
    return model.eval()


def _train(case: Case, model: nn.Module, steps: int, train: bool) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train(train)
    for _ in range(steps):
        optimizer.zero_grad()
        result = call(model, case.inputs_for(train))
        loss = probe_loss(result)
        if not loss.requires_grad:
            raise Wrong("no output has a gradient")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    if not moved:
        raise Wrong("no parameter moved")
    bad = [n for n, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise Wrong(f"{bad[0]} is not finite after {steps} steps")


def check_after(case: Case, model: nn.Module, note: Note, tune: bool = False) -> None:
    """Fold, lower, save and load of a trained model in eval mode."""
    inputs = case.inputs_for(False)
    with torch.no_grad():
        wanted = outputs(call(model, case.inputs_for(False)))
    folded = None
    with step(note, "fold"):
        folded = nmfx.fold(model)
        _check_folded(case, folded, wanted, note("get", "raw"))
    lowered = None
    with step(note, "lower"):
        lowered = nmfx.lower(model, inputs, tune=tune)
        got = _inference(case, lowered)
        base = wanted if folded is None else _inference(case, folded)
        _close(case, got, base, folded)
        forms = [row.state for row in nmfx.report(lowered).rows]
        note("packed", f"{sum('packed' in form for form in forms)} of {len(forms)}")
    with tempfile.TemporaryDirectory() as folder, step(note, "save"):
        _check_file(case, model, Path(folder) / "trained.safetensors", wanted)
        if lowered is not None:
            got = _inference(case, lowered)
            _check_file(case, lowered, Path(folder) / "lowered.safetensors", got)


def _inference(case: Case, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return outputs(call(model, case.inputs_for(False)))


def _check_folded(case: Case, folded: nn.Module, wanted: list[Tensor], raw: Any) -> None:
    dense = case.model
    if list(folded.state_dict()) != list(dense.state_dict()):
        raise Wrong("state_dict has other keys")
    for (name, old), (_, new) in zip(dense.named_modules(), folded.named_modules(), strict=True):
        if type(old) is not type(new):
            raise Wrong(f"{name} is a {type(new).__name__}, was {type(old).__name__}")
    if raw and compare(_inference(case, folded), wanted).wrong(1e-5):
        raise Explained("raw reads, which verify names, see the zeros once they are folded")
    _close(case, _inference(case, folded), wanted, folded, 1e-5)


def _close(
    case: Case, got: list[Tensor], wanted: list[Tensor], model: Any, most: float = 1e-4
) -> None:
    gap = compare(got, wanted)
    if gap.wrong(most) and not (model is not None and within(case, model, gap)):
        raise Wrong(f"{SILENT}: {gap.what} differs by {gap.size:.1e}")


def _check_file(case: Case, model: nn.Module, path: Path, wanted: list[Tensor]) -> None:
    nmfx.save(model, path)
    plain = case.fresh()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.5)  # so that what is not loaded shows
    gap = compare(_inference(case, nmfx.load(path, into=plain).eval()), wanted)
    if gap.wrong(1e-5):
        raise Wrong(f"{SILENT}: {path.stem} reloaded: {gap.what} differs by {gap.size:.1e}")


def check_compiled(case: Case, note: Note) -> None:
    """torch.compile (aot_eager, graph breaks allowed) equals eager wherever dense compiles."""
    wanted = measure(case, sparsified(case), False)
    failure = None
    with step(note, "compile"):
        try:
            got = _compiled(case, sparsified(case))
        except nmfx.NMError:
            raise
        except Exception as error:  # noqa: BLE001 (dense decides whose it is)
            failure = error
        if failure is None:
            gap = gap_of(got, wanted)
            wrong = gap.wrong(1e-4) and not _dense_compiled_differs(case, gap)
            if wrong and not _equal_in_float64(case):
                raise Wrong(f"{SILENT}: compiled, {gap.what} differs by {gap.size:.1e}")
            return
        try:
            _compiled(case, case.fresh())
        except Exception as error:
            raise Explained(f"dense does not compile: {type(error).__name__}") from error
        raise failure


def _compiled(case: Case, model: nn.Module) -> Measured:
    torch._dynamo.reset()
    model.eval()
    compiled: Any = torch.compile(model, backend="aot_eager")
    inputs = case.inputs_for(False)
    result = call(compiled, inputs)
    loss = probe_loss(result)
    if loss.requires_grad:
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return Measured([out.detach() for out in outputs(result)], grads, {})


def _dense_compiled_differs(case: Case, gap: Gap) -> bool:
    """Whether compiling changes the dense model's results by as much."""
    dense = gap_of(_compiled(case, case.fresh()), measure(case, case.fresh(), False))
    return dense.size >= 0.1 * gap.size


def _equal_in_float64(case: Case) -> bool:
    """Whether the difference is rounding: a gradient whose terms all but cancel (1e-7) shows it."""
    try:
        inputs = tree_map(_widened, case.inputs)
        wide = replace(case, model=case.fresh().double(), inputs=inputs, again=None, masks={})
        wanted = measure(wide, sparsified(wide), False)
        return not gap_of(_compiled(wide, sparsified(wide)), wanted).wrong(1e-9)
    except Exception:  # noqa: BLE001 (a model that does not run in float64)
        return False


def _widened(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if wide else value


def check_tuned(case: Case, note: Note) -> None:
    """Lower with timings: another form per layer, the same outputs."""
    folded = nmfx.fold(sparsified(case)).eval()
    with step(note, "tune"):
        lowered = nmfx.lower(folded, case.inputs_for(False))
        _close(case, _inference(case, lowered), _inference(case, folded), folded)
