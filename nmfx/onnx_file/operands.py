"""Which input of an ONNX operator may be its weight, and the axis that the operator sums over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Operand:
    """One input of an operator that may be a weight.

    Attributes:
        index: which input.
        axis: the reduced axis; negative ones count from the end.
        groups: that the axis is cut into before it is summed over.
        zero_point: the input that holds the integer which stands for zero, or None.
        channel: the axis that a zero point of several numbers runs along.
    """

    index: int
    axis: int
    groups: int = 1
    zero_point: int | None = None
    channel: int = 0


def attribute(node: Any, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def _product(node: Any) -> tuple[Operand, ...]:
    """Gemm and com.microsoft's FusedMatMul; the right side first, as weights stand there."""
    right = -1 if attribute(node, "transB", 0) else -2
    left = -2 if attribute(node, "transA", 0) else -1
    return Operand(1, right), Operand(0, left)


def _conv(index: int, zero_point: int | None = None) -> Callable[[Any], tuple[Operand, ...]]:
    return lambda node: (Operand(index, 1, zero_point=zero_point),)


def _conv_transpose(node: Any) -> tuple[Operand, ...]:
    return (Operand(1, 0, groups=attribute(node, "group", 1)),)  # (in, out / groups, *kernel)


_TABLE: dict[str, Callable[[Any], tuple[Operand, ...]]] = {
    "Gemm": _product,
    "FusedGemm": _product,
    "FusedMatMul": _product,
    "MatMul": lambda node: (Operand(1, -2), Operand(0, -1)),
    "MatMulInteger": lambda node: (
        Operand(1, -2, zero_point=3, channel=-1),
        Operand(0, -1, zero_point=2, channel=-2),
    ),
    "QLinearMatMul": lambda node: (
        Operand(3, -2, zero_point=5, channel=-1),
        Operand(0, -1, zero_point=2, channel=-2),
    ),
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "ConvInteger": _conv(1, 3),
    "QLinearConv": _conv(3, 5),
    "ConvTranspose": _conv_transpose,
}

# Operators with weights whose axes this file does not know; they are listed, and not checked.
OTHERS = frozenset(
    (
        "Attention",
        "DeformConv",
        "DynamicQuantizeLSTM",
        "Einsum",
        "GRU",
        "LSTM",
        "MatMulBnb4",
        "MatMulNBits",
        "MoE",
        "MultiHeadAttention",
        "QAttention",
        "QGemm",
        "QMoE",
        "RNN",
    )
)


def operands(node: Any) -> tuple[Operand, ...] | None:
    """The inputs of a node that may be its weight, the likelier first; None if it has none."""
    find = _TABLE.get(node.op_type)
    return None if find is None else find(node)
