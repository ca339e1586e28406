"""Graph capture: weights that an fx.GraphModule uses without a module of their own.

    gm.graph   get_attr fc.weight -> aten.linear        the pass runs on the graph as given
    gm._nmfx   Holder                                   keeps the sites and their control tensors

Linear and conv modules that the graph *calls* are captured as leaves, like in any other model.
"""

from __future__ import annotations

import itertools

from torch import fx

from ..graph.rewrite import (
    Use,
    find_inserted,
    find_uses,
    insert_keep,
    insert_sr_ste,
    remove_inserted,
)
from ..ops.keep import keep
from ..ops.sr_ste import sr_ste
from .holder import HOLDER, Holder, holder_of
from .replace import replace_uses
from .site import SITES, Site, control_name, mask_name


def find_graph_uses(gm: fx.GraphModule) -> dict[str, list[Use]]:
    """Parameter path -> its uses in the graph, for parameters that table operators read."""
    parameters = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    uses = find_uses(gm.graph, lambda node: node.op == "get_attr" and node.target in parameters)
    by_path: dict[str, list[Use]] = {}
    for use in uses:
        by_path.setdefault(str(use.weight.target), []).append(use)
    return by_path


def masked_uses(gm: fx.GraphModule, path: str) -> list[Use]:
    """The uses of a parameter through its sr_ste or keep node."""
    masked = {node for node in find_inserted(gm.graph) if _weight(node) == path}
    return find_uses(gm.graph, masked.__contains__)


def other_readers(gm: fx.GraphModule, path: str, uses: list[Use]) -> set[str]:
    """Names of the operators, beside `uses`, that read a parameter in the graph."""
    consumers = {use.node for use in uses}
    readers = itertools.chain.from_iterable(
        node.users for node in gm.graph.nodes if node.op == "get_attr" and node.target == path
    )
    return {
        getattr(node.target, "__name__", str(node.target))
        for node in readers
        if node not in consumers
    }


def _weight(inserted: fx.Node) -> str:
    return str(inserted.all_input_nodes[0].target)


def _settle(node: fx.Node, i: int = 0, site: Site | None = None) -> bool:
    """Whether an inserted node is what its site needs; corrects its M. False without a site."""
    if site is None or site.state != ("frozen" if node.target is keep else "sparse"):
        return False
    if node.target is sr_ste:
        node.args = (*node.args[:2], site.pattern.m, site.dim)
    return True


def rewrite_graph(gm: fx.GraphModule) -> None:
    """Brings the graph in line with the sites in its holder: masked, fixed or packed weights.

    Nodes that are right stay, as a new node would take a new name.
    """
    holder = holder_of(gm)
    sites = holder.__dict__[SITES] if holder is not None else []
    numbers = {site.path: (i, site) for i, site in enumerate(sites)}
    nodes = find_inserted(gm.graph)
    remove_inserted(
        gm.graph, [node for node in nodes if not _settle(node, *numbers.get(_weight(node), ()))]
    )
    for node in list(gm.graph.nodes):  # what an interrupted removal left
        if node.op == "get_attr" and not node.users and str(node.target).startswith(f"{HOLDER}."):
            gm.graph.erase_node(node)
    by_path = find_graph_uses(gm)
    for i, site in enumerate(sites):
        uses = by_path.get(site.path, [])
        if not uses:  # packed already
            continue
        if site.lowered:
            replace_uses(gm.graph, uses, site)
        elif site.state == "frozen":
            insert_keep(gm.graph, uses, f"{HOLDER}.{mask_name(i)}")
        else:
            insert_sr_ste(gm.graph, uses, f"{HOLDER}.{control_name(i)}", site.pattern.m, site.dim)
    _check_loads(gm, any(site.lowered for site in sites))
    gm.recompile()


def _check_loads(gm: fx.GraphModule, wanted: bool) -> None:
    """Has the holder look at what `gm` loads, or no more.

    A hook that is passed the module would refer to it, and torch could not pickle the graph. Copies
    keep the hook; what is unpickled does not, because torch drops all hooks of a graph there.
    """
    hooks, holder = gm._load_state_dict_pre_hooks, holder_of(gm)
    for key, wrapped in list(hooks.items()):
        hook = getattr(wrapped, "hook", wrapped)
        if getattr(hook, "__func__", None) is Holder.check_host:
            del hooks[key]
    if wanted and holder is not None:
        gm._register_load_state_dict_pre_hook(holder.check_host)
