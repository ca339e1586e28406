"""Every linear and conv weight of a model, and what stands in the way of sparsifying it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ..graph.rewrite import Use
from ..graph.table import groups_argument
from .adapters import Adapted, find_adapted
from .attention import OUT_PROJ
from .generate import base_class
from .graph_module import find_graph_uses, other_readers
from .holder import Holder, holder_of
from .leaf import WEIGHT, trace_leaf
from .linear_part import LinearPart
from .obstacles import class_obstacle, tensor_obstacle, weight_obstacle
from .own_weights import EMBEDDING, Own, own_weights
from .readers import Reads, weights_read
from .site import SITES, Site, get_path, is_lowered, join, place_of, stored_names
from .tracer import Untraceable


@dataclass
class Candidate:
    """One linear or conv weight.

    Attributes:
        name: fully qualified name of the parameter.
        module_name: name of the module that owns it: what rules match.
        host, path: the module whose forward consumes it, and the parameter relative to it.
        kind: "linear", "addmm", "conv", "conv_transpose", "recurrent", "bilinear", "experts",
            "embedding" (tied to one of these), or the class name of a layer that nmfx leaves alone.
        shape: of the weight; () if there is none.
        dim: the dimension the consumer sums over.
        reduced: how many elements along `dim` one output sums over.
        capture: "leaf", "scoped" or "graph".
        groups: of a convolution, else 1.
        obstacle: why it cannot be sparsified with any pattern, or None.
        tied: the other names of its weight.
        site: its site, if it is sparsified or packed already.
        adapted: what it has to do with PEFT, if anything stands in its way.
    """

    name: str
    module_name: str
    host: nn.Module
    path: str
    kind: str
    shape: tuple[int, ...] = ()
    dim: int = 1
    reduced: int = 0
    capture: str = "leaf"
    groups: int = 1
    obstacle: str | None = None
    tied: tuple[str, ...] = ()
    site: Site | None = None
    adapted: Adapted | None = None


def as_layer(candidate: Candidate) -> Candidate:
    """A weight as lowering takes it: attention's output projection is a linear layer there."""
    c = candidate
    if not isinstance(c.host, nn.MultiheadAttention) or c.path != OUT_PROJ:
        return c
    return replace(c, host=c.host.out_proj, path=WEIGHT, capture="leaf", site=None)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def find_candidates(model: nn.Module) -> list[Candidate]:
    """All candidates of a model, in the order of `named_modules`. Changes nothing."""
    tied, writers, adapted = _tied_names(model), written(model), find_adapted(model)
    shared = _shared_projections(model)
    covered: set[nn.Module] = set()  # children whose weights their parent reads
    found: list[Candidate] = []
    for fqn, module in model.named_modules():
        if module in covered or isinstance(module, (Holder, LinearPart)):
            continue
        if isinstance(module, nn.MultiheadAttention):
            out_proj = module._modules.get("out_proj")
            covered.update([out_proj] if out_proj is not None and not is_lowered(out_proj) else [])
        new = _of_module(fqn, module)
        if isinstance(module, fx.GraphModule):
            new += _of_graph(fqn, module)
        for candidate in new:
            candidate.adapted = adapted.get(module)
            if candidate.adapted is not None:
                candidate.obstacle = candidate.obstacle or candidate.adapted.reason
            candidate.tied = tuple(tied.get(candidate.name, ()))
            if candidate.tied and candidate.obstacle is None:
                candidate.obstacle = tied_obstacle(candidate)
            owner = place_of(candidate.host, candidate.path)[0]
            if owner in shared and candidate.obstacle is None:
                candidate.obstacle = f"attention reads its weight, and it is {shared[owner]} too"
            if candidate.name in writers and candidate.obstacle is None:
                candidate.obstacle = f"{writers[candidate.name]} writes to its weight"
        found += new
    return _drop_uncalled(found)


def _drop_uncalled(found: list[Candidate]) -> list[Candidate]:
    """Settles weights that a graph reads although they belong to a linear or conv module.

    If the graph does not call the module, the weight is the graph's; if it does, it stays dense.
    """
    in_graphs = {c.name: c for c in found if c.capture == "graph"}
    kept = []
    for candidate in found:
        other = in_graphs.get(candidate.name, candidate)
        if other is not candidate:
            if not _calls(other):
                continue
            candidate.obstacle = other.obstacle = "a graph reads its weight and calls its module"
        kept.append(candidate)
    return kept


