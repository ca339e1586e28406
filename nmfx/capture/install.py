"""Brings a host in line with its sites: the one place where classes and graphs are changed."""

from __future__ import annotations

from torch import fx, nn

from ..errors import NMError
from .attention import attention_class
from .experts import experts_class
from .generate import base_class, is_generated, rebuild_with
from .graph_module import rewrite_graph
from .guards import guard_class, guards
from .holder import HOLDER, Holder, holder_of
from .leaf import leaf_class
from .obstacles import computed_since
from .refs import iter_sites
from .scoped import scoped_class
from .sharding import fsdp_modules
from .site import SITES, Site, add_sites, drop_sites


def class_for(module: nn.Module, sites: list[Site] | None = None) -> type[nn.Module]:
    """The class that runs `module` as its sites (or the given ones) say; changes nothing."""
    if sites is None:
        sites = module.__dict__[SITES]
    if not sites:
        # A guard whose child was exchanged for one without a weight guards nothing.
        return guard_class(module) or base_class(module)
    if sites[0].capture == "leaf":
        return leaf_class(module, sites[0])
    if sites[0].lowered:
        lowered = attention_class if isinstance(module, nn.MultiheadAttention) else experts_class
        return lowered(module, sites)
    return scoped_class(module, sites)


rebuild_with(class_for)


def check_classes(model: nn.Module) -> None:
    """Refuses to change classes and weights under what somebody else put on top of them.

    Raises:
        NMError: after it was sparsified, a host's class was replaced (parametrizations, FSDP2), or
            its forward on the instance (accelerate), which still calls the one of today's class;
            or its weight is computed before every forward (weight_norm, prune), or gone.
    """
    for fqn, module in model.named_modules():
        if SITES not in module.__dict__ or isinstance(module, Holder):
            continue
        change = None
        fix = "undo that first"
        if not is_generated(type(module)):
            change = f"its class became {type(module).__name__}"
            if fsdp_modules(module)[:1] == [module]:
                fix = "fully_shard the module above it, or this one before nmfx.sparsify"
        elif "forward" in module.__dict__:
            change = "its forward was replaced on the instance"
        if change is not None:
            raise NMError(f"{fqn or 'model'}: {change} after it was sparsified; {fix}")
    for ref in iter_sites(model):
        change = computed_since(ref.host, ref.site)
        if change is not None:
            raise NMError(f"{ref.name}: {change}")


def refresh(host: nn.Module, store: nn.Module) -> None:
    """Runs a host as its changed sites say (another M, frozen, lowered)."""
    if isinstance(store, Holder):
        assert isinstance(host, fx.GraphModule)
        rewrite_graph(host)
    else:
        host.__class__ = class_for(host)


def install_guards(model: nn.Module, hosts: set[nn.Module]) -> None:
    """Makes the parents that read the weights of `hosts` themselves read masked ones."""
    for module in model.modules():
        if SITES not in module.__dict__ and guards(module, hosts):
            guard = guard_class(module)
            assert guard is not None, type(module)
            add_sites(module, [], [])
            module.__class__ = guard


def remove(module: nn.Module) -> None:
    """Restores a module's class and graph and forgets its sites, unless they are lowered.

    Parameters are not touched.
    """
    holder = holder_of(module)
    if holder is not None:
        assert isinstance(module, fx.GraphModule)
        packed = [site for site in holder.__dict__[SITES] if site.lowered]
        drop_sites(holder, packed)
        rewrite_graph(module)
        if not packed:
            del module._modules[HOLDER]
    if is_generated(type(module)):
        if any(site.lowered for site in module.__dict__[SITES]):
            return
        module.__class__ = base_class(module)
    if not isinstance(module, Holder):
        drop_sites(module)  # also what an interrupted call left under a restored class
