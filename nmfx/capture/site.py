"""A site: one sparsified weight, its schedule, and where both are kept.

A *host* is the module whose forward was rewritten. Everything nmfx adds to it are plain attributes
in its `__dict__`, named `_nmfx_*`: no parameter, no buffer, so that state_dict, DDP, EMA copies and
optimizers see the model they knew.

    host.__dict__
        _nmfx_sites        [Site, ...]                   the schedule, as Python values
        _nmfx_control0     float64 [lambda_W, N]         the same for the compiled graph
        _nmfx_mask0        bool, only while frozen; whole on every rank
        _nmfx_shards       {parameter: its `ShardHooks`}, only under FSDP2

For reports and files there are marks, in `host.__dict__` or, as copies of a GraphModule keep no
attributes, in its `meta`:

        _nmfx_skipped      {parameter below the host: reason}
        _nmfx_measured     {parameter below the host: (rows, ms dense, ms chosen)}
        _nmfx_notes        of a whole lowered model: (line of its report, ...)
        _nmfx_made_on      of a whole loaded model: the machine that it was lowered on
        _nmfx_folded       (parameter below the host, ...): a batch norm was folded into it
        _nmfx_replaces     of an nn.Identity: "BatchNorm2d", "relu", what stood in its place
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from ..ops.sr_ste import make_control
from ..pattern import Pattern
from .forms import TWO_FORMS, form_names, forms_of


@dataclass
class Site:
    """One sparsified weight of a host.

    Attributes:
        path: the parameter, relative to the host: "weight", "out_proj.weight".
        shape: the shape of the dense weight.
        dim: its group dimension.
        reduced: elements along `dim` that one output sums over (less than all with groups).
        pattern: the pattern in force.
        lambda_w: the strength of the SR-STE decay, wherever it is applied.
        kind: "linear", "addmm", "conv" or "conv_transpose", how the weight is consumed.
        capture: "leaf", "scoped" or "graph", how the consumer was rewritten.
        state: "sparse", "frozen" (fixed mask), or, lowered, "packed", "semi_structured" (2:4 for
            the sparse tensor cores of a GPU), "prepacked" (dense, with a copy in oneDNN's
            layout) or one of `TWO_FORMS`.
        attached: the token of the optimizer hook that applies the decay, or None (in backward).
        groups: of a convolution, else 1.
        activation: that a packed layer of leaf capture applies to its result. (A graph shows it.)
        dtype: of a semi-structured weight, whose tensors are bytes; else None.
        format: what those bytes are, see `nmfx.kernels.semi_structured.format_of`; else "".
        algorithms: of those bytes, see `nmfx.kernels.semi_structured.algorithm_for`.
        threshold: of a layer in two forms: inputs of up to so many rows use the first; else 0.
        order: of a lowered weight: the parameters of its owner as they stood before, by name.
        requires_grad: of a lowered weight: what the parameter was set to.
        tied: of a lowered weight: its name in the whole model, and the others that it had, if any;
            see `tied.retie`.
    """

    path: str
    shape: tuple[int, ...]
    dim: int
    reduced: int
    pattern: Pattern
    lambda_w: float
    kind: str
    capture: str
    state: str = "sparse"
    attached: object | None = None
    groups: int = 1
    activation: str = "none"
    dtype: torch.dtype | None = None
    format: str = ""
    algorithms: tuple[int, ...] = ()
    threshold: int = 0
    order: tuple[str, ...] = ()
    requires_grad: bool = True
    tied: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """A copy that is not attached: the hook is that of the optimizer of the original."""
        return replace(self, attached=None)

    @property
    def lowered(self) -> bool:
        """Whether `nmfx.lower` is done with it: no mask, no schedule."""
        return self.state in ("packed", "semi_structured", "prepacked", *TWO_FORMS)

    @property
    def lambda_in_backward(self) -> float:
        """The lambda that the op itself applies: none when an optimizer hook does."""
        return 0.0 if self.attached is not None else self.lambda_w


SITES = "_nmfx_sites"
SKIPPED = "_nmfx_skipped"
MEASURED = "_nmfx_measured"
NOTES = "_nmfx_notes"  # on a lowered model: what `lower` found out about all of it
MADE_ON = "_nmfx_made_on"
COPY = "_nmfx_copy"  # of a prepacked layer: its `WeightCopy`
REPLACES = "_nmfx_replaces"
SHARDS = "_nmfx_shards"  # of a host: weight -> the hooks of FSDP2 on its shard
FOLDED = "_nmfx_folded"


def is_lowered(module: nn.Module | None) -> bool:
    """Whether a module holds a lowered weight."""
    return module is not None and any(site.lowered for site in module.__dict__.get(SITES, ()))


def control_name(i: int) -> str:
    """Attribute that holds the control tensor of a host's i-th site."""
    return f"_nmfx_control{i}"


def mask_name(i: int) -> str:
    """Attribute that holds the fixed mask of a host's i-th site while it is frozen."""
    return f"_nmfx_mask{i}"


def add_sites(store: nn.Module, sites: list[Site], devices: list[torch.device]) -> None:
    """Writes sites and their control tensors into `store`; meta weights get controls on the CPU."""
    store.__dict__[SITES] = sites
    for i, (site, device) in enumerate(zip(sites, devices, strict=True)):
        device = torch.device("cpu") if device.type == "meta" else device
        control = make_control(site.lambda_in_backward, site.pattern.n, device)
        store.__dict__[control_name(i)] = control


def drop_sites(store: nn.Module, but: list[Site] | None = None) -> None:
    """Removes everything nmfx wrote into a module, except what is there for the report.

    Args:
        store: where the sites are.
        but: the sites that stay, for a store that must have a list of them at any moment.
    """
    kept = [SKIPPED, MEASURED, NOTES, MADE_ON, REPLACES, FOLDED]
    if but is not None:
        store.__dict__[SITES] = but
        kept.append(SITES)
    for hook in store.__dict__.get(SHARDS, {}).values():
        hook.take_away()
    for key in [key for key in store.__dict__ if key.startswith("_nmfx_") and key not in kept]:
        del store.__dict__[key]


def stored_names(site: Site) -> tuple[str, ...]:
    """The tensors that hold the weight of a site, in the state that it is in."""
    return tuple(name for form in forms_of(site.state) for name in form_names(site.path, form))


def get_path(module: nn.Module, path: str) -> Any:
    """`module.a.b` for path "a.b"."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def place_of(host: nn.Module, path: str) -> tuple[nn.Module, str]:
    """(the module that holds the tensor at a path below a host, its name there).

    A module without anything where the one that held it is gone.
    """
    owner, _, name = path.rpartition(".")
    try:
        found = get_path(host, owner) if owner else host
    except AttributeError:
        found = None
    return (found if isinstance(found, nn.Module) else nn.Module()), name


def join(*names: str) -> str:
    """Joins the parts of a fully qualified name; empty parts vanish."""
    return ".".join(name for name in names if name)


def marks_of(module: nn.Module) -> dict[str, Any]:
    """Where the marks of a module are."""
    return module.meta if isinstance(module, fx.GraphModule) else module.__dict__
