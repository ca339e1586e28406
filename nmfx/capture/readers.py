"""Which weights a module's own code reads around the modules that hold them.

    class Attention(nn.Module):
        def forward(self, x):
            k = self.key(x)                                   a call: the layer masks its weight
            w = self.query.weight.t()                         a read: {"query.weight"}
            x = x.to(self.query.weight.dtype)                 neither: no value is looked at

Found in the source of `forward`, of other methods that may be called from outside, and of what
these name, so that branches which do not run today count too. What hides behind a helper function
or `getattr` is not found here; `nmfx.verify` sees it when it runs.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from .generate import base_class
from .site import join
from .source import ANY, Chain, Scan, mentions_weight, names_in, scan_function


@dataclass(frozen=True)
class Reads:
    """The same for a module: paths of weights below it, such as "query.weight"."""

    read: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    called: frozenset[str] = frozenset()
    entries: frozenset[str] = frozenset()

    @property
    def only_read(self) -> frozenset[str]:
        """Weights whose module is not called."""
        return frozenset(path for path in self.read if path.rpartition(".")[0] not in self.called)


_scans: weakref.WeakKeyDictionary[type, Scan] = weakref.WeakKeyDictionary()


_TORCH = "torch.nn.modules."


def weights_read(module: nn.Module, base: type[nn.Module]) -> Reads:
    """What the methods of `base` read, write and call below `module`."""
    if base.__module__.startswith((_TORCH, "peft.")):
        return Reads()  # known: own_weights.py, guards.py and adapters.py say what they do
    if isinstance(module, fx.GraphModule):
        return Reads()  # its graph tells more than its source
    scan = _scans.get(base)
    if scan is None:
        scan = _scans[base] = _scan(base)
    if not scan.read and not scan.written:
        return Reads()
    read = frozenset(p for chain in scan.read for p in _parameters(module, chain))
    written = frozenset(p for chain in scan.written for p in _parameters(module, chain))
    called = frozenset(p for chain in scan.called for p, _ in _expand(module, chain))
    return Reads(read, written, called, frozenset(scan.entries))


def _expand(module: nn.Module, chain: Chain) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) for every module that a chain can mean."""
    found = [("", module)]
    for name in chain:
        found = [
            (join(path, key), child)
            for path, parent in found
            for key, child in parent._modules.items()
            if child is not None and name in (key, ANY)
        ]
    yield from found


def _parameters(module: nn.Module, chain: Chain, depth: int = 0) -> Iterator[str]:
    for path, owner in _expand(module, chain[:-1]):
        if owner._parameters.get(chain[-1]) is not None:
            yield join(path, chain[-1])
        elif (path or depth) and depth < _DEEPEST:  # not those of `module`, whose source is known
            for inner in _behind(base_class(owner), chain[-1]):
                yield from (join(path, name) for name in _parameters(owner, inner, depth + 1))


_DEEPEST = 4  # properties that name properties: one that names itself ends somewhere
_hidden: weakref.WeakKeyDictionary[type, dict[str, set[Chain]]] = weakref.WeakKeyDictionary()


def _behind(base: type[nn.Module], name: str) -> set[Chain]:
    """What a property or method of a child, called after a weight, reads of the child."""
    if base.__module__.startswith("torch.") or name.startswith(_CHANGING):
        return set()
    known = _hidden.setdefault(base, {})
    if name not in known:
        scan = Scan()
        for function in _definitions(base, name):
            scan_function(function, scan)
        known[name] = scan.read | scan.own
    return known[name]


# --- one class ---------------------------------------------------------------------------------


# Methods that set a module up or take it apart; what they do to a weight is no part of its use.
_SETUP = (
    *(
        "__",
        "_init",
        "init",
        "reset",
        "_reset",
        "tie",
        "_tie",
        "resize",
        "_resize",
        "load",
        "_load",
    ),
    *(
        "weights_init",
        "weight_init",
        "save",
        "_save",
        "set_",
        "get_",
        "from_",
        "_from",
        "prune",
        "_prune",
        "extra_",
    ),
)
# Those that a parent calls to change what is below it.
_CHANGING = tuple(prefix for prefix in _SETUP if prefix != "get_")
# Base classes that do nothing else besides calling `forward`.
_BASES = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation")


def _scan(base: type[nn.Module]) -> Scan:
    scan = Scan()
    reached = _follow(base, "forward", scan)
    # A mask hides what a forward writes to its own weights, and nothing that happens outside.
    own = {chain for chain in scan.written if len(chain) == 1}
    for name in _methods(base):
        if name not in reached:
            _follow(base, name, scan)
    scan.written = {chain for chain in scan.written if len(chain) > 1} | own
    return scan


def _methods(base: type[nn.Module]) -> Iterator[str]:
    """Further methods that somebody else may call, and that mention a weight."""
    for parent in base.__mro__:
        if parent is nn.Module:
            return
        if parent.__module__.startswith(_BASES):
            continue
        for name, found in list(parent.__dict__.items()):
            if not isinstance(found, types.FunctionType) or name.startswith(_SETUP):
                continue
            if mentions_weight(found.__code__):
                yield name


def _follow(base: type[nn.Module], entry: str, scan: Scan) -> set[str]:
    """Adds what a method, and those that it names, do to `scan`; returns all their names."""
    own, torchs = Scan(), Scan()  # what torch's layers do is known, whoever inherits from them
    functions: list[types.FunctionType] = []
    seen, names = set[str](), [entry]
    while names:
        name = names.pop()
        if name not in seen:
            seen.add(name)
            found = list(_definitions(base, name))
            functions += found
            names += (more for function in found for more in names_in(function.__code__))
    if any(mentions_weight(function.__code__) for function in functions):
        for function in functions:  # also those that only call the layers
            known = (function.__module__ or "").startswith(_TORCH)
            scan_function(function, torchs if known else own)
    scan.written |= own.written
    scan.called |= own.called | torchs.called
    if own.read and (entry == "forward" or not own.manages):
        scan.read |= own.read
        scan.entries.add(entry)
    return seen


def _definitions(base: type, name: str) -> Iterator[types.FunctionType]:
    """The functions that `self.name` and `super().name` can reach, down to nn.Module."""
    for parent in base.__mro__:
        if parent is nn.Module:
            return
        found = parent.__dict__.get(name)
        for inside in ("fget", "func", "__func__"):  # of a property, a cached one, a class method
            found = getattr(found, inside, None) or found
        found = inspect.unwrap(found) if callable(found) else None
        if isinstance(found, types.FunctionType):
            yield found
            if not {"super", parent.__name__} & set(names_in(found.__code__)):
                return
