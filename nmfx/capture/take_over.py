"""What torch.export made of a sparsified or lowered model, taken over as nmfx's own.

    nmfx.sr_ste.default(weight, control, m, dim, ...)       becomes a site, with its pattern
    nmfx.linear_nm.default(x, values, index, ...)           becomes a packed site
    nmfx.conv_nm.default(x, values, index, ...)

The graph computes what it did, and every verb works on it as on the model that was exported. Masks
that were frozen are constants of an exported graph, in operators of torch: they stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from ..errors import NMError
from ..graph.recompose import decomposed_linears, recompose_linears
from ..ops.conv_nm import conv_nm
from ..ops.linear_nm import linear_nm
from ..pattern import Pattern
from .candidates import Candidate, find_candidates
from .forms import packed_names
from .graph_module import rewrite_graph
from .holder import HOLDER, Holder, holder_of
from .site import SITES, Site, get_path, join

_ops = torch.ops.nmfx
_MASKS = (_ops.sr_ste.default, _ops.sr_ste_project.default)
_PACKED = (_ops.linear_nm.default, _ops.conv_nm.default)
_VALUES, _INDEX = packed_names("")


def exported_nodes(model: nn.Module) -> list[tuple[str, fx.Node]]:
    """(name of the weight, node) for the operators of nmfx in exported graphs of a model."""
    return [
        (join(fqn, _path(node)), node)
        for fqn, module in model.named_modules()
        if isinstance(module, fx.GraphModule)
        for node in _nodes(module)
    ]


def decomposed_names(model: nn.Module) -> list[str]:
    """Names of the weights of linear layers that are decomposed in graphs of a model."""
    return [
        join(fqn, str(weight.target))
        for fqn, module in model.named_modules()
        if isinstance(module, fx.GraphModule)
        for _, _, weight, _ in decomposed_linears(module.graph, _is_parameter(module))
    ]


def recompose(model: nn.Module, inplace: bool = True) -> nn.Module:
    """Puts decomposed linear layers of graphs together, in a model or a copy of it."""
    if not decomposed_names(model):
        return model
    model = model if inplace else copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            recompose_linears(module.graph, _is_parameter(module))
            module.recompile()
    return model


def _is_parameter(gm: fx.GraphModule) -> Callable[[Any, int], bool]:
    own = dict(gm.named_parameters(remove_duplicate=False))

    def check(node: Any, ndim: int) -> bool:
        found = own.get(str(node.target)) if getattr(node, "op", "") == "get_attr" else None
        return found is not None and found.ndim == ndim

    return check


def _nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for node in gm.graph.nodes:
        ours = node.op == "call_function" and node.target in (*_MASKS, *_PACKED)
        if ours and all(getattr(one, "op", "") == "get_attr" for one in _tensors(node)):
            yield node


def _tensors(node: fx.Node) -> tuple[Any, ...]:
    """(weight, control) or (values, index)."""
    return node.args[:2] if node.target in _MASKS else node.args[1:3]


def _path(node: fx.Node) -> str:
    """The weight of a node, relative to its graph."""
    if node.target in _MASKS:
        return str(node.args[0].target)  # type: ignore[union-attr]
    return str(node.args[1].target).removesuffix(_VALUES)  # type: ignore[union-attr]


def take_over(
    model: nn.Module, inplace: bool = True
) -> tuple[nn.Module, list[tuple[Candidate, Site]]]:
    """Reads the operators of nmfx off exported graphs.

    Args:
        model: anything; without such operators nothing happens.
        inplace: whether to change `model` itself, or a copy of it.

    Returns:
        The model, its packed sites in place, and the masks to be installed in it.

    Raises:
        NMError: the graph reads a masked or packed weight in other operators too. Nothing is
            changed then.
    """
    if not exported_nodes(model):
        return model, []
    model = model if inplace else copy.deepcopy(model)
    graphs = {m: m.graph for m in model.modules() if isinstance(m, fx.GraphModule)}
    found: dict[tuple[nn.Module, str], tuple[Pattern, float]] = {}
    try:
        for gm in graphs:
            gm.graph = copy.deepcopy(gm.graph)
            for node in list(_nodes(gm)):
                if node.target in _MASKS:
                    path = _path(node)
                    found[gm, path] = _without_mask(gm, node)
            _check_readers(gm)
            gm.recompile()
        masked = [c for c in find_candidates(model) if (c.host, c.path) in found]
        for candidate in masked:
            if candidate.obstacle is not None:
                raise NMError(f"{candidate.name}: {candidate.obstacle}, beside its exported mask")
        if len(masked) < len(found):
            raise NMError("an exported mask stands before something that is no linear or conv")
    except BaseException:
        for gm, graph in graphs.items():
            gm.graph = graph
        raise
    for gm in graphs:
        _own_packed(gm)
        _drop_controls(gm)
    return model, [(c, _site(c, *found[c.host, c.path])) for c in masked]


def _without_mask(gm: fx.GraphModule, node: fx.Node) -> tuple[Pattern, float]:
    """Takes a mask out of a graph; its pattern, and the strength of the decay."""
    weight, control, m = node.args[0], node.args[1], node.args[2]
    assert isinstance(weight, fx.Node)
    assert isinstance(control, fx.Node)
    assert isinstance(m, int)
    lambda_w, n = get_path(gm, str(control.target)).tolist()
    node.replace_all_uses_with(weight)
    gm.graph.erase_node(node)
    if not control.users:
        gm.graph.erase_node(control)
    return Pattern(int(n), m), lambda_w


def _drop_controls(gm: fx.GraphModule) -> None:
    """Forgets the control tensors that the graph no longer reads."""
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for fqn, module in gm.named_modules():
        if isinstance(module, Holder):
            continue
        for table in (module.__dict__, module._buffers):
            for name in [key for key in table if key.startswith("_nmfx_control")]:
                if join(fqn, name) not in read:
                    del table[name]


def _check_readers(gm: fx.GraphModule) -> None:
    """Refuses packed tensors that something else reads, too.

    Code that asks for `layer.weight.dtype` leaves the unpacking of it in the graph, without use.
    """
    packed = {str(one.target) for node in _nodes(gm) for one in _tensors(node)}  # masks are gone
    derived: set[fx.Node] = set()
    for node in gm.graph.nodes:
        read = node.op == "get_attr" and str(node.target) in packed
        computed = node.op == "call_function" and node.target not in _PACKED
        sources = node.all_input_nodes or not node.is_impure()  # arange, say, but not rand
        if read or (computed and sources and derived.issuperset(node.all_input_nodes)):
            derived.add(node)
    gm.graph.eliminate_dead_code(lambda node: node not in derived)  # asserts about them go, too
    for node in gm.graph.find_nodes(op="get_attr"):
        others = [user for user in node.users if user.target not in _PACKED]
        if str(node.target) in packed and others:
            reader = getattr(others[0].target, "__name__", others[0].target)
            raise NMError(f"{node.target}: the graph reads it in {reader} too, so it stays packed")


def _site(c: Candidate, pattern: Pattern, lambda_w: float) -> Site:
    return Site(
        c.path, c.shape, c.dim, c.reduced, pattern, lambda_w, c.kind, c.capture, groups=c.groups
    )


def _own_packed(gm: fx.GraphModule) -> None:
    """Makes packed operators calls of nmfx's functions, and sites of their weights."""
    sites: dict[str, Site] = {}
    for node in list(_nodes(gm)):
        path = _path(node)
        site, arguments = _packed(node, path)
        with gm.graph.inserting_before(node):
            target: Any = linear_nm if site.kind == "linear" else conv_nm
            given = {} if arguments[-1] == "none" else {"activation": arguments[-1]}
            call = gm.graph.call_function(target, tuple(arguments[:-1]), given)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
        sites[path] = site
    if sites:
        holder = holder_of(gm) or Holder()
        holder.__dict__[SITES] = [*holder.__dict__.get(SITES, ()), *sites.values()]
        gm._modules[HOLDER] = holder
    rewrite_graph(gm)


def _packed(node: fx.Node, path: str) -> tuple[Site, list[Any]]:
    """The site of a packed operator, and the arguments of nmfx's function, activation last."""
    args: list[Any] = list(node.args)
    *_, n, m, activation = args
    if node.target is _ops.linear_nm.default:
        shape, kind, groups = (args[4], args[5]), "linear", 1
        rest = args[4:6]
    else:
        _, values, _, _, outputs, kernel, stride, padding, dilation, groups = args[:10]
        gm = node.graph.owning_module
        assert gm is not None
        columns = get_path(gm, str(values.target)).shape[1] * m // n  # see `nmfx.packing`
        shape, kind = (outputs, columns // torch.Size(kernel).numel(), *kernel), "conv"
        rest = [stride, padding, dilation, groups, shape]
    site = Site(
        path, tuple(shape), 1, shape[1], Pattern(n, m), 0.0, kind, "graph", "packed", groups=groups
    )
    return site, [*args[:4], *rest, n, m, activation]
