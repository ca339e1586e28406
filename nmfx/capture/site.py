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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import NMError
from ..ops.sr_ste import make_control
from ..pattern import Pattern
from .packed import check_compressed, check_same_weight, check_weight, packed_weight_shapes


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

    @property
    def lowered(self) -> bool:
        """Whether `nmfx.lower` is done with it: no mask, no schedule."""
        return self.state in ("packed", "semi_structured", "prepacked", *TWO_FORMS)

    @property
    def lambda_in_backward(self) -> float:
        """The lambda that the op itself applies: none when an optimizer hook does."""
        return 0.0 if self.attached is not None else self.lambda_w


# A weight held twice: the form for few rows of input + the form for many. Packed reads the fewest
# bytes, so it is the one for few; which of the others serves few rows better is measured.
TWO_FORMS = (
    "packed+semi_structured",
    "packed+dense",
    "semi_structured+dense",
    "dense+semi_structured",
)

SITES = "_nmfx_sites"
SKIPPED = "_nmfx_skipped"
MEASURED = "_nmfx_measured"
NOTES = "_nmfx_notes"  # on a lowered model: what `lower` found out about all of it
MADE_ON = "_nmfx_made_on"
COPY = "_nmfx_copy"  # of a prepacked layer: its `WeightCopy`
REPLACES = "_nmfx_replaces"
SHARDS = "_nmfx_shards"  # of a host: weight -> the hooks of FSDP2 on its shard
FOLDED = "_nmfx_folded"


def control_name(i: int) -> str:
    """Attribute that holds the control tensor of a host's i-th site."""
    return f"_nmfx_control{i}"


def mask_name(i: int) -> str:
    """Attribute that holds the fixed mask of a host's i-th site while it is frozen."""
    return f"_nmfx_mask{i}"


def _is_freed(weight: Tensor) -> bool:
    """Whether it is a view of memory that was given back: reading it would end the process."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.numel() > 0
    return plain and weight.untyped_storage().nbytes() == 0


@dataclass(frozen=True)
class SiteRef:
    """A site found in a model.

    Attributes:
        name: the parameter's fully qualified name in the model.
        host: the module that `site.path` starts from.
        store: the module whose `__dict__` holds the state (the host, or its holder in a graph).
        index: the number of the site in its store.
        site: the live `Site`.
    """

    name: str
    host: nn.Module
    store: nn.Module
    index: int
    site: Site

    @property
    def module_name(self) -> str:
        """The name of the module that owns the parameter: what rules match."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> nn.Parameter:
        """The raw, dense weight.

        Raises:
            NMError: FSDP1 holds it in another form, and what is here must not be read.
        """
        weight = get_path(self.host, self.site.path)
        if weight.ndim != len(self.site.shape) or _is_freed(weight):
            raise NMError(
                f"{self.name}: FullyShardedDataParallel flattened it and took its memory; call "
                f"this inside its summon_full_params, or use fully_shard (FSDP2)"
            )
        return weight

    def refresh_control(self) -> None:
        """Rebuilds the control tensor from the Python values.

        A new tensor replaces the old one, so a backward that is still to come sees the values its
        forward ran with, and autograd's version check is never tripped.
        """
        old = self.store.__dict__[control_name(self.index)]
        site = self.site
        new = make_control(site.lambda_in_backward, site.pattern.n, old.device)
        self.store.__dict__[control_name(self.index)] = new


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


def packed_names(path: str) -> tuple[str, str]:
    """The buffers that replace a parameter when it is packed: (values, index)."""
    return f"{path}_values", f"{path}_index"


def compressed_names(path: str) -> tuple[str, str]:
    """The buffers that replace a semi-structured parameter: (compressed, meta)."""
    return f"{path}_compressed", f"{path}_meta"


def format_name(path: str) -> str:
    """The buffer that says in a file what those bytes are: `Site.format`."""
    return f"{path}_format"


def format_tensor(text: str) -> Tensor:
    """A site's format as the bytes of a buffer, so that files carry it."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def forms_of(state: str) -> tuple[str, ...]:
    """The forms that a weight in a state is held in: one, or two of `TWO_FORMS`."""
    return tuple(state.split("+"))


def form_names(path: str, form: str) -> tuple[str, ...]:
    """The tensors that hold a weight in a form."""
    if form == "packed":
        return packed_names(path)
    return compressed_names(path) if form == "semi_structured" else (path,)


def stored_names(site: Site) -> tuple[str, ...]:
    """The tensors that hold the weight of a site, in the state that it is in."""
    return tuple(name for form in forms_of(site.state) for name in form_names(site.path, form))


def get_path(module: nn.Module, path: str) -> Any:
    """`module.a.b` for path "a.b"."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def join(*names: str) -> str:
    """Joins the parts of a fully qualified name; empty parts vanish."""
    return ".".join(name for name in names if name)


class NMModule:
    """A mixin for every module that sites are stored in; it stands before the base."""

    nmfx_base: type[nn.Module]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        move_state(self, fn)  # type: ignore[arg-type]
        return result

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        check_loaded(self, state_dict, prefix)  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]


