"""FSDP2 with mixed precision: what it gathers has the mask of the float32 weights.

    shard, float32  ->  round_in_order  ->  all-gather, bfloat16  ->  sr_ste  ->  linear

FSDP2 asks the local tensor of a shard for `fsdp_pre_all_gather` and `fsdp_post_all_gather`, its
hooks for tensors that are gathered in another form. A host puts both there, as attributes, when it
is given its shard, and takes them away when it is given anything else (the gathered weight). So
parameters, their types and state_dicts stay as they are.

Weights that this does not reach are masked as they arrive, where ties go by their index: those that
lie in a module below their host (`out_proj` of a MultiheadAttention, modules of a GraphModule), in
shards that cut groups, and in shards that are offloaded to the CPU. `notes_on_rounding` says so.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.ordered import round_in_order
from ..ops.sharded import is_sharded
from .refs import iter_sites
from .sharding import fsdp_modules, reshard
from .site import SHARDS, SITES, Site, control_name, place_of

_BEFORE, _AFTER = "fsdp_pre_all_gather", "fsdp_post_all_gather"


class ShardHooks:
    """What a host knows of the shard of one of its weights, and FSDP2's hooks on it.

    Attributes:
        path: the weight.
        mesh: of the shard: what is on another is not the shard. None if it is not known.
        asked: whether FSDP2 has called; it looks for hooks only until it gathers first.
        late: whether it did that without calling.
        put_on: the shard that has the hooks, or had them last.
    """

    def __init__(self, path: str, mesh: Any, late: bool = False) -> None:
        self.path, self.mesh = path, mesh
        self.asked, self.late = False, late
        self.put_on: weakref.ref[Tensor] | None = None

    def put(self, local: Tensor) -> None:
        """Hooks on to a shard."""
        self.put_on = weakref.ref(local)
        setattr(local, _BEFORE, self)
        setattr(local, _AFTER, _after)

    def take_away(self) -> None:
        """Leaves the shard as it was."""
        local = None if self.put_on is None else self.put_on()
        if local is not None and hasattr(local, _BEFORE):
            delattr(local, _BEFORE)
            delattr(local, _AFTER)

    def __call__(
        self,
        mesh: Any,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: Any,
    ) -> tuple[tuple[Tensor, ...], None]:
        """FSDP2's `fsdp_pre_all_gather`: what this rank sends."""
        self.asked = True
        shard = None if self.put_on is None else self.put_on()
        assert shard is not None
        dtype, sent = mp_policy.param_dtype, shard.detach()
        if dtype is not None and dtype != sent.dtype:
            sent = _rounded(sent, dtype, module, self.path)
        rows = -(-outer_size[0] // mesh.size())
        if sent.shape[1:] == outer_size[1:] and len(sent) < rows:  # the last ranks have less
            padded = sent.new_zeros(rows, *outer_size[1:])
            padded[: len(sent)] = sent
            sent = padded
        return (sent,), None


def _after(
    outputs: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """FSDP2's `fsdp_post_all_gather`: what all ranks sent is the weight, in place."""
    return None if out is not None else (outputs[0], ())


def _rounded(shard: Tensor, dtype: torch.dtype, module: nn.Module, path: str) -> Tensor:
    for i, site in enumerate(module.__dict__.get(SITES, ())):
        if site.path == path and site.state == "sparse" and _can_order(shard, site, dtype):
            control = module.__dict__[control_name(i)]
            return round_in_order(shard, control, site.pattern.m, site.dim, dtype)
    return shard.to(dtype)


def _can_order(shard: Tensor, site: Site, dtype: torch.dtype) -> bool:
    return (
        shard.dtype in (torch.float32, torch.float64)
        and dtype in (torch.bfloat16, torch.float16)
        # A shard of whole groups is followed and preceded by such shards.
        and shard.shape[site.dim] % site.pattern.m == 0
    )


def follow(host: nn.Module, name: str, value: Any) -> None:
    """Called when a host is given a value for an attribute, which may be a shard of its weight."""
    hooks: dict[str, ShardHooks] = host.__dict__.get(SHARDS, {})
    hook = hooks.get(name)
    shard = is_sharded(value) and (hook is None or value.device_mesh == hook.mesh)
    if not shard:
        if hook is not None:
            hook.late |= not hook.asked
            hook.take_away()
        return
    if hook is None:
        if not any(site.path == name for site in host.__dict__.get(SITES, ())):
            return
        hook = ShardHooks(name, value.device_mesh)
        host.__dict__[SHARDS] = {**hooks, name: hook}
    local = value._local_tensor
    offloaded = not local.is_meta and local.device.type != value.device_mesh.device_type
    # Other classes of tensor have hooks of their own.
    if type(local) is Tensor and not offloaded and not hook.late and not hasattr(local, _BEFORE):
        hook.put(local)


def follow_all(host: nn.Module) -> None:
    """The same for all weights that a host has."""
    for name, parameter in host._parameters.items():
        if is_sharded(parameter):
            follow(host, name, parameter)


def follow_below(model: nn.Module, hosts: Iterable[nn.Module]) -> None:
    """The same for new hosts in a model, which FSDP2 may have begun with already."""
    left = {host for host in hosts if _known_to_fsdp(host)}
    if not left:
        return
    reshard(model)
    for shard in _shards(model):
        owner = shard._module_info.module
        if owner in left:
            follow(owner, shard._module_info.param_name, shard.sharded_param)
            shard._init_extensions()  # as FSDP2 does itself before it gathers first
    for host in left:
        hooks = host.__dict__.get(SHARDS, {})
        for site in host.__dict__.get(SITES, ()):
            if site.path not in hooks:  # sharded by a module above `model`, which may have run
                hooks = {**hooks, site.path: ShardHooks(site.path, None, late=True)}
        host.__dict__[SHARDS] = hooks


def _known_to_fsdp(module: nn.Module) -> bool:
    hooks = module._load_state_dict_post_hooks.values()
    return any(getattr(hook, "__qualname__", "").startswith("FSDPParam.") for hook in hooks)


def _shards(model: nn.Module) -> Iterator[Any]:
    """FSDP2's own record of each shard. Private in torch: empty where it has another form."""
    for module in fsdp_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch 2.11
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from getattr(group, "fsdp_params", ())


def notes_on_rounding(model: nn.Module) -> list[str]:
    """For the report: from which weights masks are found under FSDP2's mixed precision."""
    known = {(id(s._module_info.module), s._module_info.param_name): s for s in _shards(model)}
    if not known:
        return []
    counts: Counter[tuple[torch.dtype, bool]] = Counter()
    for ref in iter_sites(model):
        owner, name = place_of(ref.host, ref.site.path)
        shard = known.get((id(owner), name))
        if shard is None or ref.site.state != "sparse":
            continue
        local, dtype = shard.sharded_param._local_tensor, shard.mp_policy.param_dtype
        if dtype is not None and dtype.itemsize < local.dtype.itemsize:
            hook = ref.host.__dict__.get(SHARDS, {}).get(ref.site.path)
            put = hook is not None and hook.put_on is not None and not hook.late
            counts[dtype, put and _can_order(local, ref.site, dtype)] += 1
    return [
        f"FSDP2 gathers weights as {str(dtype).removeprefix('torch.')}; masks are those "
        + ("of the shards before" if ordered else "of what is gathered, ties by index")
        + f" (layers: {count})"
        for (dtype, ordered), count in counts.items()
    ]
