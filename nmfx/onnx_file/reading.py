"""An ONNX file as a list of graphs; weights beside it stay on the disk until they are read."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NMError
from .constants import Constants


@dataclass(frozen=True)
class Graph:
    """A graph, or the body of an If, Loop or Scan inside one.

    Attributes:
        nodes: its operators, in order.
        constants: what its names hold, and those of the graphs around it.
    """

    nodes: list[Any]
    constants: Constants


def require_onnx() -> Any:
    """The onnx package.

    Raises:
        NMError: it is not installed.
    """
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise NMError(
            f"reading ONNX files needs the onnx package: pip install onnx ({error})"
        ) from (error)


def read_graphs(path: str | os.PathLike[str]) -> list[Graph]:
    """The graphs of a file, the outermost first.

    Raises:
        NMError: no onnx package, no such file, or not an ONNX model.
    """
    onnx = require_onnx()
    path = Path(path)
    if not path.is_file():
        raise NMError(f"{path}: no such file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base that is public
        raise NMError(f"{path} is no ONNX model: {_line(error)}") from error
    if not model.graph.node or not model.opset_import:
        raise NMError(f"{path} is no ONNX model: it holds no graph with operators")
    if model.functions:
        model = importlib.import_module("onnx.inliner").inline_local_functions(model)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    return list(_graphs(model.graph, Constants(model.graph, path.parent, opsets)))


def _graphs(graph: Any, constants: Constants) -> Iterator[Graph]:
    yield Graph(list(graph.node), constants)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner, constants.inside(inner))


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