def _calls(candidate: Candidate) -> bool:
    owner = candidate.path.rpartition(".")[0]
    assert isinstance(candidate.host, fx.GraphModule)
    return any(
        node.op == "call_module" and f"{owner}.".startswith(f"{node.target}.")
        for node in candidate.host.graph.nodes
    )


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name -> the other names it has, for parameters that several modules share."""
    names: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for fqn, module in model.named_modules():
        for path, parameter in module._parameters.items():
            if parameter is not None:
                names[id(parameter)].append((module, join(fqn, path)))
    return {
        name: [other for _, other in owners if other != name]
        for owners in names.values()
        if len(owners) > 1
        for _, name in owners
    }


def _shared_projections(model: nn.Module) -> dict[nn.Module, str]:
    """Output projections of attention that something else calls as a layer, and all their names.

    The attention would read a masked weight and the other one call the layer as it is.
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    read, called = set[nn.Module](), set[nn.Module]()
    for fqn, module in model.named_modules():
        for key, child in module._modules.items():
            if child is not None:
                names[child].append(join(fqn, key))
                reads = isinstance(module, nn.MultiheadAttention) and key == "out_proj"
                (read if reads else called).add(child)
    return {module: " and ".join(names[module]) for module in read & called}


def tied_obstacle(candidate: Candidate) -> str:
    """Why a tied weight stays dense unless the caller of `sparsify` says otherwise."""
    return f"its weight is tied to {', '.join(candidate.tied)}"


def written(model: nn.Module) -> dict[str, str]:
    """Parameter name -> class whose methods change it in place, which a mask would hide."""
    return _readers(model, lambda reads: reads.written)


def read_around(model: nn.Module) -> dict[str, str]:
    """Parameter name -> class that reads it around the module which holds it."""
    return _readers(model, lambda reads: reads.read)


def only_read(model: nn.Module) -> dict[str, str]:
    """The same for classes that never call that module."""
    return _readers(model, lambda reads: reads.only_read)


def _readers(model: nn.Module, pick: Callable[[Reads], frozenset[str]]) -> dict[str, str]:
    return {
        join(fqn, path): base_class(module).__name__
        for fqn, module in model.named_modules()
        for path in pick(weights_read(module, base_class(module)))
    }


def _of_module(fqn: str, module: nn.Module) -> list[Candidate]:
    own = own_weights(module)
    if own is not None:
        return [scoped_candidate(fqn, module, one) for one in own]
    if isinstance(module, nn.Embedding) and SITES in module.__dict__:
        return [scoped_candidate(fqn, module, EMBEDDING)]
    kind = _kind(module)
    if kind is not None:
        return [_leaf(fqn, module, kind)]
    name = type(module).__name__
    layer = ("Linear" in name or "Conv" in name) and not name.endswith("PackedParams")
    if layer and type(module).__module__.startswith("torch.ao.nn"):
        reason = f"{type(module).__module__}.{name} holds a quantized weight"
        return [Candidate(join(fqn, WEIGHT), fqn, module, WEIGHT, name, obstacle=reason)]
    if "Linear" in name and holds_integers(module):
        reason = f"{name} holds its weight in integers (quantized)"
        return [Candidate(join(fqn, WEIGHT), fqn, module, WEIGHT, name, obstacle=reason)]
    return []


def holds_integers(module: nn.Module) -> bool:
    """Whether a layer of some library (GPTQ, AWQ, HQQ, BitNet ...) keeps a matrix of integers."""
    own = (*module._parameters.values(), *module._buffers.values())
    return not module._modules and any(
        t is not None and t.ndim == 2 and not t.is_floating_point() and t.dtype is not torch.bool
        for t in own
    )


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _CONVS):
        return "conv"
    if isinstance(module, _TRANSPOSED):
        return "conv_transpose"
    # Hugging Face's Conv1D, by name: importing transformers takes seconds.
    if any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    ):
        return "addmm"
    return None


