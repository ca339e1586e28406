"""Small models, each built around one thing that breaks weight-rewriting libraries."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm
from zoo_entry import HEAD, TIED, Entry, Inputs


class Recurrent(nn.Module):
    """A module that multiplies with its own weights, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.project = nn.Linear(32, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 64)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.project(self.embed(ids)))
        return self.head(hidden)


class Products(nn.Module):
    """Cells and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(32, 16)
        self.pair = nn.Bilinear(16, 32, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(self.cell(self.cell(x).repeat(1, 2)), x))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.hidden = nn.Linear(32, 32)
        self.out = nn.Linear(32, 64, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(self.embed(ids))))


class TiedLinears(nn.Module):
    """Two modules, one parameter, and a third that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.alone = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alone(F.relu(self.second(F.relu(self.first(x))))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.linear = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(self.conv(x)))
        return self.head(self.linear(F.relu(self.linear(x))))


class SharedBlock(nn.Module):
    """One module object under two names (ALBERT): called twice, but nothing is tied."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(32, 32)
        self.blocks = nn.ModuleList([block, block])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x))
        return self.head(x)


class ControlFlow(nn.Module):
    """The data chooses the branch; the other branch gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Linear(32, 32)
        self.negative = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.positive if x.sum() > 0 else self.negative
        return self.head(branch(x))


class Functional(nn.Module):
    """A weight that only `F.linear` knows: no linear module, so only a graph can show it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32))
        self.bias = nn.Parameter(torch.randn(16))
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(F.linear(x, self.weight, self.bias)))


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_normed = parametrizations.weight_norm(nn.Linear(32, 32))
        self.spectral = parametrizations.spectral_norm(nn.Linear(32, 32))
        self.plain = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.spectral(self.weight_normed(x))))


class LegacyWeightNorm(nn.Module):
    """`weight` is recomputed by a pre-forward hook and is no parameter at all."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still all over
            self.normed = weight_norm(nn.Linear(32, 32))
        self.plain = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.normed(x)))


class ScaledLinear(nn.Linear):
    """A subclass with state of its own and a forward that calls its parent's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class ParentRead(nn.Module):
    """Uses a projection's weight outside its module, as its source shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.inner(x)), self.inner.weight.square().sum()


def penalty(module: nn.Linear) -> Tensor:
    return module.weight.square().sum()


class RawRead(ParentRead):
    """In a function, where no mask reaches: only running it shows that."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.inner(x)), penalty(self.inner)


def ids() -> Tensor:
    return torch.randint(0, 64, (2, 8))


def rows() -> Tensor:
    return torch.randn(4, 32)


def recurrent() -> tuple[nn.Module, Inputs]:
    return Recurrent(), (ids(),)


def tied_embedding() -> tuple[nn.Module, Inputs]:
    return TiedEmbedding(), (ids(),)


def tied_linears() -> tuple[nn.Module, Inputs]:
    return TiedLinears(), (rows(),)


def twice() -> tuple[nn.Module, Inputs]:
    return Twice(), (torch.randn(2, 8, 32),)


def shared_block() -> tuple[nn.Module, Inputs]:
    return SharedBlock(), (rows(),)


def control_flow() -> tuple[nn.Module, Inputs]:
    return ControlFlow(), (rows(),)


def functional() -> tuple[nn.Module, Inputs]:
    return Functional(), (rows(),)


def functional_graph() -> tuple[nn.Module, Inputs]:
    return fx.symbolic_trace(Functional()), (rows(),)


def parametrized() -> tuple[nn.Module, Inputs]:
    return Parametrized(), (rows(),)


def legacy_weight_norm() -> tuple[nn.Module, Inputs]:
    return LegacyWeightNorm(), (rows(),)


def bare_linear() -> tuple[nn.Module, Inputs]:
    return nn.Linear(32, 32), (rows(),)


def subclasses() -> tuple[nn.Module, Inputs]:
    model = nn.Sequential(ScaledLinear(32, 32), nn.ReLU(), ScaledLinear(32, 10))
    return model, (rows(),)


def bfloat16() -> tuple[nn.Module, Inputs]:
    """16-bit weights tie often, so this one also shows the tie rule."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 10))
    return model.bfloat16(), (rows().bfloat16(),)


def products() -> tuple[nn.Module, Inputs]:
    return Products(), (rows(),)


def parent_read() -> tuple[nn.Module, Inputs]:
    return ParentRead(), (rows(),)


def raw_read() -> tuple[nn.Module, Inputs]:
    return RawRead(), (rows(),)


ONLY_HEAD = {"head.weight": HEAD}
ODD_MODELS = {
    "recurrent": Entry(recurrent, ONLY_HEAD),
    "products": Entry(products, ONLY_HEAD),
    "tied_embedding": Entry(tied_embedding, {"out.weight": TIED}),
    "tied_linears": Entry(tied_linears, {"first.weight": TIED, "second.weight": TIED, **ONLY_HEAD}),
    "twice": Entry(twice, ONLY_HEAD),
    "shared_block": Entry(shared_block, ONLY_HEAD),
    "control_flow": Entry(control_flow, ONLY_HEAD),
    "functional": Entry(functional, ONLY_HEAD),
    "functional_graph": Entry(functional_graph, ONLY_HEAD, functional={"weight": 1}),
    "parametrized": Entry(
        parametrized,
        {"weight_normed.weight": "parametriz", "spectral.weight": "parametriz", **ONLY_HEAD},
    ),
    "legacy_weight_norm": Entry(legacy_weight_norm, {"normed.weight": "weight_norm", **ONLY_HEAD}),
    "bare_linear": Entry(bare_linear),
    "subclasses": Entry(subclasses, {"2.weight": HEAD}),
    "bfloat16": Entry(bfloat16, {"3.weight": HEAD}),
    "parent_read": Entry(parent_read, ONLY_HEAD),
    # The penalty is meant for the raw weight or for the masked one: only the author knows.
    "raw_read": Entry(raw_read, ONLY_HEAD, findings={"inner.weight": {"aten::pow"}}),
}
