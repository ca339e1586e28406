"""Generated classes: the module stays the same object, its class becomes a subclass of itself.

    fc                      nn.Linear            fc   NMLinear(NMHost, nn.Linear)
      forward, weight, bias        ->                   forward generated from the rewritten graph

`isinstance`, hooks, parameters and the state_dict keys hold, because nothing but `__class__` moves.
Classes are cached by base, kind of capture and code; N and lambda are not part of the code.
"""

from __future__ import annotations

import itertools
import linecache
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ..ops.sharded import is_sharded
from .fsdp import follow, follow_all
from .holder import NMModule, copied_state, detach_copy
from .site import SHARDS, SITES, Site

_classes: dict[tuple[Any, ...], type] = {}
_lock = threading.Lock()
_numbers = itertools.count()

# How to find the class of a host from its sites; install.py sets it, as imports only go down.
_class_for: Callable[[nn.Module], type]


def rebuild_with(class_for: Callable[[nn.Module], type]) -> None:
    """Tells copies of hosts how to find their class again."""
    global _class_for
    _class_for = class_for


class NMHost(NMModule):
    """The behaviour of every generated class besides its forward."""

    nmfx_base: type[nn.Module]
    nmfx_graph: fx.Graph | None
    nmfx_baked: dict[str, str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        base = type(self).nmfx_base
        if SITES not in self.__dict__:  # type(layer)(...) makes a new layer, which is dense
            self.__class__ = base  # type: ignore[assignment]
        base.__init__(self, *args, **kwargs)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join(text for text in (own, *map(_note, self.__dict__[SITES])) if text)

    def __setattr__(self, name: str, value: Any) -> None:
        baked = type(self).nmfx_baked
        super().__setattr__(name, value)
        if name in baked and value != baked[name]:
            self.__class__ = _class_for(self)  # type: ignore[arg-type]
        if SHARDS in self.__dict__ or (isinstance(value, Tensor) and is_sharded(value)):
            follow(self, name, value)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        follow_all(self)  # type: ignore[arg-type]  # to_empty() makes new shards
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Generated classes cannot be pickled by name: a copy starts from the base and rebuilds.
        getstate = getattr(super(), "__getstate__", None)  # object has one from Python 3.11 on
        state = self.__dict__ if getstate is None else getstate()
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if not key.startswith("_nmfx_")}
        added = copied_state(self.__dict__)
        added = {key: value for key, value in added.items() if key.startswith("_nmfx_")}
        return _blank, (type(self).nmfx_base,), (state, added)


def _note(site: Site) -> str:
    where = "" if site.path == "weight" else f"{site.path} "
    state = "" if site.state == "sparse" else f" {site.state}"
    state += f" at {site.threshold} rows" if site.threshold else ""
    activation = "" if site.activation == "none" else f" {site.activation}"
    return f"{where}{site.pattern}{state}{activation}"


class _Restoring:
    """A copy between its creation and the arrival of its state."""

    nmfx_base: type[nn.Module]

    def __setstate__(self, states: tuple[Any, dict[str, Any]]) -> None:
        state, added = states
        self.__class__ = type(self).nmfx_base  # type: ignore[assignment]
        self.__setstate__(state)
        self.__dict__.update(added)
        cls = _class_for(self)  # type: ignore[arg-type]
        self.__class__ = cls
        if not is_generated(cls):
            self.__dict__.pop(SITES, None)


def _blank(base: type) -> Any:
    return object.__new__(type("Restoring", (_Restoring, base), {"nmfx_base": base}))


def _own_deepcopy(base: Any) -> Callable:
    """The `__deepcopy__` that `base` has, whose copies are not attached either."""

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        twin = base.__deepcopy__(self, memo)
        if twin is not self and is_generated(type(twin)):
            detach_copy(twin)
        return twin

    return __deepcopy__


def is_generated(cls: type) -> bool:
    """Whether nmfx generated this very class, not one that someone else derived from it."""
    return "nmfx_base" in cls.__dict__ and issubclass(cls, NMHost)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before nmfx swapped it, or has."""
    cls = type(module)
    return cls.nmfx_base if is_generated(cls) else cls  # type: ignore[attr-defined]


def generated_class(
    base: type[nn.Module],
    key: tuple[Any, ...],
    forward: Callable[[], Callable],
    name: str | None = None,
    **members: Any,
) -> type[nn.Module]:
    """The cached subclass of `base` for `key`, which `forward()` and `members` make the first time.

    It is called `name`, by default "NM" and the name of `base`.

    Members that matter to others: `nmfx_graph`, the rewritten graph (leaf capture), and
    `nmfx_baked`, the string attributes its code depends on.
    """
    full_key = (base, *key)
    with _lock:
        found = _classes.get(full_key)
        if found is None:
            fields = {
                "nmfx_base": base,
                "nmfx_graph": None,
                "nmfx_baked": {},
                "__module__": base.__module__,
                "__doc__": base.__doc__,
                "forward": forward(),
                **members,
            }
            if hasattr(base, "__deepcopy__"):
                fields["__deepcopy__"] = _own_deepcopy(base)
            name = name or f"NM{base.__name__}"
            found = _classes[full_key] = type(name, (NMHost, base), fields)
        return found


def compile_forward(source: str, names: dict[str, Any]) -> Callable:
    """Turns the source of a method `forward` into the method; tracebacks show its lines."""
    filename = f"<nmfx generated {next(_numbers)}>"
    namespace = dict(names)
    exec(compile(source, filename, "exec"), namespace)
    # An entry without a time stamp is never dropped by linecache.checkcache.
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return namespace["forward"]
