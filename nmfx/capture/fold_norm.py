"""Batch norms folded into the layers before them, so that nothing is left of them to run.

    y = (W x + b - mean) / sqrt(var + eps) * gamma + beta      becomes      y = (s W) x + t

    s = gamma / sqrt(var + eps)       one number for each output channel, so zeros stay zeros and
    t = (b - mean) s + beta           the weight keeps its pattern

The batch norm becomes an nn.Identity (timm's with an activation becomes that), or leaves the graph.
Each is folded completely or not at all, whatever interrupts it; what was folded stays so.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.follow import batch_norm_arguments, batch_norm_result, only_user
from ..graph.rewrite import Use
from ..graph.table import argument
from ..mask import magnitude
from .graph_module import find_graph_uses
from .leaf import trace_leaf
from .lowering import Target
from .neighbours import Neighbour, has_act, is_frozen, left_by
from .site import FOLDED, get_path, join, marks_of, place_of

_ROWS = 64  # converted to float64 at a time


def folded(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(weight, bias) of the layer that computes what the two did; computed in float64.

    Args:
        weight: (out_channels, ...).
        bias, mean, var, gamma, beta: (out_channels,), or None where that is allowed.

    Returns:
        Tensors of the dtype of `weight`, zeros as +0.0; None if a finite weight would overflow.
    """
    scale = torch.rsqrt(var.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * scale
    if beta is not None:
        shift = shift + beta.double()
    new = torch.empty_like(weight)
    each = scale.view(-1, *(1,) * (weight.ndim - 1)).split(_ROWS)
    for part, into, s in zip(weight.split(_ROWS), new.split(_ROWS), each, strict=True):
        # Zero times a negative number is -0.0. By bits, as denormals may count as zero.
        into.copy_(torch.where(magnitude(part) == 0, 0.0, part.double() * s))
    shift = shift.to(weight.dtype)
    if not (new.isfinite() | ~weight.isfinite()).all() or not shift.isfinite().all():
        return None
    return new, shift


class NormFolding:
    """Folds batch norms one by one; `take_back` undoes the one that an error interrupted."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def take_back(self) -> None:
        """Undoes a fold that began and did not end."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def _set(self, table: MutableMapping[str, Any], key: str, value: Any) -> None:
        old = table[key]
        self._steps.append(lambda: table.__setitem__(key, old))
        table[key] = value

    def _mark(self, host: nn.Module, path: str) -> None:
        """Notes that a batch norm was folded into a weight of `host`."""
        marks = marks_of(host)
        if FOLDED not in marks:
            self._steps.append(lambda: marks.pop(FOLDED, None))
            marks[FOLDED] = ()
        self._set(marks, FOLDED, (*marks[FOLDED], path))

    def _set_data(self, parameter: nn.Parameter, data: Tensor) -> None:
        old = parameter.data
        self._steps.append(lambda: setattr(parameter, "data", old))
        parameter.data = data

    @torch.no_grad()
    def fold_module(
        self, target: Target, pair: Neighbour, training: bool, dims: set[int]
    ) -> str | None:
        """Folds the batch norm of `pair` into the layer of `target`; or says why not.

        Args:
            target: dense, of leaf capture.
            pair: its module and the batch norm.
            training: whether the batch norm was in train mode before.
            dims: how many dimensions the layer's results had when the examples ran.
        """
        conv, norm = pair.first, pair.second
        assert isinstance(norm, nn.Module)
        obstacle = _obstacle(target, norm, training, dims)
        if obstacle is not None:
            return obstacle
        weight, bias = conv._parameters["weight"], conv._parameters["bias"]
        assert weight is not None
        names = "running_mean", "running_var", "eps", "weight", "bias"
        constants: list[Any] = [getattr(norm, name) for name in names]
        new = folded(weight, bias, *constants)
        if new is None:
            return "folded in, its weights would overflow"
        table, name = pair.place_of_second()
        self._mark(conv, target.candidate.path)
        self._set_data(weight, new[0])
        # A new parameter: another layer may share the old one.
        self._set(
            conv._parameters,
            "bias",
            nn.Parameter(new[1], (weight if bias is None else bias).requires_grad),
        )
        self._set(table, name, left_by(norm))
        self._steps.clear()
        return None

    @torch.no_grad()
    def fold_graph(self, target: Target, values: tuple[Tensor, Tensor] | None = None) -> str | None:
        """Folds the batch norm behind a layer of graph capture, if there is one.

        Args:
            target: the layer.
            values: (weight, bias) after folding, where they are known already.

        Returns:
            "" if it was folded, None if there is none, else the reason why it stays.
        """
        gm, path = target.candidate.host, target.candidate.path
        assert isinstance(gm, fx.GraphModule)
        uses = find_graph_uses(gm).get(path, [])
        norm = only_user(uses[0].node) if len(uses) == 1 else None
        found = None if norm is None else batch_norm_arguments(norm, uses[0].node)
        if norm is None or found is None or batch_norm_result(norm) is None:
            return None
        constants = _constants(gm, found)
        if target.candidate.kind == "addmm" or not _has_channels(uses[0], target.candidate.shape):
            return _NOT_CHANNELS
        if constants is None:
            return "its batch norm reads more than constants"
        place = _bias_place(gm, uses[0], path)
        if place is None:
            return "its bias is computed, or read elsewhere"
        weight, bias = target.weight, place.owner._parameters.get(place.name)
        assert isinstance(weight, nn.Parameter)
        new = folded(weight, bias, **constants) if values is None else values
        if new is None:
            return "folded in, its weights would overflow"
        graph, old = _without_norm(gm, uses[0], place.path), gm.graph
        self._mark(gm, path)
        self._set_data(weight, new[0])
        table = place.owner._parameters
        if place.name not in table:
            self._steps.append(lambda: table.pop(place.name, None))
            table[place.name] = None
        parameter = nn.Parameter(new[1], (weight if bias is None else bias).requires_grad)
        self._set(table, place.name, parameter)
        self._steps.append(lambda: setattr(gm, "graph", old))
        gm.graph = graph
        for name in (found["mean"], found["var"], found["weight"], found["bias"]):
            if isinstance(name, fx.Node):
                self._drop_unread(gm, str(name.target))
        self._steps.clear()
        return ""

    def _drop_unread(self, gm: fx.GraphModule, path: str) -> None:
        """Deletes a tensor that the graph no longer reads, from the state_dict too."""
        for node in gm.graph.nodes:
            if node.op == "get_attr" and node.target == path:
                return
            if node.op == "call_module" and path.startswith(f"{node.target}."):
                return
        owner, name = place_of(gm, path)
        for table in (owner._parameters, owner._buffers):
            if name in table:
                self._steps.append(functools.partial(_refill, table, dict(table)))
                del table[name]


def _refill(table: dict[str, Any], before: dict[str, Any]) -> None:
    table.clear()
    table.update(before)


_NOT_CHANNELS = "it does not normalise the channels of a convolution or linear layer"


def _obstacle(target: Target, norm: Any, training: bool, dims: set[int]) -> str | None:
    shape, kind = target.candidate.shape, target.candidate.kind
    # BatchNorm1d normalises dimension 1: the channels of a linear layer if its results are (N, C).
    wanted = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,)}.get(type(norm), (2, 3, 4))
    wanted = (4,) if is_frozen(norm) or has_act(norm) else wanted
    fits = kind in ("conv", "linear") and len(shape) in wanted and dims == {len(shape)}
    features = norm.weight.shape[0] if is_frozen(norm) else norm.num_features
    if not fits or features != shape[0]:
        return _NOT_CHANNELS
    if training and not is_frozen(norm):
        return "it is in train mode; call model.eval() before nmfx.lower"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    graph, uses, _ = trace_leaf(target.candidate.host)
    output = next(node for node in graph.nodes if node.op == "output")
    bias = argument(uses[0].node, 2, "bias")
    plain = isinstance(bias, fx.Node) and bias.op == "get_attr" and bias.target == "bias"
    if len(uses) != 1 or output.args[0] is not uses[0].node or not plain:
        return f"the layer computes more than a {'convolution' if kind == 'conv' else kind}"
    return None


