"""What a model must hold before, while and after it is sparse, step by step.

Every step is "pass", "explained: why" (the audit named what the masked reference cannot know),
"nmerror: its text" or "fail: what". A wrong result that `nmfx.verify` does not name is a failure
whose text starts with SILENT: no user would have seen it.
"""

from __future__ import annotations


import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sweep import reference
from sweep.case import Case, Inputs, call, outputs, probe_loss
from sweep.compare import Gap, compare, within
from sweep.reference import Measured
from torch import Tensor, nn

import nmfx

# A power of two: lambda * w is then exact, and g + lambda * w is rounded once in any order.
LAMBDA = 2.0**-6
SILENT = "SILENT"
Note = Callable[[str, Any], None]


class Wrong(Exception):
    """A check that does not hold."""


class Explained(Exception):
    """A check whose reference does not apply, and what nmfx says about it."""


@contextmanager
def step(note: Note, name: str) -> Iterator[None]:
    """Runs a block as one step: whatever it raises becomes the step's outcome."""
    note("begin", name)
    try:
        yield
    except nmfx.NMError as error:
        note(name, f"nmerror: {error}")
    except Wrong as error:
        note(name, f"fail: {error}")
    except Explained as error:
        note(name, f"explained: {error}")
    except Exception as error:  # noqa: BLE001 (any exception is the finding)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error}"[:500]
        note(name, f"fail: {text} ({Path(where.filename).name}:{where.lineno})")
    else:
        note(name, "pass")



def masked_dims(model: nn.Module, dense: nn.Module) -> dict[str, int]:
    """Name -> dimension of every sparsified parameter, the dimension by the model's structure.

    Where the structure does not tell (experts in one 3-D parameter), nmfx's own.
    """
    from nmfx.capture.site import iter_sites

    layers = reference.layer_weights(dense)
    return {
        ref.name: layers[ref.name][1] if ref.name in layers else ref.site.dim
        for ref in iter_sites(model)
    }


def sparsified(case: Case, rules: Any = "2:4") -> nn.Module:
    """A fresh copy of the dense model, sparsified."""
    return nmfx.sparsify(case.fresh(), rules, lambda_w=LAMBDA)


def check_install(case: Case, note: Note) -> bool:
    """Sparsify, keys, identity, the report; False if there is nothing to go on with."""
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
        return False
    with step(note, "report"):
        _check_report(case, model, note)
    return True


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
    dims = masked_dims(model, case.model)
    for name, mask in nmfx.masks(model).items():
        wanted = reference.nm_mask(case.model.get_parameter(name), 2, 4, dims[name])
        if not torch.equal(mask, wanted):
            raise Wrong(f"{name}: {int((mask != wanted).sum())} mask entries differ")
    unique = {id(p): p.numel() for p in case.model.parameters()}
    sparse = sum(parameters[name].numel() for name in dims)
    note("share", sparse / max(sum(unique.values()), 1))
    listed = {id(parameters[name]) for name in rows if name in parameters}
    large = [
        name
        for name, p in case.model.named_parameters()
        if p.ndim > 2 and id(p) not in listed and p.numel() >= 1024
    ]
    note("unlisted", large[:4])


def measure(case: Case, model: nn.Module, train: bool) -> Measured:
    """Outputs and gradients of one call."""
    return reference.run(model.train(train), case.inputs_for(train))


def check_against_reference(case: Case, note: Note) -> None:
    """Forward and gradients, eval and train, with and without gradients; verify."""
    model = sparsified(case)
    dims = masked_dims(model, case.model)
    raw: dict[str, set[str]] = {}
    with step(note, "verify"):
        raw = _verify(case, model)
        note("raw", sorted(raw))
        if raw:
            raise Explained(_raw_text(raw))
    for name, train in (("eval", False), ("train", True)):
        if train and not _dense_trains(case, note):
            continue
        with step(note, name):
            _check_mode(case, dims, raw, train, note)
    with step(note, "no_grad"), torch.no_grad():
        got = outputs(call(sparsified(case).eval(), case.inputs_for(False)))
        masked = case.fresh()
        reference.mask_(masked, dims)
        wanted = outputs(call(masked, case.inputs_for(False)))
        # torch's fused inference paths round differently from what nmfx makes of them.
        _judge(case, compare(got, wanted), raw, 1e-5)


