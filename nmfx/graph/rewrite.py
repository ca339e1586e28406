"""The one rewriting pass, in its forms.

    sr_ste      weight ----------------> linear      becomes
                weight -> nmfx_sr_ste -> linear      one node per weight, however often it is used

    keep        the same, with nmfx_keep(weight, mask): the mask is fixed

    packed      linear(x, weight, bias)              becomes
                nmfx_linear_nm(x, values, index, bias, out_features, in_features, n, m)
                conv2d(x, weight, bias, stride, padding, dilation, groups)      becomes
                nmfx_conv_nm(x, values, index, bias, stride, padding, dilation, groups, shape, n, m)

    semi-structured   linear(x, weight, bias)        becomes
                nmfx_linear_semi_structured(x, compressed, meta, bias, out_features, in_features,
                                            dtype)
                conv2d(x, weight, bias, stride, padding, dilation, groups)      becomes
                nmfx_conv_semi_structured(x, compressed, meta, bias, stride, padding, dilation,
                                          groups, shape, dtype)

    by rows     linear(x, weight, bias)              becomes
                nmfx_linear_by_rows(x, ("packed", values, index, n, m), ("dense", weight, False),
                                    bias, out_features, in_features, threshold)

    prepacked   linear(x, weight, bias)              becomes
                nmfx_linear_prepacked(x, weight, bias, copy, transposed)
                conv2d(x, weight, bias, stride, padding, dilation, groups)      becomes
                nmfx_conv_prepacked(x, weight, bias, stride, padding, dilation, groups, 2, copy)

Requires: weights reach their consumers straight from a placeholder or get_attr node.
Ensures: consumers outside the table, and nodes that are no consumers, are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ops.conv_nm import conv_nm
from ..ops.conv_prepacked import conv_prepacked
from ..ops.conv_semi_structured import conv_semi_structured
from ..ops.keep import keep
from ..ops.linear_by_rows import linear_by_rows
from ..ops.linear_nm import linear_nm
from ..ops.linear_prepacked import linear_prepacked
from ..ops.linear_semi_structured import linear_semi_structured
from ..ops.sr_ste import sr_ste
from ..pattern import Pattern
from .table import Consumer, argument, consumer_of, conv_arguments


@dataclass(frozen=True)
class Use:
    """One place where a graph consumes a weight: `node` reads `weight` as `consumer` says."""

    weight: fx.Node
    node: fx.Node
    consumer: Consumer


def find_uses(graph: fx.Graph, is_weight: Callable[[fx.Node], bool]) -> list[Use]:
    """All uses of weights in `graph`, in execution order; `is_weight` tells weights from others."""
    uses = []
    for node in graph.nodes:
        consumer = consumer_of(node)
        if consumer is None:
            continue
        weight = argument(node, consumer.position, consumer.keyword)
        if isinstance(weight, fx.Node) and is_weight(weight):
            uses.append(Use(weight, node, consumer))
    return uses


def insert_sr_ste(graph: fx.Graph, uses: Iterable[Use], control: str, m: int, dim: int) -> fx.Node:
    """Puts one sr_ste node, controlled by attribute `control`, between a weight and its `uses`."""
    return _insert(graph, uses, sr_ste, control, (m, dim))


def insert_keep(graph: fx.Graph, uses: Iterable[Use], mask: str) -> fx.Node:
    """Puts one keep node, with attribute `mask` as fixed mask, between a weight and its `uses`."""
    return _insert(graph, uses, keep, mask, ())


def _insert(
    graph: fx.Graph, uses: Iterable[Use], op: Callable, attribute: str, constants: tuple[int, ...]
) -> fx.Node:
    uses = list(uses)  # in execution order, so the first one's weight node comes before all uses
    with graph.inserting_before(uses[0].node):
        side = graph.create_node("get_attr", attribute)
        masked = graph.call_function(op, (uses[0].weight, side, *constants))
    for use in uses:
        _replace_argument(use, masked)
        if not use.weight.users:  # one weight may be read by several get_attr nodes
            graph.erase_node(use.weight)
    return masked


def find_inserted(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that `insert_sr_ste` and `insert_keep` made: op(weight, side, *constants)."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in (sr_ste, keep)]


def remove_inserted(graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> int:
    """Undoes `insert_sr_ste` and `insert_keep`, for all or the given nodes; returns how many."""
    nodes = find_inserted(graph) if nodes is None else list(nodes)
    for node in nodes:
        weight, side = node.all_input_nodes
        node.replace_all_uses_with(weight)
        graph.erase_node(node)
        graph.erase_node(side)
    return len(nodes)


def replace_with_packed(
    graph: fx.Graph,
    uses: Iterable[Use],
    values: str,
    index: str,
    shape: tuple[int, ...],
    pattern: Pattern,
    activation: str = "none",
) -> None:
    """Replaces the consumers of a weight of `shape` by linear_nm or conv_nm on packed attributes.

    `addmm` is taken as (bias, input, weight) with alpha = beta = 1: check with `can_pack`.
    """
    for use in uses:
        inputs, bias = _operands(use)
        target, rest = _place_taker(use, shape, linear_nm, conv_nm)
        with graph.inserting_before(use.node):
            packed = [graph.create_node("get_attr", name) for name in (values, index)]
            given: dict[str, Any] = {} if activation == "none" else {"activation": activation}
            arguments = (inputs, *packed, bias, *rest, pattern.n, pattern.m)
            call = graph.call_function(target, arguments, given)
        _swap(graph, use, call)


def replace_with_semi_structured(
    graph: fx.Graph,
    uses: Iterable[Use],
    compressed: str,
    meta: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    algorithms: tuple[int, ...] = (),
) -> None:
    """Replaces the consumers of a weight of `shape` by linear_ or conv_semi_structured.

    Check with `can_pack`, as for `replace_with_packed`.
    """
    for use in uses:
        inputs, bias = _operands(use)
        target, rest = _place_taker(use, shape, linear_semi_structured, conv_semi_structured)
        rest += (dtype, algorithms) if algorithms else (dtype,)
        with graph.inserting_before(use.node):
            tensors = [graph.create_node("get_attr", name) for name in (compressed, meta)]
            call = graph.call_function(target, (inputs, *tensors, bias, *rest))
        _swap(graph, use, call)


# A form of a weight: its name, the attributes that hold it, and constants, see `linear_by_rows`.
FormNames = tuple[str, tuple[str, ...], tuple[Any, ...]]


def replace_with_by_rows(
    graph: fx.Graph,
    uses: Iterable[Use],
    few: FormNames,
    many: FormNames,
    shape: tuple[int, ...],
    threshold: int,
    activation: str = "none",
) -> None:
    """Replaces the linear consumers of a weight of `shape` by linear_by_rows.

    Check with `can_pack`, as for `replace_with_packed`.
    """
    for use in uses:
        inputs, bias = _operands(use)
        constants = shape[1 - use.consumer.dim], shape[use.consumer.dim], threshold
        with graph.inserting_before(use.node):
            forms = [
                (form, *(graph.create_node("get_attr", name) for name in names), *rest)
                for form, names, rest in (few, many)
            ]
            given: dict[str, Any] = {} if activation == "none" else {"activation": activation}
            arguments = (inputs, *forms, bias, *constants)
            call = graph.call_function(linear_by_rows, arguments, given)
        _swap(graph, use, call)


def replace_with_prepacked(
    graph: fx.Graph, uses: Iterable[Use], copy: str, shape: tuple[int, ...]
) -> None:
    """Replaces the consumers of a weight of `shape` by linear_prepacked or conv_prepacked.

    They find their copy in attribute `copy`; the weight stays where it was. Check with `can_pack`,
    as for `replace_with_packed`.
    """
    for use in uses:
        node, family, (inputs, bias) = use.node, use.consumer.family, _operands(use)
        with graph.inserting_before(node):
            store = graph.create_node("get_attr", copy)
            target: Callable[..., object] = linear_prepacked
            rest: tuple[Any, ...] = (store, family == "addmm")
            if family == "conv":
                arguments = conv_arguments(node.target, node.args, node.kwargs)
                target, rest = conv_prepacked, (*arguments.values(), len(shape) - 2, store)
            call = graph.call_function(target, (inputs, use.weight, bias, *rest))
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def _place_taker(
    use: Use, shape: tuple[int, ...], linear: Callable[..., Any], conv: Callable[..., Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Which function replaces a consumer, and what it is told of the layer behind the bias."""
    node, dim = use.node, use.consumer.dim
    if use.consumer.family == "conv":
        constants = conv_arguments(node.target, node.args, node.kwargs).values()
        return conv, (*constants, tuple(shape))
    return linear, (shape[1 - dim], shape[dim])