def _leaf(fqn: str, module: nn.Module, kind: str) -> Candidate:
    candidate = Candidate(join(fqn, WEIGHT), fqn, module, WEIGHT, kind)
    if _take_site(candidate, module):
        return candidate
    candidate.obstacle = class_obstacle(module) or weight_obstacle(module, WEIGHT)
    if candidate.obstacle is None:
        weight = getattr(module, WEIGHT)
        groups = int(getattr(module, "groups", 1))
        _measure(candidate, weight, 0 if kind in ("addmm", "conv_transpose") else 1, groups)
    if candidate.obstacle is None:
        try:
            trace_leaf(module)
        except Untraceable:
            candidate.capture = "scoped"
    return candidate


def scoped_candidate(fqn: str, module: nn.Module, own: Own) -> Candidate:
    """A weight that `module` consumes itself."""
    path = own.path
    name = join(fqn, path)
    candidate = Candidate(name, name.rpartition(".")[0], module, path, own.kind, capture="scoped")
    if _take_site(candidate, module):
        return candidate
    candidate.obstacle = (
        own.obstacle
        or _partly_lowered(module)
        or class_obstacle(module)
        or weight_obstacle(*place_of(module, path))
    )
    if candidate.obstacle is None:
        _measure(candidate, get_path(module, path), own.dim, 1)
    return candidate


def _partly_lowered(module: nn.Module) -> str | None:
    """Why a weight of an attention stays as it is when others of it are lowered."""
    if is_lowered(module) or is_lowered(module._modules.get("out_proj")):
        return f"other weights of this {base_class(module).__name__} are lowered; nmfx.fold first"
    return None


def _of_graph(fqn: str, gm: fx.GraphModule) -> list[Candidate]:
    found = []
    for path, uses in find_graph_uses(gm).items():
        owner, _, _ = path.rpartition(".")
        kind = uses[0].consumer.family
        candidate = Candidate(join(fqn, path), join(fqn, owner), gm, path, kind, capture="graph")
        found.append(candidate)
        weight = gm.get_parameter(path)
        candidate.obstacle = tensor_obstacle(weight) or _graph_obstacle(gm, path, uses)
        if candidate.obstacle is None:
            groups = max(map(_groups, uses)) if kind.startswith("conv") else 1
            _measure(candidate, weight, uses[0].consumer.dim, groups)
    # What is sparsified, frozen or packed already reaches its consumer through another node.
    holder = holder_of(gm)
    for site in holder.__dict__[SITES] if holder is not None else ():
        owner, _, _ = site.path.rpartition(".")
        candidate = Candidate(join(fqn, site.path), join(fqn, owner), gm, site.path, site.kind)
        assert holder is not None
        _take_site(candidate, holder)
        found.append(candidate)
    # Execution order, which tells the output layer. Exported graphs read all weights at the top.
    numbers = {node: number for number, node in enumerate(gm.graph.nodes)}
    place: dict[str, int] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        first = min((numbers[user] for user in node.users), default=len(numbers))
        place[str(node.target)] = min(first, place.get(str(node.target), first))

    def first_read(candidate: Candidate) -> int:
        site = candidate.site
        name = candidate.path if site is None else stored_names(site)[0]
        return place.get(name, 0)

    return sorted(found, key=first_read)


def _groups(use: Use) -> int:
    groups = groups_argument(use.node)
    return groups if isinstance(groups, int) else 1


def _graph_obstacle(gm: fx.GraphModule, path: str, uses: list[Use]) -> str | None:
    if len({use.consumer.dim for use in uses}) > 1:
        return "the graph sums over two dimensions of its weight"
    readers = other_readers(gm, path, uses)
    return f"the graph also reads its weight in {', '.join(sorted(readers))}" if readers else None


def _take_site(candidate: Candidate, store: nn.Module) -> bool:
    """Fills a candidate from its existing site; False if it has none."""
    for site in store.__dict__.get(SITES, ()):
        if site.path == candidate.path:
            candidate.site, candidate.shape, candidate.dim = site, site.shape, site.dim
            candidate.reduced, candidate.groups = site.reduced, site.groups
            candidate.kind, candidate.capture = site.kind, site.capture
            return True
    return False


def _measure(candidate: Candidate, weight: Tensor, dim: int, groups: int) -> None:
    candidate.shape, candidate.dim = tuple(weight.shape), dim
    candidate.reduced, candidate.groups = weight.shape[dim], groups
    if candidate.kind == "conv_transpose":
        candidate.reduced //= groups
    if candidate.kind.startswith("conv") and candidate.reduced == 1:
        candidate.obstacle = "depthwise: each filter reads a single channel"