def check_loaded(store: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuses packed tensors that are none, before they are copied into a layer.

    Args:
        store: where the sites are.
        state_dict, prefix: with the names that the host of the sites has there.

    Raises:
        NMError: an index outside its group, and all else that `check_packed` and `check_cutlass`
            find.
    """
    for site in store.__dict__.get(SITES, ()):
        forms = forms_of(site.state)
        if "semi_structured" in forms:
            _check_format(site, state_dict, prefix)
        if "packed" in forms:
            _check_packed(site, state_dict, prefix)
        if len(forms) > 1:
            _check_forms(site, state_dict, prefix)


def _check_packed(site: Site, state_dict: dict[str, Any], prefix: str) -> None:
    names = packed_names(site.path)
    values, index = (state_dict.get(prefix + name) for name in names)
    own = packed_weight_shapes(site.shape, site.dim, site.groups, site.pattern)
    if not (isinstance(values, Tensor) and isinstance(index, Tensor)):
        return  # torch tells what is missing, and what has another size
    if (values.shape, index.shape) != own:
        return
    try:
        check_weight(values, index, site.shape, site.dim, site.groups, site.pattern)
    except NMError as error:
        raise NMError(f"{prefix}{site.path}: {error}; the file is damaged") from error


def _check_forms(site: Site, state_dict: dict[str, Any], prefix: str) -> None:
    """Both forms of a weight or none, as one alone would leave the other behind."""
    names = stored_names(site)
    given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
    if not given:
        return
    if len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise NMError(
            f"{prefix}{site.path}: this layer holds its weight as {site.state}, and what is to be "
            f"loaded has no {prefix}{missing}; load both forms, or lower the dense model again"
        )
    try:
        check_same_weight(
            {
                form: [given[name] for name in form_names(site.path, form)]
                for form in forms_of(site.state)
            },
            site.shape,
            site.dim,
            site.pattern,
            site.dtype,
        )
    except NMError as error:
        raise NMError(f"{prefix}{site.path}: {error}") from error


def _check_format(site: Site, state_dict: dict[str, Any], prefix: str) -> None:
    names = [prefix + name for name in compressed_names(site.path)]
    given = [state_dict[name] for name in names if name in state_dict]
    if not given:
        return  # torch tells what is missing
    found = state_dict.get(prefix + format_name(site.path))
    text = "something that it does not name"
    if found is not None and found.dtype == torch.uint8:
        text = bytes(found.flatten().tolist()).decode("latin1")
    if text != site.format or any(tensor.dtype != torch.uint8 for tensor in given):
        raise NMError(
            f"{prefix}{site.path}: this layer holds {site.format}, and what is to be loaded was "
            f"compressed as {text} ({', '.join(str(tensor.dtype) for tensor in given)}); lower the "
            f"dense model here"
        )
    if len(given) == len(names):
        assert site.dtype is not None
        own = site.shape, site.dim, site.dtype, site.pattern, site.format
        try:
            check_compressed(given[0], given[1], *own)
        except NMError as error:
            raise NMError(f"{prefix}{site.path}: {error}; the file is damaged") from error


def marks_of(module: nn.Module) -> dict[str, Any]:
    """Where the marks of a module are."""
    return module.meta if isinstance(module, fx.GraphModule) else module.__dict__


HOLDER = "_nmfx"  # the child of a GraphModule that is its Holder


class Holder(NMModule, nn.Module):
    """Stores the sites of a GraphModule; it has no parameters, buffers or forward of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return copied_state(self.__dict__)

    def check_host(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called when the GraphModule is about to load: `check_loaded` for its sites."""
        check_loaded(self, state_dict, prefix)


def holder_of(module: nn.Module) -> Holder | None:
    """The holder of a module, or None."""
    holder = module._modules.get(HOLDER)
    return holder if isinstance(holder, Holder) else None


def move_state(store: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Follows `module.to(device)`, for any function that `nn.Module._apply` may be given.

    Control tensors and masks follow to the device that `fn` sends an empty probe to, and are never
    passed through `fn` themselves: `bfloat16()` would round them, `to_empty()` would erase them,
    and what sits on the meta device cannot come back.
    """
    for key, value in store.__dict__.items():
        if key.startswith("_nmfx_") and isinstance(value, Tensor):
            device = fn(torch.empty(0, dtype=torch.uint8, device=value.device)).device
            if device.type != "meta" and device != value.device:
                store.__dict__[key] = value.to(device)


def copied_state(state: dict[str, Any]) -> dict[str, Any]:
    """A host's `__dict__` for a copy, in which lambda is back inside: hooks do not follow."""
    state = dict(state)
    state.pop(SHARDS, None)
    sites = [replace(site, attached=None) for site in state.get(SITES, ())]
    for i, (old, new) in enumerate(zip(state.get(SITES, ()), sites, strict=True)):
        if old.attached is not None:
            device = state[control_name(i)].device
            state[control_name(i)] = make_control(new.lambda_w, new.pattern.n, device)
    if sites:
        state[SITES] = sites
    return state


def iter_sites(model: nn.Module) -> Iterator[SiteRef]:
    """All sites of a model, in the order of `named_modules`; each module once."""
    for fqn, module in model.named_modules():
        if isinstance(module, Holder):  # its sites belong to the GraphModule above it
            continue
        for store in (module, holder_of(module)):
            if store is None:
                continue
            for i, site in enumerate(store.__dict__.get(SITES, ())):
                yield SiteRef(join(fqn, site.path), module, store, i, site)


def sites_of(model: nn.Module, verb: str) -> list[SiteRef]:
    """All sites of a model that are not lowered.

    Raises:
        NMError: there are none; `verb` names the call for the message.
    """
    if not isinstance(model, nn.Module):
        raise NMError(f"nmfx.{verb} takes an nn.Module, got {type(model).__name__}")
    found = list(iter_sites(model))
    refs = [ref for ref in found if not ref.site.lowered]
    if found and not refs:
        raise NMError(
            f"nmfx.{verb}: {type(model).__name__} is lowered, and packed layers have no dense "
            f"weight; call it on the model that nmfx.lower was given"
        )
    if not refs:
        raise NMError(
            f"nmfx.{verb}: {type(model).__name__} has no sparsified layer; "
            f"call nmfx.sparsify(model, '2:4') first"
        )
    return refs
