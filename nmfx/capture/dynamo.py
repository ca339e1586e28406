"""The weights of a graph that Dynamo captured, and the pass that packs them.

    linear(x, weight, bias)                           becomes
    nmfx_linear_nm(x, weight_values, weight_index, bias, ..., activation)

The weight is an input of the graph (with Inductor's freezing: an attribute), and leaves it; what
was packed of it becomes two buffers of the graph.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ..graph.follow import activation, only_user
from ..graph.rewrite import Use, can_pack, find_uses, replace_with_packed
from ..graph.table import argument, groups_argument
from ..ops.conv_nm import conv_nm
from ..ops.linear_nm import linear_nm
from ..packing import detect_pattern
from ..pattern import Pattern
from ..tuning.shapes import Seen, describe
from .candidates import Candidate
from .obstacles import tensor_obstacle
from .program import PackedWeight


@dataclass(frozen=True)
class Found:
    """A weight that operators of the table read, and what is known about it.

    Attributes:
        candidate: for the choice; its obstacle says why it cannot be packed.
        weight: the parameter.
        place: its number among the graph's inputs, or None for an attribute.
        uses: where the graph consumes it.
        pattern: that it satisfies, or None.
        seen: the inputs that it meets; None if only running tells their sizes.
    """

    candidate: Candidate
    weight: nn.Parameter
    place: int | None
    uses: list[Use]
    pattern: Pattern | None
    seen: Mapping[Seen, int] | None


def own_graph(gm: fx.GraphModule) -> None:
    """Gives a module of Dynamo's a copy of its graph, to be changed.

    Dynamo reads the inputs to call with off its own graph, when everything is compiled; one that
    lost an input there would not be given it.
    """
    graph = copy.deepcopy(gm.graph)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):  # AOTAutograd asks for it
            new._dynamo_source = old._dynamo_source
    gm.graph = graph


def find_weights(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Found]:
    """All parameters that a captured graph multiplies with; changes nothing."""
    values = _parameters(gm, inputs)
    by_weight: dict[fx.Node, list[Use]] = {}
    for use in find_uses(gm.graph, values.__contains__):
        by_weight.setdefault(use.weight, []).append(use)
    places = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    return [
        _judge(gm, node, values[node], places.get(node), uses) for node, uses in by_weight.items()
    ]


def other_weights(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[tuple[nn.Parameter, str]]:
    """Matrices that no operator of the table reads, and what does, for the report."""
    values = _parameters(gm, inputs)
    used = {use.weight for use in find_uses(gm.graph, values.__contains__)}
    return [
        (weight, ", ".join(dict.fromkeys(str(_reader(user)) for user in node.users)))
        for node, weight in values.items()
        if node not in used and weight.ndim > 1
    ]


def _reader(node: fx.Node) -> object:
    return getattr(node.target, "__name__", node.target)


def _parameters(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, nn.Parameter]:
    """The nodes that hold parameters, with them."""
    found = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    own = dict(gm.named_parameters(remove_duplicate=False))
    found |= {node: own.get(str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    return {node: value for node, value in found.items() if isinstance(value, nn.Parameter)}


def _judge(
    gm: fx.GraphModule, node: fx.Node, weight: nn.Parameter, place: int | None, uses: list[Use]
) -> Found:
    name, use = _name(gm, node), uses[0]
    kind, dim = use.consumer.family, use.consumer.dim
    groups = max(map(_groups, uses)) if kind.startswith("conv") else 1
    candidate = Candidate(
        name,
        name.rpartition(".")[0],
        gm,
        str(node.target),
        kind,
        tuple(weight.shape),
        dim,
        weight.shape[dim] if weight.ndim else 0,
        # As a leaf, so that a prepacked layer is a rival where Inductor freezes: it has that then.
        "graph" if place is not None else "leaf",
        groups,
    )
    candidate.obstacle = tensor_obstacle(weight) or _obstacle(candidate, weight, uses)
    pattern = None
    if candidate.obstacle is None:
        pattern = detect_pattern(weight, dim)
        if pattern is None:
            candidate.obstacle = "its weight satisfies no N:M pattern that would make it smaller"
    seen = None
    if candidate.obstacle is None and all(map(_sized, uses)):
        seen = Counter(map(_seen, uses))
    return Found(candidate, weight, place, uses, pattern, seen)


def _sized(use: Use) -> bool:
    """Whether the sizes that a consumer is called with are known, at least as of today."""
    values = [node.meta.get("example_value") for node in (use.node, *use.node.all_input_nodes)]
    sizes = [
        size
        for value in values
        for size in ((*value.shape, *value.stride()) if isinstance(value, Tensor) else [value])
    ]
    return all(
        size.node.hint is not None if isinstance(size, torch.SymInt) else size is not None
        for size in sizes
    )


def _groups(use: Use) -> int:
    groups = groups_argument(use.node)
    return groups if isinstance(groups, int) else 1


def _obstacle(candidate: Candidate, weight: Tensor, uses: list[Use]) -> str | None:
    if len({(use.consumer, _groups(use)) for use in uses}) > 1:
        return "the graph reads its weight in two ways"
    if type(weight.data) is not Tensor:
        return f"it is a {type(weight.data).__name__}"
    if weight.is_inference():
        return "it is an inference tensor, which does not tell when it is changed"
    if weight.device.type not in ("cpu", "cuda"):
        return f"it is on {weight.device.type}, where nmfx has no packed kernel"
    if candidate.kind not in ("linear", "addmm", "conv") or not 2 <= weight.ndim <= 4:
        return f"{weight.ndim - 2}-D {candidate.kind} has no packed kernel yet"
    outputs = weight.shape[1 - candidate.dim]

    def is_bias(node: fx.Node) -> bool:
        value = node.meta.get("example_value")
        return isinstance(value, Tensor) and tuple(value.shape) == (outputs,)

    reason = can_pack(uses, is_bias)
    if reason is not None or candidate.kind == "addmm":
        return reason
    biases = [argument(use.node, 2, "bias") for use in uses]
    if any(isinstance(bias, fx.Node) and not is_bias(bias) for bias in biases):
        return "its bias is not one number for each output"
    return None


def _name(gm: fx.GraphModule, node: fx.Node) -> str:
    """The parameter's name in the model: of L['self']._modules['fc']._parameters['weight']."""
    if node.op == "get_attr":
        names = gm.meta.get("dynamo_flat_name_to_original_fqn", {})
        return str(names.get(node.target, node.target))
    grapharg = node.meta.get("grapharg")
    source = "" if grapharg is None else str(grapharg.source.name)
    parts = re.findall(r"\['([^']+)'\]", source) or [str(node.target)]
    return ".".join(parts[1:] or parts)


