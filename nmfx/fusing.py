"""What `lower` joins: batch norms into convolutions, activations into packed layers.

A convolution, its batch norm and a ReLU become one packed convolution with a bias that applies the
ReLU itself. `capture/neighbours.py` proves that they may, `capture/fold_norm.py` and
`capture/fuse_activation.py` do it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import fx, nn

from .calls import kept_random_state
from .capture.candidates import Candidate
from .capture.fold_norm import NormFolding
from .capture.fuse_activation import ActivationFusing
from .capture.lowering import Target
from .capture.neighbours import Neighbour, Neighbours, Witness, activation_of, has_act, is_norm


class Fusing:
    """Finds what stands behind the layers of a model, and joins what may be joined.

    Args:
        model: whose `candidates` may be lowered; nothing is changed yet.
        examples: whether inputs will run under `witness`: without, only graphs prove anything.

    Attributes:
        witness: to be active while the example inputs run; what it does not see is not joined.
    """

    def __init__(
        self, model: nn.Module, candidates: Iterable[Candidate], *, examples: bool
    ) -> None:
        leaves = {c.name: c.host for c in candidates if c.capture == "leaf"}
        self._names = {module: name for name, module in model.named_modules()}
        self._training = {module for module in model.modules() if module.training}
        self._model, self._neighbours = model, Neighbours(model, leaves.values(), trace=examples)
        with kept_random_state():  # tracing runs forwards
            self._chains = {name: _chain(self._neighbours, layer) for name, layer in leaves.items()}
        self._remarks: dict[str, list[str]] = {}
        self._folded: set[nn.Module | fx.Node] = set()
        self._norms, self._activations = NormFolding(), ActivationFusing()
        self.witness = Witness(pair for chain in self._chains.values() for pair in chain)

    def fold_norms(self, targets: Iterable[Target]) -> None:
        """Folds batch norms into dense layers of a model; `undo` leaves them so."""
        for target in targets:
            c = target.candidate
            if c.capture == "graph":
                why = self._norms.fold_graph(target)
                if why is not None:
                    self._remark(target, f"batch norm stays: {why}" if why else "batch norm folded")
            elif c.name in self._chains:
                chain = itertools.takewhile(self.witness.saw, self._chains[c.name])
                self._chains[c.name] = list(chain)
                self._fold_module(target)

    def _fold_module(self, target: Target) -> None:
        name, layer = target.candidate.name, target.candidate.host
        found = self._chains[name]
        norm = found[0].second if found else None
        if not is_norm(norm):
            unclear = self._neighbours.unclear(layer)
            if unclear is not None and target.candidate.kind == "conv":
                self._remark(target, f"what follows it is not known: {unclear}")
            return
        assert isinstance(norm, nn.Module)
        dims = self.witness.dims(found[0])
        why = self._norms.fold_module(target, found[0], norm in self._training, dims)
        text = self._names[norm]
        if text.replace(".", "").isdigit():  # in an nn.Sequential: "1 folded in" reads as a count
            text = f"batch norm {text}"
        if why is None:
            self._folded.add(norm)
            self._remark(target, f"{text} folded in")
            if has_act(norm):
                self._chains[name] = [found[0], *self._neighbours.inside(found[0])]
        else:
            self._remark(target, f"{text} stays: {why}")
            self._chains[name] = []

    def fuse_activations(self, targets: Iterable[Target]) -> None:
        """Moves activations into layers that are packed."""
        targets = list(targets)
        self._read_graphs_again()
        for target in targets:
            c, name = target.candidate, None
            if c.capture == "graph":
                name = self._activations.fuse_graph(target)
            elif c.name in self._chains:
                chain = self._chains[c.name]
                between = [pair.second for pair in chain[:-1]]
                if chain and all(type(m) is nn.Identity or m in self._folded for m in between):
                    name = self._activations.fuse_module(target, c.host, chain[-1])
            if name is not None:
                self._remark(target, f"{name} fused")

    def _read_graphs_again(self) -> None:
        """Their nodes are others since layers were replaced, and batch norms became identities."""
        layers = {
            name: chain[0].first
            for name, chain in self._chains.items()
            if chain and isinstance(chain[-1].caller, fx.GraphModule)
        }
        neighbours = Neighbours(self._model, layers.values())
        self._chains |= {name: _chain(neighbours, layer) for name, layer in layers.items()}

    def undo(self) -> None:
        """Takes back all activations, and a batch norm that was not folded completely."""
        self._activations.undo()
        self._norms.take_back()
        for remarks in self._remarks.values():
            remarks[:] = [text for text in remarks if not text.endswith(" fused")]

    def remarks(self, target: Target) -> list[str]:
        """What was joined with a layer, and what was not, for the report."""
        return self._remarks.get(target.candidate.name, [])

    def _remark(self, target: Target, text: str) -> None:
        self._remarks.setdefault(target.candidate.name, []).append(text)


def _chain(neighbours: Neighbours, layer: nn.Module) -> list[Neighbour]:
    """What stands behind a layer: at most one batch norm and one activation."""
    chain = []
    pair = neighbours.after(layer, layer)
    if pair is not None and (is_norm(pair.second) or type(pair.second) is nn.Identity):
        chain.append(pair)
        assert isinstance(pair.second, nn.Module)
        if has_act(pair.second):
            return chain  # what reads it stands behind its own activation
        pair = neighbours.after(pair.second, layer)
    if pair is not None and activation_of(pair) is not None:
        chain.append(pair)
    return chain
