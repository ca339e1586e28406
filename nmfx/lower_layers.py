"""What `lower` does with the layers of a folded model: measure, swap, and check the whole.

    measure     each layer on the inputs that it really meets
    swap        the fastest form, unless that is the dense one
    check       the outputs are those of before
    measure     the whole model; all layers dense again if that is not faster

Of several ranks each decides by its own clock, so all run the model equally often: see `Job.alone`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .calls import Call, compare_outputs, output_error, run_calls
from .capture.install import install_guards
from .capture.lowering import Target, Undo
from .capture.own_weights import EXPERTS
from .capture.site import MEASURED, SKIPPED, marks_of
from .errors import NMError
from .fold import bake
from .fusing import Fusing
from .rounding import only_rounding_differs
from .tuning.bench import Bench
from .tuning.choose import choose, choose_untimed
from .tuning.decide import DENSE, SEMI, TIE, Choice, packed_share, stays_dense
from .tuning.hardware import kernel_status
from .tuning.memory import Returning
from .tuning.progress import progress
from .tuning.shapes import Recorder, Seen
from .tuning.table import ASSUMED
from .tuning.whole import whole_ms

_UNTIMED = (
    "tune=False: nothing was timed; all is packed or compressed whose row does not say why not"
)
_NOTHING_PACKED = (
    "nothing was packed: the N:M layers of this model have no packed kernel yet, so they are "
    "folded (dense, with exact zeros)."
)
_ONE_COPY = "in place, prepacked dense is no candidate: it would keep every weight twice"
_IN_GRAPHS = (
    "that was in eager mode, where the host launches every kernel; if it is to run in CUDA graphs, "
    "lower it with cuda_graph=True"
)
_UNSTEADY = (
    "the outputs differ from the folded model's by {:.1e} (relative norm), for rounding alone: it "
    "decides between equals here (routing, top-k, sorting). Every product by itself is right"
)
_COPY_OF_TIED = "{}, which it is tied to, keeps a dense copy"
NOT_LINEAR = "one copy: only linear layers that are traced hold two forms"


@dataclass(frozen=True)
class Job:
    """A folded model, what is to be lowered in it, and what its example inputs told.

    Attributes:
        alone: whether it may be run as often as this process likes: no other waits for it.
    """

    model: nn.Module
    calls: list[Call]
    expected: list[Any]
    targets: list[Target]
    undo: Undo
    fusing: Fusing
    inplace: bool
    keep: Sequence[str] | None
    cuda_graph: bool
    alone: bool


def pack_layers(job: Job) -> list[str]:
    """Lowers each layer that can be, untimed; the notes for the report."""
    memory = Returning()
    choices = {t: choose_untimed(t.candidate, t.weight, t.pattern) for t in job.targets}
    for target in progress(job.targets, "packing"):
        try:
            _apply(target, choices[target])
        except (RuntimeError, NMError) as error:
            if choices[target].name != SEMI:
                raise
            choices[target] = stays_dense(f"it could not be compressed: {error}")
        memory.freed(target.bytes)
    memory.now()
    job.fusing.fuse_activations(job.targets)
    unsteady = _check(job)
    if not job.targets:
        return [_NOTHING_PACKED]
    for target, choice in choices.items():
        _note(target, job, choice.reason, choice)
    status = dict.fromkeys(kernel_status(target.device) for target in job.targets)
    return [_UNTIMED, *unsteady, *status]


def tune_layers(job: Job, dense_ms: float | None) -> list[str]:
    """Lowers each layer as measured; the notes for the report."""
    if not job.targets and job.alone:  # others may have some, and run the model
        return [_NOTHING_PACKED]
    bench, seen = Bench(job.model), _record(job)
    memory = Returning()
    choices: dict[Target, Choice] = {}
    for target in progress(job.targets, "measuring"):
        choices[target] = _choose(job, bench, target, seen)
        _apply(target, choices[target])
        memory.freed(target.bytes)
    memory.now()
    job.fusing.fuse_activations(job.targets)
    unsteady = _check(job)
    notes = [] if job.calls else [ASSUMED]
    if not job.targets:
        notes.append(_NOTHING_PACKED)
    if dense_ms is not None:
        lowered_ms = whole_ms(job.model, job.calls, job.cuda_graph)
        assert lowered_ms is not None
        ratio = dense_ms / lowered_ms
        where = " in a CUDA graph" if job.cuda_graph else ""
        times = f"dense {dense_ms:.3f} ms, lowered {lowered_ms:.3f} ms ({ratio:.2f}x)"
        notes.append(f"whole model{where}: {times}")
        if ratio * (1 + TIE) < 1 and any(c.name != DENSE for c in choices.values()):
            again = _dense_again_ms(job)
            if lowered_ms > again * (1 + TIE):
                notes.append("lowered, the whole model is slower than dense, so it stays dense")
                if not job.cuda_graph and any(t.device.type == "cuda" for t in choices):
                    notes.append(_IN_GRAPHS)
                choices = {target: _kept(choice) for target, choice in choices.items()}
                unsteady = []
            else:
                notes.append(f"timed again, dense takes {again:.3f} ms: lowered is not slower")
                for target, choice in choices.items():
                    _apply(target, choice)
                job.fusing.fuse_activations(job.targets)
                unsteady = _check(job)
    share = packed_share(choices.values()) if job.calls else None
    if share is not None:
        notes.append(share)
    for target, choice in choices.items():
        _note(target, job, choice.reason, choice)
    return [*notes, *unsteady, *bench.notes(), *([_ONE_COPY] if job.inplace else [])]


def _record(job: Job) -> Mapping[str, Mapping[Seen, int]]:
    """The inputs that each layer meets when the calls run, and how often."""
    candidates = [target.candidate for target in job.targets]
    mixtures = {c.name: c.host for c in candidates if c.kind == EXPERTS}
    recorder = Recorder({t.candidate.name: t.weight for t in job.targets}, mixtures)
    # A run of its own: torch's fused paths step aside for any observer.
    with recorder.hooked(), recorder:
        run_calls(job.model, job.calls)
    return recorder.seen


def _choose(
    job: Job, bench: Bench, target: Target, seen: Mapping[str, Mapping[Seen, int]]
) -> Choice:
    return choose(
        bench,
        target.candidate,
        target.weight,
        target.pattern,
        seen[target.candidate.name] if job.calls else None,
        prepack=not job.inplace,
        keep=job.keep,
    )


def _kept(choice: Choice) -> Choice:
    """A layer that stays dense because the whole model is faster so."""
    if choice.name == DENSE:
        return choice
    reason = f"{choice.reason}, but lowered the whole model is slower"
    return replace(choice, name=DENSE, ms=choice.ms_dense, reason=reason, threshold=0)


def _apply(target: Target, choice: Choice) -> None:
    if choice.name != DENSE:
        target.lower(choice.name, choice.threshold, choice.algorithms)


def _note(target: Target, job: Job, reason: str, choice: Choice | None = None) -> None:
    """Leaves the reason and the measurement on the layer, for the report."""
    layer = target.candidate
    c = target.found if target.state == DENSE else layer
    fields, path = marks_of(c.host), c.path
    state = ["folded"] if choice is not None and choice.name == DENSE else []
    if job.keep is not None and (layer.kind == "conv" or layer.capture == "scoped"):
        state.append(NOT_LINEAR)
    if not _is_dense(job.model, target.candidate.name):
        others = [name for name in target.candidate.tied if _is_dense(job.model, name)]
        state += map(_COPY_OF_TIED.format, others)
    texts = [reason, *state, *job.fusing.remarks(target)]
    fields.setdefault(SKIPPED, {})[path] = "; ".join(text for text in texts if text)
    if choice is not None and choice.rows:
        fields.setdefault(MEASURED, {})[path] = (choice.rows, choice.ms_dense, choice.ms)


def _is_dense(model: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key in model.get_submodule(owner)._parameters


def _check(job: Job) -> list[str]:
    """Compares outputs with those of before, if any layer is lowered; a note if they are unsteady.

    Raises:
        NMError: they differ, and not because the model turns rounding into other results.
    """
    hosts = {target.candidate.host for target in job.targets if target.state != DENSE}
    install_guards(job.model, hosts)
    if not hosts and job.alone:  # others may have lowered something, and run the model
        return []
    outputs = run_calls(job.model, job.calls)
    try:
        for number, output in enumerate(outputs):
            compare_outputs(job.expected[number], output, number)
    except NMError:
        gap = max(map(output_error, job.expected, outputs))
        # Alone: what finds that out runs the model more often.
        if not job.alone or not only_rounding_differs(job.model, job.calls, job.expected, outputs):
            raise
        return [_UNSTEADY.format(gap)]
    return []


def _dense_again_ms(job: Job) -> float:
    """Undoes everything and times it again: the machine may have been slow for a moment.

    Lowered is slower as a whole where a model has a fused path for its dense layers only.
    """
    job.fusing.undo()
    job.undo()
    bake(job.model)  # and the guards over packed layers
    again = whole_ms(job.model, job.calls, job.cuda_graph)
    assert again is not None
    return again
