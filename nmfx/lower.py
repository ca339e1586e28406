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

from collections.abc import Sequence
from typing import Any

from torch import nn

from .calls import Call, evaluation_mode, parse_calls, run_calls, undisturbed
from .capture.copied import copied
from .capture.install import check_classes
from .capture.lowering import Target, Undo
from .capture.parts import forget_whole, is_tensor_parallel, join_parts, split_into_parts
from .capture.refs import iter_sites
from .capture.sharding import refuse_fsdp
from .capture.site import MADE_ON, NOTES, SKIPPED, join, marks_of, stored_names
from .capture.take_over import recompose
from .capture.tied import refuse_tied_since
from .errors import NMError
from .fold import bake, check_weights
from .fusing import Fusing
from .lower_layers import NOT_LINEAR, Job, pack_layers, tune_layers
from .plan import make_plan
from .ranks import TALKS, talks
from .sparsify import taken_over, unchanged_if_refused
from .tensor_parallel import IN_PARTS, folded
from .tuning.two_forms import check_keep
from .tuning.whole import check_cuda_graph, whole_ms


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
        model = folded(model, inplace)
    else:
        with unchanged_if_refused(model):
            given, model = model, taken_over(model, inplace)
            model = recompose(model, inplace or model is not given)
            make_plan(model)  # refuse before a copy is made
        model = model if inplace or model is not given else copied(model, "lower")
    return _lowered(model, calls, inplace, tune, keep, cuda_graph)


def _lowered(
    model: nn.Module,
    calls: list[Call],
    inplace: bool,
    tune: bool,
    keep: Sequence[str] | None,
    cuda_graph: bool,
) -> nn.Module:
    """`model`, lowered in place; `inplace` is what the caller asked for."""
    parallel = is_tensor_parallel(model)
    plan = make_plan(model, required=not parallel)
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
            if parallel:
                split_into_parts(model)
                plan = make_plan(model, required=False)
            bake(model)
            targets = [Target(entry.candidate, entry.pattern) for entry in plan.entries]
            alone = not (parallel or talks(model, calls))
            if cuda_graph and not alone:
                raise NMError(f"cuda_graph=True: {TALKS}; leave cuda_graph=False")
            timed = tune and targets and alone
            dense_ms = whole_ms(model, calls, cuda_graph) if timed else None
            fusing.fold_norms(targets)
            undo = Undo(model, targets)
            forget_whole(model)
            job = Job(
                model, calls, expected, targets, undo, fusing, inplace, keep, cuda_graph, alone
            )
            notes = tune_layers(job, dense_ms) if tune else pack_layers(job)
            for candidate, reason in plan.dense:
                if keep is not None and candidate.capture == "scoped":
                    reason = f"{reason}; {NOT_LINEAR}"
                marks_of(candidate.host).setdefault(SKIPPED, {})[candidate.path] = reason
            if not alone and tune and targets:
                notes.insert(0, TALKS)
            if parallel:
                notes.insert(0, IN_PARTS)
            marks_of(model)[NOTES] = tuple(notes)
            marks_of(model).pop(MADE_ON, None)
        except BaseException:  # Ctrl-C too
            fusing.undo()
            if undo is not None:
                undo()  # after: its graphs are those from before anything was packed
            bake(model)
            join_parts(model)
            marks_of(model).pop(NOTES, None)
            raise
    return model
