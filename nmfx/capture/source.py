"""What the source of one method does with the weights of the modules below `self`."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from dataclasses import dataclass, field

Chain = tuple[str, ...]  # ("layers", "*", "weight") for self.layers[i].weight

ANY = "*"  # an index that only running the code tells


@dataclass
class Scan:
    """What the methods of a class do with what hangs below `self`.

    Attributes:
        read: chains that end in a weight whose values are looked at.
        written: those that are changed in place.
        called: chains that are called.
        entries: the methods that may be called from outside and lead to a read.
    """

    read: set[Chain] = field(default_factory=set)
    written: set[Chain] = field(default_factory=set)
    called: set[Chain] = field(default_factory=set)
    entries: set[str] = field(default_factory=set)


def names_in(code: types.CodeType) -> list[str]:
    """The names that a function and those inside it mention."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return [*code.co_names, *(name for c in inner for name in names_in(c))]


def mentions_weight(code: types.CodeType) -> bool:
    """Whether a function can read a weight by name at all; cheap."""
    return any("weight" in name for name in names_in(code))


def scan_function(function: types.FunctionType, scan: Scan) -> None:
    """Adds what a function does to `scan`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made by exec, a lambda
        # Without its source every weight below a name that it mentions may be one that it reads.
        if mentions_weight(function.__code__):
            scan.read |= {(name, "weight") for name in names_in(function.__code__)}
        return
    _Visitor(scan).run(tree)


# Attributes and functions that tell what a tensor is like, not what is in it.
_METADATA = frozenset(
    [
        *("dtype", "device", "shape", "size", "ndim", "dim", "numel", "layout", "stride"),
        *("element_size", "itemsize", "nbytes", "nelement", "storage_offset", "is_contiguous"),
        *("requires_grad", "is_cuda", "is_cpu", "is_meta", "is_leaf", "is_quantized"),
        *("is_floating_point", "grad", "grad_fn", "data_ptr", "names"),
    ]
)
_ABOUT = frozenset({"isinstance", "type", "id", "hasattr", "getattr", "callable", "len"})
_LIKE = frozenset(
    [
        *("to", "type_as", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like"),
        *("randn_like", "new_zeros", "new_empty", "is_tensor"),
    ]
)
_SAME = frozenset({"data", "detach"})  # the same values under another name


class _Visitor:
    """Looks at one function."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.parents: dict[ast.AST, ast.AST] = {}
        self.aliases: dict[str, Chain] = {}

    def run(self, tree: ast.Module) -> None:
        function = tree.body[0]
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        arguments = [*function.args.posonlyargs, *function.args.args]
        if not arguments:
            return
        self.aliases[arguments[0].arg] = ()
        for node in ast.walk(function):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
        for _ in range(2):  # an alias of an alias
            for node in ast.walk(function):
                self._note_alias(node)
        for node in ast.walk(function):
            self._note_use(node)

    def _note_alias(self, node: ast.AST) -> None:
        """`q = self.query`, `for layer in self.layers`."""
        pairs: list[tuple[ast.AST, ast.AST, Chain]] = []
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            pairs = [(node.targets[0], node.value, ())]
        elif isinstance(node, ast.NamedExpr):
            pairs = [(node.target, node.value, ())]
        elif isinstance(node, (ast.For, ast.comprehension)):
            pairs = [(node.target, node.iter, (ANY,))]
        for target, value, more in pairs:
            chain = self._chain(value)
            if isinstance(target, ast.Name) and chain and "weight" not in chain[-1]:
                self.aliases.setdefault(target.id, chain + more)

    def _chain(self, node: ast.AST) -> Chain | None:
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            below = self._chain(node.value)
            return None if below is None else (*below, node.attr)
        if isinstance(node, ast.Subscript):
            below = self._chain(node.value)
            if not below or "weight" in below[-1]:
                return None
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            return (*below, ANY if index is None or index == -1 else str(index))
        return None

    def _note_use(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            chain = self._chain(node.func)
            if chain:
                self.scan.called.add(chain)
        elif isinstance(node, ast.Attribute) and "weight" in node.attr:
            chain = self._chain(node)
            if chain is None or len(chain) < 2:
                return
            if self._writes(node):
                self.scan.written.add(chain)
                self.scan.read.add(chain)
            elif not self._only_metadata(node):
                self.scan.read.add(chain)

    def _only_metadata(self, node: ast.AST) -> bool:
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute):
            if parent.attr in _SAME:
                call = self.parents.get(parent)
                called = isinstance(call, ast.Call) and call.func is parent
                return self._only_metadata(call if called and call is not None else parent)
            return parent.attr in _METADATA or isinstance(parent.ctx, ast.Store)
        if isinstance(parent, ast.Compare):
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
        if isinstance(parent, ast.Call) and node is not parent.func:
            name = parent.func
            if isinstance(name, ast.Name):
                return name.id in _ABOUT
            return isinstance(name, ast.Attribute) and name.attr in _LIKE
        return False

    def _writes(self, node: ast.AST) -> bool:
        """`self.a.weight = ...`, `self.a.weight.data[0] = ...`, `self.a.weight.data.clamp_()`."""
        while True:
            if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
                return True
            parent = self.parents.get(node)
            if isinstance(parent, ast.AugAssign):
                return parent.target is node
            if isinstance(parent, ast.Call):
                name = node.attr if isinstance(node, ast.Attribute) else ""
                return parent.func is node and name.endswith("_") and not name.endswith("__")
            method = isinstance(parent, ast.Attribute) and (
                parent.attr in _SAME or isinstance(self.parents.get(parent), ast.Call)
            )
            part = isinstance(parent, ast.Subscript) and parent.value is node
            if parent is None or not (method or part):
                return False
            node = parent
