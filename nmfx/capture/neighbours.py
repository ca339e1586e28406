"""Which batch norm and which activation stand right behind a layer, proven before they are joined.

Two proofs, and both are asked for: the forward of the module that calls them, as a graph
(`shallow.py`), shows that nothing else reads what lies between; and when the example inputs run,
each call of the second gets the very tensor that the first returned (`Witness`), so that nobody
else calls one without the other. Graphs need no second proof: they are the code.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..graph.follow import activation, followed_by_module, follower, module_activation, touched
from .shallow import shallow_graphs
from .site import REPLACES, SITES
from .tracer import Untraceable

# Exact types: a subclass may compute something else.
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
# By name, as importing these libraries takes seconds.
FROZEN = "FrozenBatchNorm2d"  # torchvision's: no train mode, made of buffers
WITH_ACT = "BatchNormAct2d"  # timm's: a batch norm, its children `drop` and then `act`
NORM_NAMES = (*(kind.__name__ for kind in NORMS), FROZEN, WITH_ACT)


def is_frozen(module: object) -> bool:
    """Whether a module is torchvision's batch norm without a train mode, made of buffers."""
    kind = type(module)
    return kind.__name__ == FROZEN and kind.__module__ == "torchvision.ops.misc"


def has_act(module: object) -> bool:
    """Whether a module is timm's batch norm with an activation of its own."""
    kind = type(module)
    return kind.__name__ == WITH_ACT and kind.__module__ == "timm.layers.norm_act"


def is_norm(module: object) -> bool:
    """Whether a module is a batch norm that may be folded."""
    return type(module) in NORMS or is_frozen(module) or has_act(module)


def left_by(norm: nn.Module) -> nn.Module:
    """What stays in the place of a folded batch norm: its children, or an nn.Identity."""
    children = OrderedDict(
        (key, child) for key, child in norm._modules.items() if child is not None
    )
    left = nn.Sequential(children) if children else nn.Identity()
    left.training = norm.training
    left.__dict__[REPLACES] = type(norm).__name__
    return left


@dataclass(frozen=True)
class Neighbour:
    """`second` reads what `first` computes, and nothing else does.

    Attributes:
        caller: whose forward calls both.
        first, second: modules; `second` is a node of the caller's graph if it is a function there.
    """

    caller: nn.Module
    first: nn.Module
    second: nn.Module | fx.Node

    def place_of_second(self) -> tuple[dict[str, Any], str]:
        """Where the second, a module, is kept: a table of children and its name there."""
        return next(
            (owner._modules, name)
            for owner in self.caller.modules()
            for name, child in owner._modules.items()
            if child is self.second
        )


