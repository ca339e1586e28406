"""What the source of one method does with the weights of the modules below `self`."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections import Counter
from dataclasses import dataclass, field

Chain = tuple[str, ...]  # ("layers", "*", "weight") for self.layers[i].weight

ANY = "*"  # an index that only running the code tells


@dataclass
class Scan:
    """What the methods of a class do with what hangs below `self`.

    Attributes:
        read: chains that end in a weight whose values are looked at, or in a property or method
            that is called after one.
        own: those that are nothing but a name: weights of `self`.
        written: those that are changed in place.
        called: chains that are called.
        entries: the methods that may be called from outside and lead to a read.
        manages: whether a gradient of a weight is looked at, or whether it has one is changed: that
            is about the parameter itself, of which a masked copy knows nothing.
    """

    read: set[Chain] = field(default_factory=set)
    own: set[Chain] = field(default_factory=set)
    written: set[Chain] = field(default_factory=set)
    called: set[Chain] = field(default_factory=set)
    entries: set[str] = field(default_factory=set)
    manages: bool = False


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


# Methods and functions that end in "_" and leave the values alone.
_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_"})


def _changes(name: str) -> bool:
    return (
        name.endswith("_")
        and not name.endswith("__")
        and name not in _HARMLESS
        and not name.startswith("clip_grad")
    )


Chains = frozenset[Chain]
_NONE: Chains = frozenset()


class _Visitor:
    """Looks at one function."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.parents: dict[ast.AST, ast.AST] = {}
        self.aliases: dict[str, Chains] = {}  # modules, or lists of them
        self.groups: dict[str, list[ast.expr]] = {}  # `layers = (self.q, self.k)`
        self.weights: dict[str, Chains] = {}  # `w = self.q.weight`
        self.bound: Counter[str] = Counter()

    def run(self, tree: ast.Module) -> None:
        function = tree.body[0]
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        arguments = [*function.args.posonlyargs, *function.args.args]
        if not arguments:
            return
        self.aliases[arguments[0].arg] = frozenset({()})
        for node in ast.walk(function):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
            changed = isinstance(self.parents.get(node), ast.AugAssign)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and not changed:
                self.bound[node.id] += 1
        for _ in range(2):  # an alias of an alias
            for node in ast.walk(function):
                self._note_alias(node)
        for node in ast.walk(function):
            self._note_use(node)

    # --- names for what hangs below self --------------------------------------------------------

    def _note_alias(self, node: ast.AST) -> None:
        """`q = self.query`, `q, k = self.query, self.key`, `for layer in self.layers`."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, (ast.NamedExpr, ast.AnnAssign)) and node.value is not None:
            self._bind(node.target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._bind_items(node.target, node.iter)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        display = isinstance(value, (ast.Tuple, ast.List))
        if isinstance(target, (ast.Tuple, ast.List)):
            if display and len(target.elts) == len(value.elts):  # type: ignore[attr-defined]
                for one, its in zip(target.elts, value.elts, strict=True):  # type: ignore[attr-defined]
                    self._bind(one, its)
            else:
                self._bind_items(target, value)
        elif isinstance(target, ast.Name) and display:
            self.groups[target.id] = value.elts  # type: ignore[attr-defined]
        elif isinstance(target, ast.Name):
            self._name(target.id, self._chains(value))

    def _bind_items(self, target: ast.expr, value: ast.expr) -> None:
        """Each element of `value` is a `target`."""
        if isinstance(target, (ast.Tuple, ast.List)):
            columns = self._columns(value, len(target.elts))
            for one, chains in zip(target.elts, columns, strict=True):
                if isinstance(one, ast.Name):
                    self._name(one.id, chains)
        elif isinstance(target, ast.Name):
            self._name(target.id, self._items(value))

    def _name(self, name: str, chains: Chains) -> None:
        modules = frozenset(chain for chain in chains if not _is_weight(chain))
        if modules - {()}:
            self.aliases[name] = self.aliases.get(name, _NONE) | modules
        if chains - modules and self.bound[name] == 1:  # it is the weight wherever it stands
            self.weights[name] = chains - modules

    def _columns(self, value: ast.expr, count: int) -> list[Chains]:
        """What each of `count` targets can be, of elements that are tuples."""
        nothing = [_NONE] * count
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.args:
            if value.func.id == "enumerate" and count == 2:
                return [_NONE, self._items(value.args[0])]
            if value.func.id == "zip" and count == len(value.args):
                return [self._items(one) for one in value.args]
        method = value.func if isinstance(value, ast.Call) else None
        if isinstance(method, ast.Attribute) and method.attr in ("items", "named_children"):
            return [_NONE, self._below(method.value)] if count == 2 else nothing
        if isinstance(value, (ast.Tuple, ast.List)):  # for a, b in ((self.q, self.k), ...)
            for one in value.elts:
                if isinstance(one, (ast.Tuple, ast.List)) and len(one.elts) == count:
                    nothing = [
                        old | self._chains(its) for old, its in zip(nothing, one.elts, strict=True)
                    ]
            return nothing
        return [self._items(value)] * count  # a, b = self.layers

    def _items(self, value: ast.expr) -> Chains:
        """What an element of `value` can be."""
        if isinstance(value, ast.Name) and value.id in self.groups:
            group = self.groups.pop(value.id)  # `state = (state[0], new)` names itself
            try:
                return frozenset().union(*map(self._chains, group))
            finally:
                self.groups[value.id] = group
        if isinstance(value, (ast.Tuple, ast.List, ast.Set)):
            return frozenset().union(*map(self._chains, value.elts))
        if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice):
            return self._items(value.value)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            copies = ("reversed", "list", "tuple", "iter", "sorted", "set")
            return self._items(value.args[0]) if value.func.id in copies and value.args else _NONE
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            lists = value.func.attr in ("values", "children")
            return self._below(value.func.value) if lists else _NONE
        return self._below(value)

    def _below(self, value: ast.expr) -> Chains:
        return frozenset((*chain, ANY) for chain in self._chains(value) if not _is_weight(chain))

    def _chains(self, node: ast.AST) -> Chains:
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, _NONE) | self.weights.get(node.id, _NONE)
        if isinstance(node, ast.Attribute):
            below = self._chains(node.value)
            if node.attr in _SAME:
                same = frozenset(chain for chain in below if _is_weight(chain))
                if same:
                    return same
            return frozenset((*chain, node.attr) for chain in below if not _is_weight(chain))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in _SAME:
                return frozenset(filter(_is_weight, self._chains(node.func.value)))
            return _NONE
        if isinstance(node, ast.Subscript):
            if isinstance(node.value, ast.Name) and node.value.id in self.groups:
                return self._items(node.value)
            if isinstance(node.slice, ast.Slice):
                return self._chains(node.value)
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            key = ANY if index is None or index == -1 else str(index)
            below = self._chains(node.value)
            return frozenset((*chain, key) for chain in below if chain and not _is_weight(chain))
        if isinstance(node, ast.IfExp):
            return self._chains(node.body) | self._chains(node.orelse)
        return _NONE

    # --- what is done with them -----------------------------------------------------------------

    def _note_use(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            self.scan.called |= {chain for chain in self._chains(node.func) if chain}
        elif isinstance(node, ast.Attribute) and "weight" in node.attr:
            chains = frozenset(filter(_is_weight, self._chains(node)))
            below = frozenset(chain for chain in chains if len(chain) > 1)
            self.scan.manages |= bool(below) and self._manages(node)
            if self._writes(node):
                self.scan.written |= chains
                self.scan.read |= below
            elif not self._only_metadata(node):
                self.scan.read |= below
                self.scan.own |= chains - below
        elif isinstance(node, ast.Name) and node.id in self.weights and self._writes(node):
            self.scan.written |= self.weights[node.id]

    def _manages(self, node: ast.AST) -> bool:
        parent = self.parents.get(node)
        if not isinstance(parent, ast.Attribute):
            return False
        stored = parent.attr == "requires_grad" and isinstance(parent.ctx, ast.Store)
        return stored or parent.attr in ("grad", "requires_grad_")

    def _only_metadata(self, node: ast.AST) -> bool:
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute):
            if parent.attr in _SAME:
                call = self.parents.get(parent)
                called = isinstance(call, ast.Call) and call.func is parent
                return self._only_metadata(call if called and call is not None else parent)
            return parent.attr in (_METADATA | _HARMLESS) or isinstance(parent.ctx, ast.Store)
        if isinstance(parent, ast.Compare):
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
        if isinstance(parent, ast.Call) and node is not parent.func:
            name = parent.func
            if isinstance(name, ast.Name):
                return name.id in _ABOUT
            return isinstance(name, ast.Attribute) and name.attr in _LIKE
        return False

    def _writes(self, node: ast.AST) -> bool:
        """`self.a.weight = ...`, `self.a.weight.data[0] = ...`, `self.a.weight.data.clamp_()`.

        And `nn.init.ones_(self.a.weight)`, `torch.clamp(..., out=self.a.weight)`.
        """
        named = isinstance(node, ast.Name)  # binding it again changes no weight
        while True:
            if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)) and not named:
                return True
            parent = self.parents.get(node)
            if isinstance(parent, ast.AugAssign):
                return parent.target is node
            if isinstance(parent, ast.keyword):
                return parent.arg == "out"
            if isinstance(parent, ast.Call):
                if parent.func is node:
                    return isinstance(node, ast.Attribute) and _changes(node.attr)
                called = parent.func
                name = called.attr if isinstance(called, ast.Attribute) else ""
                name = called.id if isinstance(called, ast.Name) else name
                return _changes(name) and parent.args[:1] == [node]
            method = isinstance(parent, ast.Attribute) and (
                parent.attr in _SAME or isinstance(self.parents.get(parent), ast.Call)
            )
            part = isinstance(parent, ast.Subscript) and parent.value is node
            if parent is None or not (method or part):
                return False
            node, named = parent, False


def _is_weight(chain: Chain) -> bool:
    return bool(chain) and "weight" in chain[-1]
