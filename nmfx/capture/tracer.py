"""Tracing without side effects on other threads, and without baking a module's attributes in.

`trace_late_bound` runs a module's own `forward` once, with a stand-in for `self` whose attributes
become `get_attr` nodes that are read again on every call. So a bias added later, a changed stride
or a fused batch norm keep working, and two layers that differ only in such values share one code:

    class Conv2d:                                 def forward(self, input):
        def forward(self, input):                     weight = self.weight
            return self._conv_forward(...)    ->      bias = self.bias
                                                      stride = self.stride
                                                      ...
                                                      return torch.conv2d(input, weight, bias, ...)

Only strings are read at once (`padding_mode` decides which code runs); they are reported as baked,
and a generated class traces again when one of them is set.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer


class Untraceable(Exception):
    """The forward of a module cannot be represented as one fx graph, for the reason given."""


def trace_late_bound(module: nn.Module, base: type[nn.Module]) -> tuple[fx.Graph, dict[str, str]]:
    """Traces `base.forward` for `module`.

    Returns:
        (graph, baked): the graph's get_attr nodes name attributes of the module; `baked` holds the
        string attributes whose values the graph depends on.

    Raises:
        Untraceable: control flow that depends on values, or that tracing would silently freeze.
    """
    forward = _STRAIGHT.get(base.forward, base.forward)
    for function in _definitions(base, "forward"):
        _refuse_frozen(function)
    graph = fx.Graph()
    stand_in = _Self(module, base, GraphAppendingTracer(graph))
    arguments = [_placeholder(stand_in._nmfx_tracer, p) for p in _parameters(forward)]
    try:
        result = forward(stand_in, *arguments)
        graph.output(stand_in._nmfx_tracer.create_arg(result))
    except Exception as error:
        # Whatever a foreign forward raises when it meets a proxy means the same: not traceable.
        raise Untraceable(f"{base.__name__}.forward does not trace: {error}") from error
    if stand_in._nmfx_stored:
        raise Untraceable(f"{base.__name__}.forward sets self.{stand_in._nmfx_stored[0]}")
    return graph, stand_in._nmfx_baked


def _parameters(forward: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(forward).parameters.values())[1:]


def _placeholder(tracer: GraphAppendingTracer, parameter: inspect.Parameter) -> fx.Proxy:
    if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
        raise Untraceable(f"its forward takes {parameter}")
    default = () if parameter.default is parameter.empty else (parameter.default,)
    return tracer.create_proxy("placeholder", parameter.name, default, {})


class _Self:
    """Stands in for `self` while a forward is traced."""

    def __init__(self, module: nn.Module, base: type, tracer: GraphAppendingTracer) -> None:
        fields = self.__dict__
        fields.update(_nmfx_module=module, _nmfx_base=base, _nmfx_tracer=tracer)
        fields.update(_nmfx_baked={}, _nmfx_proxies={}, _nmfx_stored=[])

    @property  # type: ignore[misc]  # zero-argument super() and isinstance ask for it
    def __class__(self) -> type:
        return self._nmfx_base

    def __getattr__(self, name: str) -> Any:
        module = self._nmfx_module
        value = getattr(module, name, None)  # a packed layer has no weight to look at
        if inspect.ismethod(value) and value.__self__ is module:
            for function in (value.__func__, *_definitions(self._nmfx_base, name)):
                _refuse_frozen(function)
            return types.MethodType(value.__func__, self)
        if isinstance(value, str):
            return self._nmfx_baked.setdefault(name, value)
        return self._nmfx_late(name)

    def _nmfx_late(self, name: str) -> fx.Proxy:
        if name not in self._nmfx_proxies:
            tracer = self._nmfx_tracer
            self._nmfx_proxies[name] = tracer.create_proxy("get_attr", name, (), {})
        return self._nmfx_proxies[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._nmfx_stored.append(name)


# --- what a trace would freeze without a word -------------------------------------------------

# Written by torch for tracing, or read by us: their branches only depend on strings.
_TRUSTED_MODULES = ("torch.nn.modules.", "transformers.pytorch_utils", __name__)


# Modules and builtins whose results depend on their arguments alone, and that do nothing else.
_PURE_MODULES = ("torch", "math", "operator")
_PURE_BUILTINS = (abs, divmod, getattr, hasattr, isinstance, len, max, min, pow, round, sum)


def _trusted(function: Callable) -> bool:
    return (function.__module__ or "").startswith(_TRUSTED_MODULES)


def _definitions(base: type, name: str) -> list[Callable]:
    """A method and, as `super()` may reach them, those of its parents down to torch's."""
    found: list[Callable] = []
    for parent in base.__mro__:
        own = parent.__dict__.get(name)
        if inspect.isfunction(own):
            found.append(own)
            if _trusted(own):
                break
    return found


