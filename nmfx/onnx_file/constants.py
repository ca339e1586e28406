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
        self._producers = {name: node for node in graph.node for name in node.output if name}
        self._folder, self._opsets, self._outer = folder, dict(opsets), outer
        self._known: dict[str, bool] = {}

    def inside(self, graph: Any) -> Constants:
        """The constants of a graph inside this one."""
        return Constants(graph, self._folder, self._opsets, self)

    def holds(self, name: str) -> bool:
        """Whether a name is known ahead."""
        if name not in self._known:
            self._known[name] = False  # of a cycle, which no valid graph has
            self._known[name] = self._look(name)
        return self._known[name]

    def _look(self, name: str) -> bool:
        if name in self._initializers:
            return True
        node = self._producers.get(name)
        if node is None:
            return self._outer is not None and self._outer.holds(name)
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
        if name in self._initializers:
            return self._read(self._initializers[name])
        node = self._producers.get(name)
        if node is None:
            assert self._outer is not None
            return self._outer.array(name)
        given = {one: self.array(one) for one in node.input if one}
        return self._compute(node, given)[list(node.output).index(name)]

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
