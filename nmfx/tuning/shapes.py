"""The inputs that each weight really meets when the example inputs run.

Consumers are told by the identity of the weight tensor they read, so leaf, scoped and graph capture
need no code of their own; a masked weight counts as the weight it was made from.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..capture.attention import in_projection_parts
from ..capture.site import get_path
from ..graph.table import TABLE, conv_arguments
from ..ops.keep import keep
from ..ops.sr_ste import sr_ste

_SOURCE = "_nmfx_source"  # on a masked weight: the name of the weight


@dataclass(frozen=True)
class Seen:
    """What one call of a consumer looks like, all but the weight; hashable.

    Attributes:
        shape, strides: of the input. Rows of a linear layer that lie in memory one after the other
            count as (rows, in_features), however they are batched.
        dtype: of the input, as a string.
        bias: whether there is one.
        autocast: the dtype that autocast would compute in, as a string, or None.
        rest: the other arguments of a convolution, as (keyword, value) pairs.
        outputs: the rows of the weight that it uses (from, to), or None for all of them.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    bias: bool = False
    autocast: str | None = None
    rest: tuple[tuple[str, Any], ...] = ()
    outputs: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """How many vectors along the last axis; for images the batch size says as much."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows if not self.rest else self.shape[0]


class Recorder(TorchFunctionMode):
    """Counts what every given weight is called with, while it is active.

    Args:
        weights: the parameters to watch, by name.
        experts: the mixtures of experts that hold some of them, by the same names.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], experts: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self._experts = experts or {}
        self._names = {id(weight): name for name, weight in weights.items()}
        self.seen: dict[str, Counter[Seen]] = {name: Counter() for name in weights}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watches the mixtures of experts too: `with recorder.hooked(), recorder: ...`."""
        with ExitStack() as hooks:
            for name, module in self._experts.items():
                observe = functools.partial(self._mixture, name)
                hooks.callback(module.register_forward_pre_hook(observe, with_kwargs=True).remove)
            yield

    def _mixture(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Experts: how many rows each of them meets, as powers of two."""
        x, chosen = _take(args, kwargs, 0, "hidden_states"), _take(args, kwargs, 1, "top_k_index")
        if not isinstance(x, Tensor) or not isinstance(chosen, Tensor):
            return  # a mixture of another kind, which cannot be lowered
        count, _, size = get_path(module, name.rpartition(".")[2]).shape
        autocast = _autocast(x.device.type)
        for rows in torch.bincount(chosen.flatten().cpu(), minlength=count)[:count].tolist():
            if rows:
                shape = 2 ** round(math.log2(rows)), size
                self.seen[name][Seen(shape, (size, 1), str(x.dtype), False, autocast)] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is sr_ste or func is keep:
            name = self._name(args[0])
            if name is not None:
                setattr(result, _SOURCE, name)
        if func is F.multi_head_attention_forward:
            self._attention(inspect.signature(func).bind(*args, **kwargs).arguments)
        consumer = TABLE.get(func)
        if consumer is not None:
            name = self._name(_take(args, kwargs, consumer.position, consumer.keyword))
            if name is not None:
                self.seen[name][describe(func, args, kwargs)] += 1
        return result

    def _attention(self, call: Mapping[str, Any]) -> None:
        """Torch's attention, which shows its products to nobody."""
        query, key, value = (call[name] for name in ("query", "key", "value"))
        bias = call["in_proj_bias"] is not None
        size = call["embed_dim_to_check"]
        if call.get("use_separate_proj_weight"):
            for letter, x in zip("qkv", (query, key, value), strict=True):
                self._product(call[f"{letter}_proj_weight"], x, bias)
        else:
            parts = in_projection_parts(query, key, value, size)
            for x, part in parts:
                rows = part if len(parts) > 1 else None
                self._product(call["in_proj_weight"], x, bias, rows)
        self._product(call["out_proj_weight"], query, call["out_proj_bias"] is not None)

    def _product(
        self, weight: Tensor, x: Tensor, bias: bool, outputs: tuple[int, int] | None = None
    ) -> None:
        name = self._name(weight)
        if name is not None:
            size = x.shape[-1]
            shape, autocast = (x.numel() // max(1, size), size), _autocast(x.device.type)
            seen = Seen(shape, (size, 1), str(x.dtype), bias, autocast, (), outputs)
            self.seen[name][seen] += 1

    def _name(self, weight: Any) -> str | None:
        return self._names.get(id(weight)) or getattr(weight, _SOURCE, None)


def describe(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen:
    """One call of an operator of the table, as `Seen`."""
    consumer = TABLE[func]
    if consumer.family == "addmm":
        bias, inputs = _take(args, kwargs, 0, "input"), _take(args, kwargs, 1, "mat1")
    else:
        inputs, bias = _take(args, kwargs, 0, "input"), _take(args, kwargs, 2, "bias")
    if inputs.is_nested:  # nn.TransformerEncoder makes these from a padding mask
        inputs = torch.cat(inputs.unbind())
    shape, strides = tuple(inputs.shape), inputs.stride()
    if strides != torch.empty_like(inputs, device="meta").stride():
        strides = torch.empty(shape, device="meta").stride()  # views with gaps, expanded batches
    rest: tuple[tuple[str, Any], ...] = ()
    if consumer.family in ("linear", "addmm"):
        if inputs.is_contiguous():
            shape = (inputs.numel() // max(1, shape[-1]), shape[-1])
            strides = (shape[-1], 1)
    else:
        arguments = conv_arguments(func, args, kwargs)
        rest = tuple((name, _frozen(value)) for name, value in arguments.items())
    return Seen(
        shape,
        tuple(strides),
        str(inputs.dtype),
        bias is not None,
        _autocast(inputs.device.type),
        rest,
    )


def _autocast(device: str) -> str | None:
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return str(torch.get_autocast_dtype(device)) if enabled else None


def _take(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, keyword: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(keyword)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def make_input(seen: Seen, device: torch.device) -> Tensor:
    """A random input like the one seen, on `device`; torch's random state is left alone."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, seen.dtype.removeprefix("torch."))
    values = torch.randn(seen.shape, generator=generator)
    return torch.empty_strided(seen.shape, seen.strides, dtype=dtype, device=device).copy_(values)
