"""What the names of an ONNX graph hold, where that can be computed ahead.

An initializer, a Constant, and whatever is computed from these alone: Transpose, Cast, Identity,
Reshape, QuantizeLinear and DequantizeLinear, ... by the reference implementation of the onnx
package. So a weight is seen as its operator sees it: transposed, rounded, quantized.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NMError

_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")


class Unreadable(Exception):
    """A constant that cannot be computed; the message says why."""


class Constants:
    """The constants of one graph.

    Args:
        graph: a GraphProto.
        folder: where the file is, and the files with its external data.
        opsets: version by domain.
        outer: the graph around it, or None.
    """

    def __init__(
        self,
        graph: Any,
        folder: Path,
        opsets: Mapping[str, int],
        outer: Constants | None = None,
    ) -> None:
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes = list(graph.node)  # in the order in which they can be computed
        self._producers = {name: node for node in self._nodes for name in node.output if name}
        self._folder, self._opsets, self._outer = folder, dict(opsets), outer
        self._known = set(self._initializers)
        for node in self._nodes:
            if self._is_constant(node):
                self._known.update(node.output)

    def inside(self, graph: Any) -> Constants:
        """The constants of a graph inside this one."""
        return Constants(graph, self._folder, self._opsets, self)

    def holds(self, name: str) -> bool:
        """Whether a name is known ahead."""
        if name in self._known or name in self._producers:
            return name in self._known
        return self._outer is not None and self._outer.holds(name)

    def _is_constant(self, node: Any) -> bool:
        inputs = [one for one in node.input if one]
        if not inputs:
            return bool(node.op_type == "Constant")
        if node.op_type.startswith(_RANDOM) or any(a.HasField("g") for a in node.attribute):
            return False
        return all(map(self.holds, inputs))

    def array(self, name: str) -> np.ndarray:
        """What a name holds; types that numpy lacks are those of ml_dtypes.

        Args:
            name: one that `holds` knows.

        Raises:
            NMError: external data that is not there or damaged.
            Unreadable: an operator of which onnx has no reference implementation.
        """
        needed, waiting = set[str](), [name]
        while waiting:
            one = waiting.pop()
            if one not in needed:
                needed.add(one)
                computed = one in self._producers and one not in self._initializers
                waiting += [its for its in self._producers[one].input if its] if computed else []
        found = {
            one: self._given(one)
            for one in needed
            if one in self._initializers or one not in self._producers
        }
        for node in self._nodes:
            if needed.isdisjoint(node.output) or not found.keys().isdisjoint(node.output):
                continue
            given = {one: found[one] for one in node.input if one}
            found |= zip(node.output, self._compute(node, given), strict=True)
        return found[name]

    def _given(self, name: str) -> np.ndarray:
        """What the graph does not compute itself."""
        if name in self._initializers:
            return self._read(self._initializers[name])
        assert self._outer is not None
        return self._outer.array(name)

    def _read(self, tensor: Any) -> np.ndarray:
        onnx = importlib.import_module("onnx")
        copy = onnx.TensorProto()  # reading external data writes it into the proto
        copy.CopyFrom(tensor)
        try:
            return onnx.numpy_helper.to_array(copy, base_dir=str(self._folder))
        except Exception as error:  # onnx's own, of the operating system, of numpy
            raise NMError(f"{tensor.name}: its data cannot be read: {error}") from error

    def _compute(self, node: Any, given: dict[str, np.ndarray]) -> Any:
        reference = importlib.import_module("onnx.reference")
        try:
            evaluator = reference.ReferenceEvaluator(node, opsets=self._opsets)
            return evaluator.run(None, given)
        except Exception as error:  # whatever an implementation raises means the same
            raise Unreadable(f"{node.op_type} cannot be computed ahead: {error}") from error


# What is left of the bits of a float without its sign; numpy lacks bfloat16, and finds it by name.
_UNSIGNED = {
    "float64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF),
    "float32": (np.uint32, 0x7FFF_FFFF),
    "float16": (np.uint16, 0x7FFF),
    "bfloat16": (np.uint16, 0x7FFF),
}


def nonzero(array: np.ndarray) -> Tensor:
    """Which elements are not zero, by their bits: denormals are not, -0.0 is; bool."""
    if array.dtype.name in _UNSIGNED:
        bits, mask = _UNSIGNED[array.dtype.name]
        kept = (np.ascontiguousarray(array).view(bits) & bits(mask)) != 0
    elif array.dtype == np.bool_ or np.issubdtype(array.dtype, np.integer):
        kept = array != 0
    else:
        kept = array.astype(np.float32) != 0  # float8, 4 bits: exact, and normal numbers there
    return torch.from_numpy(np.asarray(kept).reshape(array.shape))
