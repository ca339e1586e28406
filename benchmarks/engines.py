"""The engines outside torch: onnxruntime, OpenVINO and DeepSparse, all from one ONNX file."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
from onnx_file import onnx_file
from peers import Call, Unavailable
from torch import Tensor, nn


def _onnxruntime(module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    import onnxruntime

    if x[0].dtype == torch.bfloat16:
        raise Unavailable("its CPU provider has no bf16 matrix product")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # It may spin while it works, but not afterwards: that would slow down the next candidate.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    with onnx_file(module, x) as path:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    arrays = [_numpy(tensor) for tensor in x]
    held = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    for meta, value in zip(session.get_inputs(), held, strict=True):
        binding.bind_ortvalue_input(meta.name, value)
    output = session.get_outputs()[0].name
    binding.bind_output(output)

    def call() -> Any:
        session.run_with_iobinding(binding)
        return _Lazy(lambda: binding.get_outputs()[0].numpy())

    return _keeping(call, arrays, held), ""


def _openvino(module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    import openvino

    hint = "bf16" if x[0].dtype == torch.bfloat16 else "f32"
    inputs = [t.float() if t.is_floating_point() else t for t in x]
    core = openvino.Core()
    # Weights of bf16 models are widened exactly; the hint makes OpenVINO narrow them again.
    with onnx_file(_widened(module, hint), tuple(inputs)) as path:
        # The hint is given explicitly: where the CPU has bf16, OpenVINO uses it by default.
        model = core.compile_model(
            path,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
    used = model.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != hint:
        raise Unavailable(f"asked for {hint}, it computes in {used} on this CPU")
    request = model.create_infer_request()
    arrays = [_numpy(tensor) for tensor in inputs]
    held = [openvino.Tensor(array, shared_memory=True) for array in arrays]
    for position, tensor in enumerate(held):
        request.set_input_tensor(position, tensor)

    def call() -> Any:
        request.infer()
        return _Lazy(lambda: request.get_output_tensor(0).data)

    return _keeping(call, arrays, held), f"computes in {used}"


def _deepsparse(module: nn.Module, x: tuple[Tensor, ...], threads: int) -> tuple[Call, str]:
    if x[0].dtype == torch.bfloat16:
        raise Unavailable("it has fp32 and int8 only")
    library = _deepsparse_library()
    with onnx_file(module, x, old=True) as path:
        batch = x[0].shape[0]
        engine = library.deepsparse_engine(path, batch, threads, 1, "single_stream", None, None)
    arrays = [_numpy(tensor) for tensor in x]
    engine.execute_list_out(arrays)
    return lambda: engine.execute_list_out(arrays)[0], (
        f"supports {engine.fraction_of_supported_ops():.0%} of the operators"
    )


ENGINES = {"onnxruntime": _onnxruntime, "openvino": _openvino, "deepsparse": _deepsparse}


def _deepsparse_library() -> Any:
    """DeepSparse's engine without its Python package.

    The package is dead: it wants a sparsezoo and an onnx of 2023 that exclude the onnx of today's
    torch, and sends analytics when imported. Its engine needs none of that, so the package gets an
    empty stand-in and only the two modules that load the engine run.
    """
    import numpy

    if int(numpy.__version__.partition(".")[0]) > 1:
        raise Unavailable("with numpy 2 its outputs are silently wrong (strides 0)")
    if "deepsparse" not in sys.modules:
        spec = importlib.util.find_spec("deepsparse")
        if spec is None:
            raise Unavailable("not installed")
        package = types.ModuleType("deepsparse")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["deepsparse"] = package
    return importlib.import_module("deepsparse.lib").init_deepsparse_lib()


def _keeping(call: Call, *held: Any) -> Call:
    """`call`, keeping its inputs alive: the engines read their memory without owning it."""
    call.held = held  # type: ignore[attr-defined]
    return call


class _Lazy:
    """An output that is copied out of the engine only when somebody looks at it."""

    def __init__(self, get: Any) -> None:
        self.get = get

    def __array__(self) -> Any:
        return self.get()

    def copy(self) -> Any:
        return self.get().copy()


def _numpy(tensor: Tensor) -> Any:
    # The engines take dense NCHW, and choose a layout of their own inside. DeepSparse does not
    # look at the strides of its inputs: it would read channels_last data as NCHW.
    return tensor.contiguous().numpy()


def _widened(module: nn.Module, hint: str) -> nn.Module:
    import copy

    return copy.deepcopy(module).float() if hint == "bf16" else module