class Neighbours:
    """The neighbours that the forwards of a model show.

    Args:
        model: dense, or lowered in part.
        layers: whose neighbours will be asked for.
        trace: whether forwards may be traced, which runs them once. Graphs need no tracing.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[nn.Module], *, trace: bool = True
    ) -> None:
        self._trace = trace
        self._owners: dict[nn.Module, list[nn.Module]] = defaultdict(list)
        for module in model.modules():
            for child in module._modules.values():
                if child is not None:
                    self._owners[child].append(module)
        self._unclear: dict[nn.Module, str] = {}
        self._graphs: dict[nn.Module, list[fx.Graph]] = {}
        self._callers = {layer: self._caller(layer) for layer in layers}

    def _caller(self, layer: nn.Module) -> nn.Module | None:
        """The module whose forward is expected to call a layer: past those that have none."""
        owners = self._owners[layer]
        while len(owners) == 1 and _has_no_forward(owners[0]):
            owners = self._owners[owners[0]]
        return owners[0] if len(owners) == 1 else None

    def caller(self, layer: nn.Module) -> nn.Module | None:
        """The module whose forward is expected to call one of the layers, if there is only one."""
        return self._callers.get(layer)

    def after(self, first: nn.Module, layer: nn.Module) -> Neighbour | None:
        """What reads `first`, a layer or what stands behind it; both have the same caller."""
        caller = self._callers.get(layer)
        if caller is None or SITES in caller.__dict__ or touched(first):
            return None
        if not self._promising(caller, layer):
            return None
        modules = dict(caller.named_modules(remove_duplicate=False))
        found: set[Any] = set()
        for graph in self._shallow(caller):
            second: Any = followed_by_module(graph, modules, first)
            known = is_norm(second) or type(second) is nn.Identity
            if isinstance(caller, fx.GraphModule) and not known:
                second = follower(graph, modules, first)  # the node can go, whoever else calls it
            found.add(second)
        if len(found) != 1 or None in found:
            return None
        second = found.pop()
        if isinstance(second, nn.Module) and (len(self._owners[second]) != 1 or touched(second)):
            return None
        return Neighbour(caller, first, second)

    def inside(self, pair: Neighbour) -> list[Neighbour]:
        """The activation of a batch norm that has one, behind the layer it was folded into.

        Args:
            pair: a layer and such a batch norm, in whose place `left_by` stands now.
        """
        norm: Any = pair.second
        drop, act = norm.drop, norm.act
        alone = len(self._owners[act]) == 1 and not touched(drop) and not touched(act)
        if type(drop) is not nn.Identity or module_activation(act) is None or not alone:
            return []
        return [Neighbour(pair.caller, pair.first, act)]

    def _promising(self, caller: nn.Module, layer: nn.Module) -> bool:
        """Whether a foreign forward is worth tracing: something there could join the layer."""
        if isinstance(caller, fx.GraphModule):
            return True
        if not self._trace:
            return False
        foldable = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))
        return any(
            (foldable and is_norm(module)) or module_activation(module) is not None
            for child in caller.children()
            for module in (child.modules() if _has_no_forward(child) else [child])
        )

    def unclear(self, layer: nn.Module) -> str | None:
        """Why the forward that calls a layer shows nothing, if it was looked at in vain."""
        caller = self._callers.get(layer)
        return None if caller is None else self._unclear.get(caller)

    def _shallow(self, caller: nn.Module) -> list[fx.Graph]:
        if isinstance(caller, fx.GraphModule):
            return [caller.graph]  # as it is now
        if caller not in self._graphs:
            try:
                self._graphs[caller] = shallow_graphs(caller)
            except Untraceable as error:
                self._graphs[caller] = []
                self._unclear[caller] = str(error)
        return self._graphs[caller]


def _has_no_forward(module: nn.Module) -> bool:
    """Lists, dictionaries, and the plain modules that keep the names of a graph."""
    return getattr(type(module), "forward", None) is nn.Module.forward


def activation_of(neighbour: Neighbour) -> str | None:
    """The activation that stands second, in the words of `linear_nm`, or None."""
    second = neighbour.second
    if isinstance(second, nn.Module):
        return module_activation(second)
    modules = dict(neighbour.caller.named_modules(remove_duplicate=False))
    inputs = second.all_input_nodes
    return activation(second, inputs[0], modules) if inputs else None


class Witness:
    """Watches neighbours while a model runs: a context manager.

    Args:
        neighbours: pairs of modules.
    """

    def __init__(self, neighbours: Iterable[Neighbour]) -> None:
        self._pairs = [n for n in neighbours if isinstance(n.second, nn.Module)]
        self._output: dict[nn.Module, Tensor | None] = {}
        # Of each pair, how often the first left, the second was entered, and that met the first's.
        self._counts = [[0, 0, 0] for _ in self._pairs]
        self._dims: list[set[int]] = [set() for _ in self._pairs]
        self._handles: list[Any] = []

    def __enter__(self) -> Witness:
        for number, pair in enumerate(self._pairs):
            self._handles += self._watch(number, pair)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._output.clear()

    def _watch(self, number: int, pair: Neighbour) -> Iterator[Any]:
        first, second, counts = pair.first, pair.second, self._counts[number]
        assert isinstance(second, nn.Module)

        def left(module: nn.Module, inputs: Any, output: Any) -> None:
            counts[0] += 1
            self._output[first] = output
            self._dims[number].add(output.ndim if isinstance(output, Tensor) else -1)

        def entered(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            counts[1] += 1
            counts[2] += bool(inputs) and inputs[0] is self._output.get(first)

        yield first.register_forward_hook(left)
        yield second.register_forward_pre_hook(entered)

    def dims(self, neighbour: Neighbour) -> set[int]:
        """How many dimensions what the first returned had."""
        return self._dims[self._pairs.index(neighbour)]

    def saw(self, neighbour: Neighbour) -> bool:
        """Whether both ran, and only one after the other."""
        if neighbour not in self._pairs:
            return isinstance(neighbour.caller, fx.GraphModule)
        left, entered, met = self._counts[self._pairs.index(neighbour)]
        return left == entered == met > 0