def _seen(use: Use) -> Seen:
    """What a consumer is called with, sizes that are not fixed as they are today."""
    args, kwargs = tree_map(_example, (use.node.args, use.node.kwargs))
    seen = describe(use.node.target, args, kwargs)
    out = use.node.meta["example_value"].dtype
    # Its result tells what autocast does, wherever it was entered.
    cast = {seen.dtype, str(use.weight.meta["example_value"].dtype)} != {str(out)}
    return replace(seen, autocast=str(out) if cast else None)


def _example(value: Any) -> Any:
    value = value.meta["example_value"] if isinstance(value, fx.Node) else value
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)
    if not isinstance(value, Tensor):
        return value
    sizes = [int(_example(size)) for size in value.shape]
    strides = [int(_example(step)) for step in value.stride()]
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def pack_found(gm: fx.GraphModule, found: Found) -> PackedWeight:
    """Replaces the consumers of a weight by packed ones, with the activation behind them.

    The weight's node is gone then; `gm` is to be recompiled.
    """
    c, pattern = found.candidate, found.pattern
    assert pattern is not None
    packed = PackedWeight(found.weight, found.place, c.dim, c.groups, pattern)
    names = [f"_nmfx_{found.uses[0].weight.name}_{part}" for part in ("values", "index")]
    for name, tensor in zip(names, (packed.values, packed.index), strict=True):
        gm.register_buffer(name, tensor)
        _tell_source(gm, name)
    replace_with_packed(gm.graph, found.uses, names[0], names[1], c.shape, pattern)
    for node in list(gm.graph.nodes):
        if node.target in (linear_nm, conv_nm) and node.args[1].target == names[0]:
            _fuse(gm.graph, node)
    return packed


def _fuse(graph: fx.Graph, node: fx.Node) -> None:
    after = only_user(node)
    name = None if after is None else activation(after, node)
    if after is not None and name is not None:
        node.update_kwarg("activation", name)
        after.replace_all_uses_with(node)
        graph.erase_node(after)


def _tell_source(gm: fx.GraphModule, name: str) -> None:
    """AOTAutograd asks where each buffer of Dynamo's graphs comes from, and takes no None."""
    from torch._dynamo.source import ConstantSource

    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = ConstantSource(name)