def _has_channels(use: Use, shape: tuple[int, ...]) -> bool:
    """Whether dimension 1 of a layer's result in a graph holds its channels.

    Batch norms take (N, C) and (N, C, *size); of (N, L, C), what a linear layer may return, they
    normalise L. Exported graphs know how many dimensions there are, and check it.
    """
    value = use.node.meta.get("val")
    if isinstance(value, Tensor):
        return value.ndim == len(shape)
    return use.consumer.family == "conv"


def _constants(gm: fx.GraphModule, found: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of `folded`, from those of a batch norm in a graph."""
    names = {"mean": "mean", "var": "var", "weight": "gamma", "bias": "beta"}
    values: dict[str, Any] = {"eps": found["eps"]}
    for name, parameter in names.items():
        node = found[name]
        if isinstance(node, fx.Node) and node.op != "get_attr":
            return None
        values[parameter] = None if node is None else get_path(gm, str(node.target))
    if values["mean"] is None or values["var"] is None or not isinstance(values["eps"], float):
        return None
    return values


@dataclass(frozen=True)
class _Place:
    """Where a parameter is kept, or could be."""

    owner: nn.Module
    name: str
    path: str  # in the graph


def _bias_place(gm: fx.GraphModule, use: Use, weight: str) -> _Place | None:
    """The place of the bias of a convolution in a graph, beside its weight if it has none yet.

    None if the bias is computed, if something else reads it, or if its place is taken.
    """
    node = argument(use.node, 2, "bias")
    path = join(weight.rpartition(".")[0], "bias")
    if isinstance(node, fx.Node) and node.op == "get_attr":
        path = str(node.target)
    elif node is not None:
        return None
    prefix, _, name = path.rpartition(".")
    place = _Place(get_path(gm, prefix) if prefix else gm, name, path)
    if node is None:
        return place if getattr(place.owner, name, None) is None else None
    reads = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == path]
    users = [user for n in reads for user in n.users]
    return place if users == [use.node] and name in place.owner._parameters else None


def _without_norm(gm: fx.GraphModule, use: Use, path: str) -> fx.Graph:
    """A copy of the graph without the batch norm behind `use`, whose bias is at `path`."""
    places = {node: number for number, node in enumerate(gm.graph.nodes)}
    graph = copy.deepcopy(gm.graph)
    conv = list(graph.nodes)[places[use.node]]
    norm = only_user(conv)
    assert norm is not None
    result = batch_norm_result(norm)
    assert result is not None
    if argument(conv, 2, "bias") is None:
        with graph.inserting_before(conv):
            bias = graph.create_node("get_attr", path)
        if len(conv.args) > 2:
            conv.update_arg(2, bias)
        else:
            conv.update_kwarg("bias", bias)
    constants = [node for node in norm.all_input_nodes if node.op == "get_attr"]
    result.replace_all_uses_with(conv)
    for node in dict.fromkeys((result, norm)):
        graph.erase_node(node)
    for node in constants:
        if not node.users:
            graph.erase_node(node)
    return graph
