"""nmfx.lower: from trained, masked weights to the fastest form this machine has for each.

    sparsified layer, or a weight that satisfies N:M
        fold        zeros baked in, original classes; batch norms folded into convolutions
        measure     dense, prepacked dense, packed, on GPUs semi-structured: on the inputs the
                    layer really meets
        swap        the fastest; dense where nothing beats it, with the reason in the report;
                    with `keep` two forms, where these are faster than any one; activations move
                    into packed layers
        measure     the whole model against the folded one; dense again if that is not faster

Nothing is written before the example inputs have run once. From then on, whatever interrupts it,
the model is a whole folded model again: `capture/lowering.py` says how. Batch norms that were
folded by then stay folded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .calls import (
    Call,
    compare_outputs,
    evaluation_mode,
    output_error,
    parse_calls,
    run_calls,
    undisturbed,
)
from .capture.copied import copied
from .capture.install import check_classes, install_guards
from .capture.linear_part import has_parts
from .capture.lowering import Target, Undo
from .capture.parts import is_tensor_parallel, join_parts
from .capture.refs import iter_sites
from .capture.sharding import refuse_fsdp
from .capture.site import MADE_ON, MEASURED, NOTES, SKIPPED, join, marks_of, stored_names
from .capture.take_over import recompose
from .capture.tied import refuse_tied_since
from .errors import NMError
from .fold import bake, check_weights
from .fusing import Fusing
from .plan import Plan, make_plan
from .ranks import TALKS, talks
from .rounding import only_rounding_differs
from .sparsify import taken_over, unchanged_if_refused
from .tensor_parallel import IN_PARTS, in_parts, plan_in_parts
from .tuning.bench import Bench
from .tuning.choose import choose, choose_untimed
from .tuning.decide import DENSE, SEMI, TIE, Choice, packed_share, stays_dense
from .tuning.hardware import kernel_status
from .tuning.memory import Returning
from .tuning.progress import progress
from .tuning.shapes import Recorder, Seen
from .tuning.table import ASSUMED
from .tuning.two_forms import check_keep
from .tuning.whole import check_cuda_graph, whole_ms

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
_NOT_LINEAR = "one copy: only linear layers that are traced hold two forms"


def lower(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    tune: bool = True,
    keep: Sequence[str] | None = None,
    cuda_graph: bool = False,
) -> nn.Module:
    """An inference model in which each N:M layer has the form that is fastest on this machine.

    Takes sparsified and folded models, in train or eval mode, partly dense. Layers are timed cold
    or warm as the model's size demands, and dense wins ties, so the result is not slower than the
    folded model, whose outputs it computes, within rounding. (On a GPU layers are timed without
    what the host needs to launch them; only example inputs show that, in the whole model's time.)
    Gradients reach inputs and dense weights, and are refused for packed ones. The state_dict holds
    plain tensors: `weight_values` and `weight_index` in place of the `weight` of a packed layer;
    `weight_compressed`, `weight_meta` and `weight_format` of a semi-structured one. `nmfx.report`
    tells for each layer what was measured, what was chosen and why.

    torch.export and AOTInductor take the result. A process that loads such a program or package
    has to `import nmfx` before: torch refuses what holds operators that it does not know.

    With `keep` a linear layer may hold its weight in two forms, and takes one by the number of rows
    of its input: packed for few (decoding), say, and dense for many (a prompt). It does so if the
    example inputs are computed faster with both than with any one form, by more than a tie, each
    up to or above a threshold: the geometric middle of the largest number of rows measured for the
    one and the smallest for the other. Both forms are in the state_dict, and the report adds them
    up. The weight is constant then: a dense one beside another form of it no longer requires a
    gradient, and is an error if it is made to. Compiled code has the comparison as a guard; what
    torch.export makes of a dynamic number of rows holds on one side of the threshold.

    Where the example inputs and the code that calls them show that nothing else reads what lies
    between, a batch norm in eval mode is folded into the convolution before it (`nn.Identity`
    stays in its place, or its activation if it has one, and its tensors leave the state_dict), and
    a ReLU, GELU or SiLU that is a module, or a node of a graph, is computed by the packed layer
    before it.

    Of a tensor-parallel model (weights that `parallelize_module` cut, on one dimension of ranks)
    every rank lowers its parts, and all of them must call. What ranks send each other stays as it
    is; the whole model is not timed, since no rank may run it more often than another. A model
    that FSDP shards has to be gathered first, and a lowered tensor-parallel one is not saved:
    `nmfx.fold` makes DTensors of its parts again.

    Args:
        model: a sparsified model, or one whose weights satisfy an N:M pattern.
        example_inputs: a tuple is one call's arguments, a dict one call's keywords, a list several
            calls (a prompt and a decoding step, say). They are run in eval mode, give the shapes
            that layers are timed on, and their outputs are compared before and after. Without
            them, 1, 8 and 128 rows are assumed.
        inplace: lower `model` itself, layer by layer, and free its dense weights as it goes.
            An interruption leaves it folded, as `nmfx.fold` does, but for its batch norms.
        tune: False times nothing: every layer that can be packed is (on a GPU, semi-structured
            where that is possible, and of the convolutions only those of 1 x 1).
        keep: two of "packed", "semi_structured" and "dense", in any order; None keeps one form.
            Give example inputs with few and with many rows.
        cuda_graph: the model will run in CUDA graphs (`torch.compile(mode="reduce-overhead")`, or
            captures of your own), where launching a kernel costs the host nothing: the whole
            model is timed as one, too. In eager mode sparse layers take the host longer to launch
            than dense ones, and a model of small layers then stays dense. Needs example inputs.

    Returns:
        The lowered model: a deep copy, or `model`.

    Raises:
        NMError: no weight is N:M sparse, all of them are lowered already (`nmfx.fold` takes that
            back), a weight on the meta device, a `keep` that does not name two forms or comes with
            `tune=False`, a `cuda_graph` that cannot be timed, or outputs that differ.
            With `inplace`, an error or interruption after the example inputs have run once (of a
            tensor-parallel model, from the first run on) leaves a whole folded model; in all other
            cases nothing is changed.
    """
    check_keep(keep, tune)
    calls = parse_calls(example_inputs)
    if cuda_graph:
        check_cuda_graph(model, calls, tune)
    refuse_fsdp(model, "lower")
    check_classes(model)
    refuse_tied_since(model)
    check_weights(model, inplace)
    if is_tensor_parallel(model):
        model = in_parts(model, inplace)
        try:
            plan = plan_in_parts(model)
            return _lowered(model, plan, calls, inplace, tune, keep, cuda_graph)
        except BaseException:  # Ctrl-C too
            join_parts(model)
            raise
    with unchanged_if_refused(model):
        given, model = model, taken_over(model, inplace)
        model = recompose(model, inplace or model is not given)
        make_plan(model)  # refuse before a copy is made
    model = model if inplace or model is not given else copied(model, "lower")
    return _lowered(model, make_plan(model), calls, inplace, tune, keep, cuda_graph)


def _lowered(
    model: nn.Module,
    plan: Plan,
    calls: list[Call],
    inplace: bool,
    tune: bool,
    keep: Sequence[str] | None,
    cuda_graph: bool,
) -> nn.Module:
    """`model`, lowered in place; `inplace` is what the caller asked for."""
    fusing = Fusing(model, [e.candidate for e in plan.entries], examples=bool(calls))
    read_only = {
        join(ref.module_name, name.rpartition(".")[2])
        for ref in iter_sites(model)
        for name in stored_names(ref.site)
    }
    with undisturbed(model, read_only.__contains__), evaluation_mode(model, calls):
        with fusing.witness:
            expected = run_calls(model, calls)
        undo = None
        try:
            bake(model)
            targets = [Target(entry.candidate, entry.pattern) for entry in plan.entries]
            alone = not talks(model, calls)
            if cuda_graph and not alone:
                raise NMError(f"cuda_graph=True: {TALKS}; leave cuda_graph=False")
            timed = tune and targets and alone
            dense_ms = whole_ms(model, calls, cuda_graph) if timed else None
            fusing.fold_norms(targets)
            undo = Undo(model, targets)
            job = _Job(
                model, calls, expected, targets, undo, fusing, inplace, keep, cuda_graph, alone
            )
            notes = _tune(job, dense_ms) if tune else _pack_all(job)
            for candidate, reason in plan.dense:
                if keep is not None and candidate.capture == "scoped":
                    reason = f"{reason}; {_NOT_LINEAR}"
                marks_of(candidate.host).setdefault(SKIPPED, {})[candidate.path] = reason
            if not alone and tune and targets:
                notes.insert(0, TALKS)
            if has_parts(model):
                notes.insert(0, IN_PARTS)
            marks_of(model)[NOTES] = tuple(notes)
            marks_of(model).pop(MADE_ON, None)
        except BaseException:  # Ctrl-C too
            fusing.undo()
            if undo is not None:
                undo()  # after: its graphs are those from before anything was packed
            bake(model)
            marks_of(model).pop(NOTES, None)
            raise
    return model


@dataclass(frozen=True)
class _Job:
    """A folded model, what is to be lowered in it, and what its example inputs told."""

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


def _pack_all(job: _Job) -> list[str]:
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


def _tune(job: _Job, dense_ms: float | None) -> list[str]:
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
            if _is_slower(job, lowered_ms):
                notes.append("lowered, the whole model is slower than dense, so it stays dense")
                if not job.cuda_graph and any(t.device.type == "cuda" for t in choices):
                    notes.append(_IN_GRAPHS)
                choices = {target: _kept(choice) for target, choice in choices.items()}
                unsteady = []
            else:
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


def _record(job: _Job) -> Mapping[str, Mapping[Seen, int]]:
    """The inputs that each layer meets when the calls run, and how often."""
    recorder = Recorder({target.candidate.name: target.weight for target in job.targets})
    with recorder:  # a run of its own: torch's fused paths step aside for any observer
        run_calls(job.model, job.calls)
    return recorder.seen


def _choose(
    job: _Job, bench: Bench, target: Target, seen: Mapping[str, Mapping[Seen, int]]
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


def _note(target: Target, job: _Job, reason: str, choice: Choice | None = None) -> None:
    """Leaves the reason and the measurement on the layer, for the report."""
    fields, path = marks_of(target.candidate.host), target.candidate.path
    state = ["folded"] if choice is not None and choice.name == DENSE else []
    if job.keep is not None and target.candidate.kind == "conv":
        state.append(_NOT_LINEAR)
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


def _check(job: _Job) -> list[str]:
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


def _is_slower(job: _Job, lowered: float) -> bool:
    """Undoes everything and asks again: the machine may have been slow for a moment.

    It happens where a model has a fused path for its dense layers only.
    """
    job.fusing.undo()
    job.undo()
    bake(job.model)  # and the guards over packed layers
    again = whole_ms(job.model, job.calls, job.cuda_graph)
    return again is not None and lowered > again * (1 + TIE)
