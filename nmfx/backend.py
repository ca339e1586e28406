"""nmfx.backend: `torch.compile(model, backend="nmfx")`, lowering as a pass on captured graphs.

Dynamo's graph    linear and conv whose weight satisfies N:M        (pruned by anyone)
measure       dense, packed (and prepacked, where Inductor freezes)
swap          packed where that is faster
inner         Inductor, or another backend, compiles what came of it
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .capture.dynamo import Found, find_weights, other_weights, own_graph, pack_found
from .capture.program import Program, remember
from .errors import NMError
from .tuning.bench import Bench
from .tuning.choose import choose, choose_untimed
from .tuning.decide import PACKED, Choice, stays_dense

_GRAD = (
    "dense: gradients are recorded, and packed weights have none; call it under torch.no_grad() "
    "or torch.inference_mode()"
)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A backend for torch.compile that runs N:M weights packed where that is measured to be faster.

    For models whose weights are N:M already: folded, or pruned by others. It changes neither the
    model nor its weights; where a weight is written to or replaced, it is packed again at the next
    call, or runs dense if it is no longer N:M. Torch does not count what is written through `.data`
    or numpy: call `torch.compiler.reset()` after that. For inference: a graph that records
    gradients is left to the inner backend. `nmfx.report(model)` tells what became of each layer.

    With nmfx installed its name will do, `backend="nmfx"`; `backend=nmfx.backend` always does.

    Args:
        gm: Dynamo's graph; its module is changed.
        example_inputs: what it is called with.
        mode: of `torch.compile`, for Inductor.
        options: {"inner": "inductor", another backend or a callable, "tune": True}; tune=False
            times nothing and packs all it can.

    Returns:
        What runs in the graph's place.

    Raises:
        NMError: other options. (Dynamo wraps it.)
    """
    inner, tune = _read_options(mode, options)
    own_graph(gm)
    found, others = find_weights(gm, example_inputs), other_weights(gm, example_inputs)
    tensors = [one for one in (*example_inputs, *gm.parameters()) if isinstance(one, Tensor)]
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        program = Program(inner(gm, example_inputs))
        for one in found:
            remember(one.weight, program, None, _GRAD)
        return program
    bench = Bench(_Holding(tensors))
    choices = [_choose(bench, one, tune) for one in found]
    program = _compile(gm, example_inputs, found, choices, inner)
    for weight, readers in others:
        remember(weight, program, None, f"dense: the graph reads its weight in {readers}")
    return program


def _compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    found: list[Found],
    choices: list[Choice],
    inner: Callable[..., Any],
) -> Program:
    chosen = [one for one, choice in zip(found, choices, strict=True) if choice.name == PACKED]
    if not chosen:
        program = Program(inner(gm, inputs))
        packed = {}
    else:
        dense = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        places = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        packed = {one.candidate.name: pack_found(gm, one) for one in chosen}
        gm.graph.lint()
        gm.recompile()
        kept = [places[node] for node in gm.graph.find_nodes(op="placeholder")]
        run = inner(gm, [inputs[i] for i in kept])
        constant = any(one.place is None for one in chosen)
        program = Program(run, kept, list(packed.values()), dense, constant)
    for one, choice in zip(found, choices, strict=True):
        state = PACKED if one in chosen else "dense"
        text = ": ".join(part for part in (state, choice.reason) if part)
        remember(one.weight, program, packed.get(one.candidate.name), text)
    return program


def _choose(bench: Bench, found: Found, tune: bool) -> Choice:
    c, pattern = found.candidate, found.pattern
    if c.obstacle is not None or pattern is None:
        return stays_dense(c.obstacle or "")
    with torch.no_grad():
        if not tune:
            choice = choose_untimed(c, found.weight, pattern)
        else:
            choice = choose(bench, c, found.weight, pattern, found.seen, prepack=True)
    if choice.name in (PACKED, "dense"):
        return choice
    rival = choice.name.replace("_", "-")
    return stays_dense(f"{choice.reason}; {rival} is fastest, and this backend only packs")


class _Holding(nn.Module):
    """Holds tensors: their bytes tell whether weights stay in the cache from call to call."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_buffer(str(number), tensor.detach())


def _read_options(
    mode: str | None, options: Mapping[str, Any] | None
) -> tuple[Callable[..., Any], bool]:
    """(the inner backend, whether to time)."""
    given = {"inner": "inductor", "tune": True, **(options or {})}
    unknown = sorted(given.keys() - {"inner", "tune"})
    if unknown:
        raise NMError(f'backend="nmfx" has the options inner and tune, not {", ".join(unknown)}')
    inner, tune = given["inner"], given["tune"]
    if not isinstance(tune, bool):
        raise NMError(f"tune={tune!r} is neither True nor False")
    if mode is not None and inner != "inductor":
        raise NMError(f"mode={mode!r} is Inductor's, and the inner backend is {inner!r}")
    if inner in ("nmfx", backend):
        raise NMError("the inner backend of nmfx cannot be nmfx itself")
    return _inner(inner, mode), tune


def _inner(inner: Any, mode: str | None) -> Callable[..., Any]:
    if callable(inner):
        return inner
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        found: Any = lookup_backend(inner) if isinstance(inner, str) else None
    except InvalidBackend:
        found = None
    if found is None:
        raise NMError(f"inner={inner!r} is no backend of torch.compile")
    if mode is None:
        return found
    from torch._inductor import list_mode_options

    return functools.partial(found, config_patches=list_mode_options(mode))
