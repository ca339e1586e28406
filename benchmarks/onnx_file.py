"""A module as an ONNX file, for the engines."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers import Unavailable, one_layer
from torch import Tensor, nn


@contextlib.contextmanager
def onnx_file(module: nn.Module, x: tuple[Tensor, ...], old: bool = False) -> Any:
    """A file with the module, as long as an engine needs it to build itself.

    `old`: for engines of 2023, the least opset that torch exports and an IR version to match.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if model := _by_hand(module, x):
            onnx.save(model, path)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                program = torch.onnx.export(
                    module.eval(), x, dynamo=True, verbose=False, opset_version=18 if old else None
                )
            if old:
                program.model.ir_version = 8
            program.save(str(path), external_data=True)
        yield str(path)


def _by_hand(module: nn.Module, x: tuple[Tensor, ...]) -> Any:
    """One linear or conv layer with an optional ReLU: quick to write, and old enough for all."""
    from onnx import TensorProto, helper, numpy_helper

    try:
        layer, relu = one_layer(module)
    except Unavailable:
        return None
    weights = {"w": layer.weight, **({} if layer.bias is None else {"b": layer.bias})}
    if isinstance(layer, nn.Linear):
        if x[0].ndim != 2:
            return None
        node = helper.make_node("Gemm", ["x", *weights], ["y"], transB=1)
    else:
        pads = [*layer.padding, *layer.padding]
        attributes = {"strides": list(layer.stride), "pads": pads, "group": layer.groups}
        node = helper.make_node("Conv", ["x", *weights], ["y"], **attributes)
    nodes = [node, *([helper.make_node("Relu", ["y"], ["z"])] if relu else [])]
    shape = list(module(*x).shape)
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x[0].shape))],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(t.detach().numpy(), name) for name, t in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