def _refuse_frozen(function: Callable) -> None:
    """Refuses code that a trace would run once and then keep as it went.

    A branch on a proxy raises by itself, but `if x is None`, `isinstance`, or a global flag would
    pass silently; so would the value of a global, of `random.random()`, or a `print`. Python
    helpers are refused for the same reason: we do not look inside.
    """
    if _trusted(function) or not hasattr(function, "__code__"):
        return
    outside = _outside(function)
    for step in _instructions(function.__code__):
        if step.opname == "FOR_ITER" or ("JUMP" in step.opname and "IF" in step.opname):
            raise Untraceable(f"{function.__qualname__} branches, which a trace would freeze")
        name = step.argval
        if step.opname in ("STORE_GLOBAL", "IMPORT_NAME") or (
            step.opname in ("LOAD_GLOBAL", "LOAD_DEREF") and not _pure(outside.get(name, torch))
        ):
            raise Untraceable(f"{function.__qualname__} uses {name}, which a trace would freeze")


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Those of a function and of the lambdas and comprehensions in it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


def _outside(function: Callable) -> dict[str, Any]:
    """What a function's names mean outside of it: builtins, globals, and the scopes around it."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {**vars(builtins), **function.__globals__, **{k: c.cell_contents for k, c in cells}}


def _pure(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in _PURE_MODULES
    if isinstance(value, type) or any(value is builtin for builtin in _PURE_BUILTINS):
        return True
    functions = (types.FunctionType, types.BuiltinFunctionType, torch._ops.OpOverloadPacket)
    module = str(getattr(value, "__module__", ""))
    return isinstance(value, functions) and module.partition(".")[0] in _PURE_MODULES


# --- forwards of torch that need another spelling to trace ------------------------------------


def call(method: Callable, *args: Any) -> Any:
    """`method(*args)`, as one node of a graph when `method` is a proxy."""
    if isinstance(method, fx.Proxy):
        return method.tracer.create_proxy("call_function", call, (method, *args), {})
    return method(*args)


def _conv_transpose_forward(function: Callable, dims: int) -> Callable:
    def forward(self: Any, input: Any, output_size: Any = None) -> Any:
        # torch's version asserts that self.padding is a tuple and asks whether output_size is
        # None; `_output_padding` does the rest and stays a call at run time.
        output_padding = call(
            self._nmfx_late("_output_padding"),
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            dims,
            self.dilation,
        )
        return function(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )

    return forward


_STRAIGHT: dict[Callable, Callable] = {
    nn.ConvTranspose1d.forward: _conv_transpose_forward(F.conv_transpose1d, 1),
    nn.ConvTranspose2d.forward: _conv_transpose_forward(F.conv_transpose2d, 2),
    nn.ConvTranspose3d.forward: _conv_transpose_forward(F.conv_transpose3d, 3),
}


# --- whole models -----------------------------------------------------------------------------

# fx patches nn.Module.__call__ and __getattr__ for the whole process while it traces.
_LOCK = threading.RLock()


class ThreadAwareTracer(fx.Tracer):
    """fx's tracer, one at a time; modules that other threads run pass through untouched."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _LOCK:
            self._owner = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._owner:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._owner:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