def _operands(use: Use) -> tuple[Any, Any]:
    """(input, bias) of a consumer."""
    if use.consumer.family == "addmm":
        return argument(use.node, 1, "mat1"), added(use.node)
    return argument(use.node, 0, "input"), argument(use.node, 2, "bias")


def _swap(graph: fx.Graph, use: Use, call: fx.Node) -> None:
    """Puts `call` in the place of a consumer; the weight's node goes with its last reader."""
    use.node.replace_all_uses_with(call)
    graph.erase_node(use.node)
    if not use.weight.users:
        graph.erase_node(use.weight)


def can_pack(
    uses: Iterable[Use], is_bias: Callable[[fx.Node], bool] = lambda node: node.op == "get_attr"
) -> str | None:
    """None if `replace_with_packed` can take all uses of a weight, else the reason why not.

    `is_bias` tells which nodes are vectors of one value per output: addmm adds anything.
    """
    for use in uses:
        if use.consumer.family not in ("linear", "addmm", "conv"):
            return f"{use.consumer.family} has no packed kernel yet"
        if set(use.weight.users) - {other.node for other in uses}:
            return "its weight is read by more than linear layers"
        if use.node.kwargs.keys() & {"alpha", "beta"}:
            return "addmm with alpha or beta"
        if use.consumer.family == "addmm" and not is_bias(added(use.node)):
            return "addmm that adds something else than a bias"
    return None


def added(addmm: fx.Node) -> fx.Node:
    """What an addmm node adds to the product."""
    # torch calls it `input`, aten `self`.
    return argument(addmm, 0, "self" if "self" in addmm.kwargs else "input")


def _replace_argument(use: Use, new: fx.Node) -> None:
    if len(use.node.args) > use.consumer.position:
        use.node.update_arg(use.consumer.position, new)
    else:
        use.node.update_kwarg(use.consumer.keyword, new)
