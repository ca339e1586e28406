"""nmfx.check_onnx: do the weights of an ONNX file satisfy N:M, along the axes its operators sum?

    Gemm              (K, N), with transB (N, K)         groups along K
    MatMul            (..., K, N); on the left (..., M, K)
    Conv              (out, in / groups, *kernel)        along in / groups, at each kernel position
    ConvTranspose     (in, out / groups, *kernel)        along in, within its group

It is TensorRT's rule for sparse tactics, count_nonzero(W[k, 4c:4c+4, r, s]) <= 2, for any N:M.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import NMError
from .offence import find_offence
from .onnx_file.constants import Constants, Unreadable, nonzero
from .onnx_file.operands import OTHERS, Operand, operands
from .onnx_file.reading import read_graphs
from .pattern import Pattern, PatternLike

_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's exporter keeps the names of modules there


@dataclass(frozen=True)
class OnnxLayer:
    """One operator that may have a weight.

    Attributes:
        name: of the module it was exported from if torch wrote that down, else of the node.
        operator: "Gemm", "MatMul", "Conv", ...
        weight: the name of the input that is the weight, or "".
        shape: of the weight as the operator reads it.
        axis: that groups run along, or None.
        state: "satisfied", "broken" or "not checked".
        reason: the first group that breaks the pattern, or why nothing was checked.
    """

    name: str
    operator: str
    weight: str
    shape: tuple[int, ...]
    axis: int | None
    state: str
    reason: str


@dataclass(frozen=True)
class OnnxCheck:
    """What `nmfx.check_onnx` found; `print` it for a table."""

    pattern: Pattern
    layers: tuple[OnnxLayer, ...]

    def __iter__(self) -> Iterator[OnnxLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def ok(self) -> bool:
        """Whether layers were checked, and none is broken."""
        states = {layer.state for layer in self.layers}
        return "satisfied" in states and "broken" not in states

    def summary(self) -> str:
        """How many layers satisfy the pattern, in a sentence."""
        checked = [layer for layer in self.layers if layer.state != "not checked"]
        good = sum(layer.state == "satisfied" for layer in checked)
        skipped = len(self.layers) - len(checked)
        if not checked:
            return f"no weight was checked for {self.pattern}; not checked: {skipped}"
        return f"{good} of {len(checked)} weights satisfy {self.pattern}; not checked: {skipped}"

    def to_dict(self) -> dict[str, Any]:
        """{"pattern": "2:4", "ok": bool, "layers": [{attribute of `OnnxLayer`: plain value}]}."""
        layers = [{**dataclasses.asdict(one), "shape": list(one.shape)} for one in self.layers]
        return {"pattern": self.pattern.text, "ok": self.ok, "layers": layers}

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("layer", "operator", "weight", "shape", "axis", "state", "reason"):
            table.add_column(title, no_wrap=True)
        for layer in self.layers:
            table.add_row(
                escape(layer.name),
                layer.operator,
                escape(layer.weight),
                "x".join(map(str, layer.shape)) or "-",
                "-" if layer.axis is None else str(layer.axis),
                layer.state,
                escape(layer.reason),
            )
        return table

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=10_000, color_system=None).print(self)
        lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
        return "\n".join([*lines, "", self.summary()])


def check_onnx(
    path: str | os.PathLike[str],
    pattern: PatternLike,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> OnnxCheck:
    """Applies TensorRT's rule for 2:4 weights, or that of any N:M, to each layer of an ONNX file.

    A weight is looked at as its operator reads it: through Transpose, Cast, Identity, Reshape,
    QuantizeLinear, DequantizeLinear and whatever else can be computed ahead, in external files too.
    -0.0 and, of integers, the zero point count as zero. Needs the onnx package.

    Args:
        path: the file; its external data lies beside it.
        pattern: "2:4", (2, 4) or a Pattern.
        only: globs of the layers that count, by name (of the module, node or weight); all if empty.
        skip: globs of those that do not: the output layer, say, that was left dense.

    Returns:
        One row per Gemm, MatMul and convolution, and per operator that may hold weights which are
        not checked, with the reason; `.ok`, `.to_dict()`, and `print` shows a table.

    Raises:
        NMError: a malformed pattern, no onnx package, no ONNX file, data that is missing beside it,
            or a glob that matches no layer.

    Reference: "Sparsity" in TensorRT's developer guide.
    """
    pattern = Pattern.parse(pattern)
    for name, globs in (("only", only), ("skip", skip)):
        if isinstance(globs, str):
            raise NMError(f"{name}={globs!r} is one text; write a list of globs: [{globs!r}]")
    used: set[str] = set()
    layers = []
    for graph in read_graphs(path):
        for node in graph.nodes:
            layer = _check(node, graph.constants, pattern, (only, skip), used)
            if layer is not None:
                layers.append(layer)
    for glob in (*only, *skip):
        if glob not in used:
            raise NMError(f"{glob} matches no layer of {path}")
    return OnnxCheck(pattern, tuple(layers))


def _check(
    node: Any,
    constants: Constants,
    pattern: Pattern,
    globs: tuple[Sequence[str], Sequence[str]],
    used: set[str],
) -> OnnxLayer | None:
    """One node, or None if it is no layer."""
    names = _names(node)
    found = operands(node)
    if found is None:
        if node.op_type not in OTHERS:
            return None
        reason = f"nmfx does not know along which axis {node.op_type} sums over its weights"
        return OnnxLayer(names[0], node.op_type, "", (), None, "not checked", reason)
    known = [one for one in found if one.index < len(node.input)]
    known = [one for one in known if constants.holds(node.input[one.index])]
    weight = node.input[known[0].index] if known else ""
    reason = _left_out({*names, weight}, globs, used)
    shape: tuple[int, ...] = ()
    axis, state = None, "not checked"
    if not known:
        reason = reason or "it has no weight: its inputs are computed from those of the model"
    elif len(known) == len(found) > 1:
        reason = reason or "both of its inputs are constants, so nothing is left to run"
    elif not reason:
        try:
            kept = _nonzero(node, known[0], constants)
        except Unreadable as error:
            reason = str(error)
        else:
            shape = tuple(kept.shape)
            axis, state, reason = _judge(kept, known[0], pattern)
    return OnnxLayer(names[0], node.op_type, weight, shape, axis, state, reason)


def _judge(kept: torch.Tensor, operand: Operand, pattern: Pattern) -> tuple[int | None, str, str]:
    """(axis, state, reason) of a weight."""
    if kept.ndim == 0:
        return None, "not checked", "it multiplies by a number"
    axis = max(operand.axis, -kept.ndim) % kept.ndim  # MatMul takes vectors
    reduced = kept.shape[axis] // operand.groups
    if kept.ndim > 2 and operand.axis >= 0 and reduced == 1:
        return axis, "not checked", "depthwise: each filter reads a single channel"
    if reduced % pattern.m or not kept.numel():
        return axis, "not checked", f"its {reduced} inputs are no multiple of {pattern.m}"
    broken = find_offence(kept, axis, pattern)
    return axis, "satisfied" if broken is None else "broken", broken or ""


def _nonzero(node: Any, operand: Operand, constants: Constants) -> torch.Tensor:
    """Which elements of a weight are not zero."""
    array = constants.array(node.input[operand.index])
    place = operand.zero_point
    name = node.input[place] if place is not None and place < len(node.input) else ""
    if not name:
        return nonzero(array)
    if not constants.holds(name):
        raise Unreadable("its zero point is computed at run time")
    zero = constants.array(name).astype(np.int64)
    if zero.size > 1:
        shape = [1] * array.ndim
        shape[operand.channel] = zero.size
        zero = zero.reshape(shape)
    return torch.from_numpy(np.asarray(array.astype(np.int64) != zero))


def _left_out(names: set[str], globs: tuple[Sequence[str], Sequence[str]], used: set[str]) -> str:
    """Why the user's globs leave a layer out, or ""."""
    matching = [
        [glob for glob in some if any(fnmatch.fnmatchcase(name, glob) for name in names)]
        for some in globs
    ]
    used.update(*matching)
    only, skip = matching
    if globs[0] and not only:
        return "no --only matches it"
    return f"--skip {skip[0]} matches it" if skip else ""


def _names(node: Any) -> list[str]:
    """What a layer may be called, the clearest first."""
    own = node.name or next(iter(node.output), "")
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    try:
        module = ast.literal_eval(scopes)[-2]
    except (ValueError, SyntaxError, IndexError, TypeError):
        module = ""
    return [name for name in (module, own) if isinstance(name, str) and name] or [node.op_type]
