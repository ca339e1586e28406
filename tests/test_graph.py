"""The table of weight consumers and the one rewriting pass, on graphs built by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked_reference import nm_mask
from torch import Tensor, fx, nn

import nmfx
from nmfx.graph.rewrite import (
    can_pack,
    find_uses,
    insert_keep,
    insert_sr_ste,
    remove_inserted,
    replace_with_packed,
)
from nmfx.graph.table import TABLE, consumer_of, groups_argument
from nmfx.ops.conv_nm import conv_nm
from nmfx.ops.keep import keep
from nmfx.ops.linear_nm import linear_nm
from nmfx.ops.sr_ste import make_control, sr_ste
from nmfx.packing import pack, pack_conv
from nmfx.pattern import Pattern

aten = torch.ops.aten

# op, arguments with "x" and "w" in place of the tensors, shape of x, shape of w, group dimension.
LINEAR = ("x", "w", "b"), (3, 8), (4, 8), 1
ADDMM = ("b", "x", "w"), (3, 8), (8, 4), 0
CASES: dict[str, tuple[Any, tuple[Any, ...], tuple[int, ...], tuple[int, ...], int]] = {
    "F.linear": (F.linear, *LINEAR),
    "aten.linear": (aten.linear.default, *LINEAR),
    "torch.addmm": (torch.addmm, *ADDMM),
    "aten.addmm": (aten.addmm.default, *ADDMM),
}
_CONV_OPS = (
    (F.conv1d, aten.conv1d.default, aten.conv1d.padding),
    (F.conv2d, aten.conv2d.default, aten.conv2d.padding),
    (F.conv3d, aten.conv3d.default, aten.conv3d.padding),
)
_TRANSPOSED_OPS = (
    (F.conv_transpose1d, aten.conv_transpose1d.default),
    (F.conv_transpose2d, aten.conv_transpose2d.input),
    (F.conv_transpose3d, aten.conv_transpose3d.input),
)
for d in (1, 2, 3):
    x, kernel, ones, zeros = (2, 8, *[5] * d), [3] * d, [1] * d, [0] * d
    conv, conv_aten, conv_padding = _CONV_OPS[d - 1]
    for groups in (1, 2):
        w = (4, 8 // groups, *kernel)
        tail = (ones, ones, ones, groups)
        CASES[f"F.conv{d}d groups={groups}"] = (conv, ("x", "w", "b", *tail), x, w, 1)
        CASES[f"F.conv{d}d same groups={groups}"] = (
            *(conv, ("x", "w", "b", ones, "same", ones, groups), x, w, 1),
        )
        CASES[f"aten.conv{d}d groups={groups}"] = (conv_aten, ("x", "w", "b", *tail), x, w, 1)
        CASES[f"aten.conv{d}d.padding groups={groups}"] = (
            *(conv_padding, ("x", "w", "b", ones, "same", ones, groups), x, w, 1),
        )
        CASES[f"aten.convolution {d}d groups={groups}"] = (
            *(aten.convolution.default, ("x", "w", "b", ones, ones, ones, False, zeros, groups)),
            *(x, w, 1),
        )
        # transposed: (in, out / groups, *kernel), and the input channels of a group are rows
        wt = (8, 4 // groups, *kernel)
        back = ("x", "w", "b", ones, zeros, zeros, groups, ones)
        for op in _TRANSPOSED_OPS[d - 1]:
            CASES[f"{op.__name__} {d}d {str(op)[:4]} groups={groups}"] = (op, back, x, wt, 0)
        CASES[f"aten.convolution transposed {d}d groups={groups}"] = (
            *(aten.convolution.default, ("x", "w", "b", ones, zeros, ones, True, zeros, groups)),
            *(x, wt, 0),
        )


class Root(nn.Module):
    """Holds what a graph reads: weight, bias, control."""

    def __init__(self, shape: tuple[int, ...], n: int = 2, lambda_w: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("control", make_control(lambda_w, n))


def graph_of(build: Callable[[fx.Graph, fx.Node, fx.Node, fx.Node], Any]) -> fx.Graph:
    """A graph with a placeholder x and the attributes weight and bias."""
    graph = fx.Graph()
    nodes = graph.placeholder("x"), graph.get_attr("weight"), graph.get_attr("bias")
    graph.output(build(graph, *nodes))
    return graph


def graph_of_case(op: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Graph:
    def build(graph: fx.Graph, x: fx.Node, w: fx.Node, b: fx.Node) -> fx.Node:
        named = {"x": x, "w": w, "b": b}
        given = tuple(named.get(a, a) if isinstance(a, str) else a for a in args)
        by_name = {k: named.get(a, a) if isinstance(a, str) else a for k, a in kwargs.items()}
        return graph.call_function(op, given, by_name)

    return graph_of(build)


def is_weight(node: fx.Node) -> bool:
    return node.op == "get_attr" and node.target == "weight"


def count(graph: fx.Graph, op: Any) -> int:
    return sum(node.op == "call_function" and node.target is op for node in graph.nodes)


def run(root: nn.Module, graph: fx.Graph, x: Tensor) -> Tensor:
    gm = fx.GraphModule(root, copy.deepcopy(graph))  # a module takes possession of its graph
    gm.graph.lint()
    with torch.no_grad():
        return gm(x)


def code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def test_table_has_a_case_for_every_entry() -> None:
    covered = {case[0] for case in CASES.values()}
    assert covered == set(TABLE), f"no case for {set(TABLE) - covered}"


@pytest.mark.parametrize("name", CASES)
def test_rewrite_masks_every_table_entry_once(name: str) -> None:
    op, args, x_shape, w_shape, dim = CASES[name]
    root, x = Root(w_shape), torch.randn(x_shape)
    graph = graph_of_case(op, args)
    before, plain = code(graph), run(root, graph, x)

    uses = find_uses(graph, is_weight)
    assert [use.consumer.dim for use in uses] == [dim], f"{name}: wrong group dimension"
    node = insert_sr_ste(graph, uses, "control", 4, dim)

    assert count(graph, sr_ste) == 1, f"{name}: {count(graph, sr_ste)} sr_ste nodes"
    assert node.args[2:] == (4, dim), node.args
    actual = run(root, graph, x)
    masked = Root(w_shape)
    masked.load_state_dict(root.state_dict())
    masked.weight.data.masked_fill_(~nm_mask(root.weight, 2, 4, dim), 0.0)
    expected = run(masked, graph_of_case(op, args), x)
    assert torch.equal(actual, expected), f"{name}: not the masked operator"
    assert not torch.equal(actual, plain), f"{name}: masking changed nothing"

    assert not find_uses(graph, is_weight), f"{name}: a second pass would insert again"
    assert remove_inserted(graph) == 1
    assert code(graph) == before, f"{name}: removal is not the inverse"
    assert torch.equal(run(root, graph, x), plain)


@pytest.mark.parametrize(
    ("op", "kwargs", "w_shape", "dim"),
    [
        (F.linear, {"input": "x", "weight": "w", "bias": "b"}, (4, 8), 1),
        (F.linear, {"bias": "b", "weight": "w", "input": "x"}, (4, 8), 1),
        (torch.addmm, {"input": "b", "mat1": "x", "mat2": "w"}, (8, 4), 0),
        (
            aten.convolution.default,
            {
                "input": "x",
                "weight": "w",
                "bias": "b",
                "stride": [1],
                "padding": [0],
                "dilation": [1],
                "transposed": True,
                "output_padding": [0],
                "groups": 2,
            },
            (8, 2, 1),
            0,
        ),
    ],
    ids=["linear", "linear_reordered", "addmm", "convolution_transposed"],
)
def test_rewrite_finds_weights_given_by_keyword(
    op: Any, kwargs: dict[str, Any], w_shape: tuple[int, ...], dim: int
) -> None:
    graph = graph_of_case(op, (), **kwargs)
    before = code(graph)
    uses = find_uses(graph, is_weight)
    assert [use.consumer.dim for use in uses] == [dim]
    masked = insert_sr_ste(graph, uses, "control", 4, dim)
    assert masked in uses[0].node.kwargs.values(), "the keyword argument still reads the weight"
    x = torch.randn((2, 8, 5) if len(w_shape) == 3 else (3, 8))
    run(Root(w_shape), graph, x)
    remove_inserted(graph)
    assert code(graph) == before


def test_groups_are_read_by_position_and_by_keyword() -> None:
    def groups(op: Any, args: tuple[Any, ...], **kwargs: Any) -> Any:
        graph = graph_of_case(op, args, **kwargs)
        return groups_argument(find_uses(graph, is_weight)[0].node)

    ones = [1, 1]
    assert groups(F.conv_transpose2d, ("x", "w")) == 1
    assert groups(F.conv_transpose2d, ("x", "w", "b", ones, ones, ones, 4)) == 4
    assert groups(F.conv_transpose2d, ("x", "w"), groups=2) == 2
    convolution = ("x", "w", "b", ones, ones, ones, True, [0, 0], 8)
    assert groups(aten.convolution.default, convolution) == 8


def test_a_weight_used_twice_gets_one_node() -> None:
    def build(graph: fx.Graph, x: fx.Node, w: fx.Node, b: fx.Node) -> fx.Node:
        once = graph.call_function(F.linear, (x, w, b))
        return graph.call_function(F.linear, (once, w))

    root, graph, x = Root((8, 8)), graph_of(build), torch.randn(3, 8)
    root.bias = nn.Parameter(torch.randn(8))
    before = code(graph)
    insert_sr_ste(graph, find_uses(graph, is_weight), "control", 4, 1)
    assert count(graph, sr_ste) == 1, code(graph)
    w = torch.where(nm_mask(root.weight, 2, 4, 1), root.weight, 0.0)
    assert torch.equal(run(root, graph, x), F.linear(F.linear(x, w, root.bias), w).detach())
    remove_inserted(graph)
    assert code(graph) == before


def test_two_attribute_nodes_of_one_weight_get_one_node() -> None:
    def build(graph: fx.Graph, x: fx.Node, w: fx.Node, b: fx.Node) -> fx.Node:
        once = graph.call_function(F.linear, (x, w, b))
        again = graph.get_attr("weight")
        return graph.call_function(F.linear, (once, again))

    root, graph, x = Root((8, 8)), graph_of(build), torch.randn(3, 8)
    root.bias = nn.Parameter(torch.randn(8))
    plain = run(root, graph, x)
    insert_sr_ste(graph, find_uses(graph, is_weight), "control", 4, 1)
    assert count(graph, sr_ste) == 1, code(graph)
    w = torch.where(nm_mask(root.weight, 2, 4, 1), root.weight, 0.0)
    assert torch.equal(run(root, graph, x), F.linear(F.linear(x, w, root.bias), w).detach())
    remove_inserted(graph)
    assert torch.equal(run(root, graph, x), plain)


def test_other_readers_of_a_weight_are_left_alone() -> None:
    def build(graph: fx.Graph, x: fx.Node, w: fx.Node, b: fx.Node) -> fx.Node:
        out = graph.call_function(F.linear, (x, w, b))
        norm = graph.call_method("sum", (w,))
        return graph.call_function(torch.add, (out, norm))

    root, graph, x = Root((4, 8)), graph_of(build), torch.randn(3, 8)
    (use,) = find_uses(graph, is_weight)
    insert_sr_ste(graph, [use], "control", 4, 1)
    w = torch.where(nm_mask(root.weight, 2, 4, 1), root.weight, 0.0)
    expected = F.linear(x, w, root.bias) + root.weight.sum()
    assert torch.equal(run(root, graph, x), expected.detach())


@pytest.mark.parametrize("op", [torch.matmul, F.embedding, torch.mul, F.bilinear])
def test_operators_outside_the_table_are_no_consumers(op: Any) -> None:
    graph = graph_of_case(op, ("x", "w"))
    before = code(graph)
    assert not find_uses(graph, is_weight)
    assert code(graph) == before, "looking for uses changed the graph"


def test_a_weight_in_the_place_of_the_input_is_no_use() -> None:
    assert not find_uses(graph_of_case(F.linear, ("w", "x")), is_weight)
    assert not find_uses(graph_of_case(torch.addmm, ("w", "x", "b")), is_weight)


def test_only_function_calls_are_consumers() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_method("linear", (x, x))
    assert consumer_of(node) is None
    assert consumer_of(x) is None


def test_keep_is_inserted_and_removed_like_sr_ste() -> None:
    root, graph, x = Root((4, 8)), graph_of_case(F.linear, ("x", "w", "b")), torch.randn(3, 8)
    before = code(graph)
    root.register_buffer("mask", nm_mask(root.weight, 2, 4, 1).flip(1))
    insert_keep(graph, find_uses(graph, is_weight), "mask")
    assert count(graph, keep) == 1
    expected = F.linear(x, torch.where(root.mask, root.weight, 0.0), root.bias)
    assert torch.equal(run(root, graph, x), expected.detach())
    assert not find_uses(graph, is_weight)
    assert remove_inserted(graph) == 1
    assert code(graph) == before


def test_remove_inserted_takes_all_and_counts() -> None:
    graph = graph_of_case(F.linear, ("x", "w", "b"))
    assert remove_inserted(graph) == 0
    insert_sr_ste(graph, find_uses(graph, is_weight), "control", 4, 1)
    assert remove_inserted(graph) == 1
    assert remove_inserted(graph) == 0


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "w_shape"),
    [
        (F.linear, ("x", "w", "b"), {}, (4, 8)),
        (F.linear, ("x", "w"), {}, (4, 8)),
        (F.linear, (), {"input": "x", "weight": "w", "bias": "b"}, (4, 8)),
        (torch.addmm, ("b", "x", "w"), {}, (8, 4)),
        (torch.addmm, (), {"input": "b", "mat1": "x", "mat2": "w"}, (8, 4)),
        (aten.addmm.default, (), {"self": "b", "mat1": "x", "mat2": "w"}, (8, 4)),
    ],
)
def test_replace_with_packed_computes_the_same(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], w_shape: tuple[int, ...]
) -> None:
    root, graph, x = Root(w_shape), graph_of_case(op, args, **kwargs), torch.randn(3, 8)
    dim = w_shape.index(8)
    root.weight.data.masked_fill_(~nm_mask(root.weight, 2, 4, dim), 0.0)
    expected = run(root, graph, x)
    uses = find_uses(graph, is_weight)
    assert can_pack(uses) is None
    rows = root.weight.data if dim == 1 else root.weight.data.t()
    values, index = pack(rows, Pattern(2, 4))
    root.register_buffer("values", values)
    root.register_buffer("index", index)
    replace_with_packed(graph, uses, "values", "index", w_shape, Pattern(2, 4))
    assert count(graph, linear_nm) == 1
    assert not any(is_weight(node) for node in graph.nodes), "the dense weight is still read"
    torch.testing.assert_close(run(root, graph, x), expected)


_EVERY = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "w_shape", "groups"),
    [
        (F.conv1d, ("x", "w"), {}, (4, 8, 3), 1),
        (F.conv1d, ("x", "w", "b", 2, 1, 2, 2), {}, (4, 4, 3), 2),
        (F.conv1d, ("x", "w", "b"), {"padding": "same", "groups": 2}, (4, 4, 2), 2),
        (F.conv2d, (), {"input": "x", "weight": "w", "bias": "b", **_EVERY}, (4, 4, 3, 3), 2),
        (F.conv2d, ("x", "w", None, (2, 1)), {"padding": (0, 1)}, (4, 8, 1, 3), 1),
        (aten.conv1d.default, ("x", "w", "b", [2], [1], [1]), {}, (4, 8, 3), 1),
        (aten.conv1d.padding, ("x", "w", "b", [1], "same"), {}, (4, 8, 3), 1),
        (aten.conv2d.default, ("x", "w", "b"), {"groups": 2}, (4, 4, 3, 3), 2),
        (aten.conv2d.padding, ("x", "w", None, [1, 1], "valid"), {}, (4, 8, 3, 3), 1),
        (
            *(aten.convolution.default, ("x", "w", "b", [2], [1], [1], False, [0], 2)),
            *({}, (4, 4, 3), 2),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_replace_with_packed_computes_the_same_convolution(
    op: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    w_shape: tuple[int, ...],
    groups: int,
) -> None:
    root, graph = Root(w_shape), graph_of_case(op, args, **kwargs)
    x = torch.randn(2, 8, *[7] * (len(w_shape) - 2))
    root.weight.data.masked_fill_(~nm_mask(root.weight, 2, 4, 1), 0.0)
    expected = run(root, graph, x)
    uses = find_uses(graph, is_weight)
    assert can_pack(uses) is None
    values, index = pack_conv(root.weight.data, groups, Pattern(2, 4))
    root.register_buffer("values", values)
    root.register_buffer("index", index)
    replace_with_packed(graph, uses, "values", "index", w_shape, Pattern(2, 4))
    assert count(graph, conv_nm) == 1
    assert count(graph, op) == 0
    assert not any(is_weight(node) for node in graph.nodes), "the dense weight is still read"
    torch.testing.assert_close(run(root, graph, x), expected)


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "reason"),
    [
        (F.conv_transpose1d, ("x", "w"), {}, "conv_transpose has no packed kernel yet"),
        (
            aten.convolution.default,
            ("x", "w", None, [1], [0], [1], True, [0], 1),
            {},
            "conv_transpose has no packed kernel yet",
        ),
        (torch.addmm, ("b", "x", "w"), {"alpha": 2}, "addmm with alpha or beta"),
        (torch.addmm, ("b", "x", "w"), {"beta": 0}, "addmm with alpha or beta"),
    ],
)
def test_can_pack_names_the_obstacle(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> None:
    assert can_pack(find_uses(graph_of_case(op, args, **kwargs), is_weight)) == reason


def test_can_pack_refuses_a_weight_with_other_readers() -> None:
    def build(graph: fx.Graph, x: fx.Node, w: fx.Node, b: fx.Node) -> fx.Node:
        out = graph.call_function(F.linear, (x, w, b))
        return graph.call_function(torch.add, (out, graph.call_method("sum", (w,))))

    uses = find_uses(graph_of(build), is_weight)
    assert can_pack(uses) == "its weight is read by more than linear layers"


def test_generated_code_holds_m_but_neither_n_nor_lambda() -> None:
    def source(n: int, m: int, lambda_w: float) -> str:
        root, graph = Root((4, 8), n, lambda_w), graph_of_case(F.linear, ("x", "w", "b"))
        insert_sr_ste(graph, find_uses(graph, is_weight), "control", m, 1)
        return fx.GraphModule(root, graph).code

    assert source(2, 4, 2e-4) == source(1, 4, 0.5)
    assert source(2, 4, 2e-4) != source(2, 8, 2e-4)
    assert "nmfx_sr_ste(weight, control, 4, 1)" in source(2, 4, 2e-4)


def test_graphs_read_sr_ste_under_its_public_name() -> None:
    assert (sr_ste.__module__, keep.__module__, linear_nm.__module__) == ("nmfx",) * 3
    assert nmfx.sr_ste is sr_ste
    assert nmfx.keep is keep
    assert nmfx.linear_nm is linear_nm