def _verify(case: Case, model: nn.Module) -> dict[str, set[str]]:
    torch.manual_seed(0)
    inputs = case.inputs_for(False)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return nmfx.verify(model, *args, **kwargs)


def _raw_text(raw: dict[str, set[str]]) -> str:
    name = sorted(raw)[0]
    return f"verify names {len(raw)}: {name} read by {', '.join(sorted(raw[name]))}"


def _dense_trains(case: Case, note: Note) -> bool:
    try:
        measure(case, case.fresh(), True)
    except Exception as error:  # noqa: BLE001 (the dense model's own)
        note("train", f"n/a: dense does not: {type(error).__name__}: {error}"[:200])
        return False
    return True


def _check_mode(case: Case, dims: dict[str, int], raw: Any, train: bool, note: Note) -> None:
    got = measure(case, sparsified(case), train)
    wanted = reference.masked(case.fresh(), case.inputs_for(train), dims, LAMBDA, train)
    gap = _gap(got, wanted, dims)
    if not train:
        used = sum(got.grads[name] is not None for name in dims)
        note("exact", gap.equal)
        note("reached", f"{used} of {len(dims)}")
    if not raw:
        if gap.wrong(1e-5):
            _judge(case, gap, raw, _tolerance(case, train))
        return
    if gap.wrong(1e-5):
        _check_without(case, raw, train)


def _gap(got: Measured, wanted: Measured, dims: dict[str, int]) -> Gap:
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
    """Rounding of sums in another order, more where the dense model itself does not repeat."""
    first, second = (measure(case, case.fresh(), train) for _ in range(2))
    gap = _gap(first, second, {})
    return 1e-5 if not gap.wrong(0.0) else max(1e-5, 10 * gap.size)


def _judge(case: Case, gap: Gap, raw: Any, most: float) -> None:
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
    dims = masked_dims(model, case.model)
    got = measure(case, model, train)
    wanted = reference.masked(case.fresh(), case.inputs_for(train), dims, LAMBDA, train)
    gap = _gap(got, wanted, dims)
    if left or gap.wrong(_tolerance(case, train)):
        raise Wrong(f"{SILENT}: without what verify names {gap.what} differs by {gap.size:.1e}")
    raise Explained(f"raw reads named by verify ({len(raw)}); with these dense, equal")


def check_training(case: Case, note: Note, steps: int = 3) -> nn.Module:
    """A few optimizer steps; returns the trained model in eval mode."""
    model = sparsified(case)
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
    dense = case.fresh()
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
    if gap.wrong(1e-6):
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
            gap = _gap(got, wanted, {})
            if gap.wrong(1e-4) and not _dense_compiled_differs(case, gap):
                raise Wrong(f"{SILENT}: compiled, {gap.what} differs by {gap.size:.1e}")
            return
        try:
            _compiled(case, case.fresh())
        except Exception as error:  # noqa: BLE001
            raise Explained(f"dense does not compile: {type(error).__name__}") from error
        raise failure


def _compiled(case: Case, model: nn.Module) -> Measured:
    torch._dynamo.reset()
    model.eval()
    compiled: Any = torch.compile(model, backend="aot_eager")
    inputs: Inputs = case.inputs_for(False)
    result = call(compiled, inputs)
    loss = probe_loss(result)
    if loss.requires_grad:
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return Measured([out.detach() for out in outputs(result)], grads, {})


def _dense_compiled_differs(case: Case, gap: Gap) -> bool:
    """Whether compiling changes the dense model's results by as much."""
    dense = _gap(_compiled(case, case.fresh()), measure(case, case.fresh(), False), {})
    return dense.size >= 0.1 * gap.size


def check_tuned(case: Case, note: Note) -> None:
    """Lower with timings: another form per layer, the same outputs."""
    folded = nmfx.fold(sparsified(case)).eval()
    with step(note, "tune"):
        lowered = nmfx.lower(folded, case.inputs_for(False))
        _close(case, _inference(case, lowered), _inference(case, folded), folded)
