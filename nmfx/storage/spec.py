"""The specification in a file: JSON that says what the tensors beside it are.

    version     1; other versions are refused
    nmfx, torch, made_on        who wrote it and where, for people
    tensors     name -> {dtype, shape, sha256}; the digest is that of the bytes, little-endian
    aliases     name -> name of the tensor that it shares
    layers      one per N:M weight: `Layer`
    norms       weights of convolutions that a batch norm was folded into
    identities  module -> what `nmfx.lower` put an nn.Identity in place of
    graphs      GraphModule -> digest of its graph, in lowered models
    reasons, measured, notes    what `nmfx.report` tells of a lowered model

Reading is strict: a field that is missing, unknown, of another type or out of range is an NMError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from ..capture.forms import TWO_FORMS
from ..errors import NMError
from ..ops.packed import ACTIVATIONS
from ..pattern import Pattern

VERSION = 1
LOWERED = ("packed", "semi_structured", "prepacked", *TWO_FORMS)
STATES = ("sparse", "frozen", "folded", *LOWERED)
_KINDS = (
    *("linear", "addmm", "conv", "conv_transpose"),
    *("recurrent", "bilinear", "experts", "embedding"),
)
_CAPTURES = ("leaf", "scoped", "graph", "")
_MAX_DIMS, _MAX_SIZE = 8, 2**48


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its dtype, its shape, and the SHA-256 of its bytes in hex."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Layer:
    """One N:M weight. The fields are those of `nmfx.capture.site.Site`.

    `state` may also be "folded": a dense weight that satisfies the pattern. Then `capture` is "".
    """

    pattern: Pattern
    state: str
    kind: str
    capture: str
    shape: tuple[int, ...]
    dim: int
    groups: int = 1
    lambda_w: float = 0.0
    activation: str = "none"
    dtype: torch.dtype | None = None
    format: str = ""
    algorithms: tuple[int, ...] = ()
    threshold: int = 0

    @property
    def unmasked(self) -> bool:
        """Whether the file holds the weight as it is trained, pruned values included."""
        return self.state in ("sparse", "frozen")


@dataclass(frozen=True)
class Spec:
    """What a file says; see the module's text."""

    nmfx: str
    torch: str
    made_on: str
    tensors: Mapping[str, Stored]
    aliases: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    identities: Mapping[str, str] = field(default_factory=dict)
    graphs: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, tuple[tuple[int, ...], float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The text that a file holds."""
        plain = {"version": VERSION} | {
            f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)
        }
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Reads what `to_json` wrote.

        Raises:
            NMError: anything else.
        """
        try:
            plain = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise NMError(f"its specification is not JSON ({error})") from None
        if not isinstance(plain, dict):
            _refuse("the specification", plain, "an object")
        version = plain.pop("version", None)
        if version != VERSION or isinstance(version, bool):
            raise NMError(
                f"its specification has version {version!r}, this nmfx reads version {VERSION}"
                + ("; update nmfx" if isinstance(version, int) and version > VERSION else "")
            )
        return cls(**_fields("the specification", plain, cls, _SPEC))


def digest(text: str) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return value.text
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in a file: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


_DTYPES = {
    dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse(what: str, value: Any, wanted: str) -> NoReturn:
    text = repr(value)
    raise NMError(f"{what} is {text if len(text) < 80 else text[:77] + '...'}, not {wanted}")


# One reader per type: (value, what it is, for the message) -> the value as Python has it.
_Reader = Callable[[Any, str], Any]


def _fields(what: str, plain: Any, cls: type, readers: Mapping[str, _Reader]) -> dict[str, Any]:
    if not isinstance(plain, dict):
        _refuse(what, plain, "an object")
    odd = sorted(plain.keys() ^ readers.keys())
    if odd:
        raise NMError(f"{what} has no field, or one too many, named {odd[0]!r}")
    return {name: reader(plain[name], f"{name} of {what}") for name, reader in readers.items()}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        _refuse(what, value, "a text")
    return value


def _one_of(*allowed: str) -> _Reader:
    def read(value: Any, what: str) -> str:
        if value not in allowed:
            _refuse(what, value, f"one of {', '.join(map(repr, allowed))}")
        return value

    return read


def _integer(low: int, high: int) -> _Reader:
    def read(value: Any, what: str) -> int:
        if type(value) is not int or not low <= value <= high:
            _refuse(what, value, f"an integer from {low} to {high}")
        return value

    return read


def _number(value: Any, what: str) -> float:
    if type(value) is not float or not math.isfinite(value) or value < 0:
        _refuse(what, value, "a finite number >= 0")
    return value


def _list(each: _Reader, most: int | None = None) -> _Reader:
    def read(value: Any, what: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or (most is not None and len(value) > most):
            _refuse(what, value, "a list" + ("" if most is None else f" of at most {most}"))
        return tuple(each(one, what) for one in value)

    return read


def _table(each: _Reader) -> _Reader:
    def read(value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            _refuse(what, value, "an object")
        return {key: each(one, f"{what}, {key!r},") for key, one in value.items()}

    return read


def _record(cls: type, readers: Mapping[str, _Reader]) -> _Reader:
    def read(value: Any, what: str) -> Any:
        return cls(**_fields(what, value, cls, readers))

    return read


def _dtype(value: Any, what: str) -> torch.dtype:
    if not isinstance(value, str) or value not in _DTYPES:
        _refuse(what, value, "a dtype of torch")
    return _DTYPES[value]


def _optional_dtype(value: Any, what: str) -> torch.dtype | None:
    return None if value is None else _dtype(value, what)


def _pattern(value: Any, what: str) -> Pattern:
    return Pattern.parse(_text(value, what))


def _sha256(value: Any, what: str) -> str:
    text = _text(value, what)
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        _refuse(what, value, "64 hexadecimal digits")
    return text


def _measured(value: Any, what: str) -> tuple[tuple[int, ...], float, float]:
    if not isinstance(value, list) or len(value) != 3:
        _refuse(what, value, "[rows, ms dense, ms chosen]")
    rows = _list(_integer(0, _MAX_SIZE))(value[0], what)
    return rows, _number(value[1], what), _number(value[2], what)


_ANY_SHAPE = _list(_integer(0, _MAX_SIZE), 64)  # torch's own limit
_SHAPE = _list(_integer(0, _MAX_SIZE), _MAX_DIMS)
_LAYER: dict[str, _Reader] = {
    "pattern": _pattern,
    "state": _one_of(*STATES),
    "kind": _one_of(*_KINDS),
    "capture": _one_of(*_CAPTURES),
    "shape": _SHAPE,
    "dim": _integer(0, 2),
    "groups": _integer(1, _MAX_SIZE),
    "lambda_w": _number,
    "activation": _one_of(*ACTIVATIONS),
    "dtype": _optional_dtype,
    "format": _text,
    "algorithms": _list(_integer(0, _MAX_SIZE)),
    "threshold": _integer(0, _MAX_SIZE),
}


def _layer(value: Any, what: str) -> Any:
    layer = _record(Layer, _LAYER)(value, what)
    last = 2 if layer.kind in ("bilinear", "experts") else 1
    if layer.dim > min(last, len(layer.shape) - 1):
        _refuse(f"dim of {what}", layer.dim, f"a dimension of a {layer.kind} weight {layer.shape}")
    return layer


_SPEC: dict[str, _Reader] = {
    "nmfx": _text,
    "torch": _text,
    "made_on": _text,
    "tensors": _table(_record(Stored, {"dtype": _dtype, "shape": _ANY_SHAPE, "sha256": _sha256})),
    "aliases": _table(_text),
    "layers": _table(_layer),
    "norms": _list(_text),
    "identities": _table(_text),
    "graphs": _table(_text),
    "reasons": _table(_text),
    "measured": _table(_measured),
    "notes": _list(_text),
}
