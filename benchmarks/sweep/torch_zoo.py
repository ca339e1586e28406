"""torch.nn's own layers and containers, alone and in small models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from sweep.case import Case, Inputs

WIDTH = 32


class Recurrent(nn.Module):
    """Tokens, a recurrent layer, a head."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.layer = layer
        self.head = nn.Linear(width, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens))[0])


class Cells(nn.Module):
    """A cell called once per position."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.cell = cell
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for i in range(x.shape[1]):
            state = self.cell(self.inner(x[:, i]), state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Translation(nn.Module):
    """An encoder-decoder translation Transformer, with the decoder's embedding as its head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(60, WIDTH), nn.Embedding(60, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.body = nn.Transformer(WIDTH, 4, 2, 2, 2 * WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 60)
        if tied:
            self.head.weight = self.target.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        length = target.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        source = self.source(source) + self.positions[:, : source.shape[1]]
        target = self.target(target) + self.positions[:, :length]
        return self.head(self.body(source, target, tgt_mask=mask))


class Softmax(nn.Module):
    """An adaptive softmax above two linear layers; returns log-probabilities and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.loss = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 40, [8, 24], div_value=2.0)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.inner(x)
        return self.loss.log_prob(inner), self.loss(inner, target).loss


class Bag(nn.Module):
    """An embedding bag below linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, WIDTH, mode="mean")
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.bag(tokens))


class Pair(nn.Module):
    """A bilinear layer of two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.join = nn.Bilinear(16, 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


class Attention(nn.Module):
    """Self-attention with a head."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **fields)
        self.key = nn.Linear(WIDTH, fields.get("kdim", WIDTH))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        other = self.key(x)
        return self.head(self.attention(x, other, other)[0])


def _tokens(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape)


def _x(*shape: int) -> Tensor:
    return torch.randn(shape)


def _conv(kind: Any, *size: int, **fields: Any) -> tuple[nn.Module, Inputs]:
    body = nn.Sequential(kind(16, 32, 3, padding=1, **fields), nn.ReLU(), kind(32, 16, 3))
    return body, (_x(2, 16, *size),)


def _layer(kind: Any, **fields: Any) -> nn.Module:
    return kind(WIDTH, 4, 2 * WIDTH, batch_first=True, **fields)


def _encoder(**fields: Any) -> nn.Module:
    return nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer, **fields), 2)


def _norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.PReLU(16),
        nn.Conv2d(16, 16, 3, padding_mode="circular", padding=1),
        nn.InstanceNorm2d(16, affine=True),
        nn.PixelShuffle(2),
        nn.Conv2d(4, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 8),
    )


def _lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.ReLU(), nn.LazyLinear(8))
    model(_x(2, WIDTH))
    return model


def _normed(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        how(nn.Linear(WIDTH, WIDTH)), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
    )


def _one(build: Callable[[], nn.Module], *shape: int) -> Callable[[], tuple[nn.Module, Inputs]]:
    return lambda: (build(), (_x(*shape),))


def _recurrent(kind: Any, **fields: Any) -> Callable[[], tuple[nn.Module, Inputs]]:
    width = fields.get("proj_size", 0) or WIDTH
    width *= 2 if fields.get("bidirectional") else 1
    layer = lambda: kind(WIDTH, WIDTH, batch_first=True, **fields)  # noqa: E731
    return lambda: (Recurrent(layer(), width), (_tokens(2, 6),))


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "Linear": _one(lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, 8)), 4, 32),
    "Conv1d": lambda: _conv(nn.Conv1d, 9),
    "Conv2d": lambda: _conv(nn.Conv2d, 9, 9),
    "Conv2d_groups": lambda: _conv(nn.Conv2d, 9, 9, groups=4),
    "Conv3d": lambda: _conv(nn.Conv3d, 5, 5, 5),
    "ConvTranspose1d": lambda: _conv(nn.ConvTranspose1d, 9),
    "ConvTranspose2d": lambda: _conv(nn.ConvTranspose2d, 9, 9),
    "ConvTranspose2d_groups": lambda: _conv(nn.ConvTranspose2d, 9, 9, groups=2),
    "ConvTranspose3d": lambda: _conv(nn.ConvTranspose3d, 4, 4, 4),
    "norms_and_shuffle": _one(_norms, 2, 16, 8, 8),
    "RNN": _recurrent(nn.RNN),
    "LSTM": _recurrent(nn.LSTM),
    "LSTM_two_layers_both_ways": _recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "LSTM_projected": _recurrent(nn.LSTM, proj_size=16),
    "GRU": _recurrent(nn.GRU),
    "GRU_dropout": _recurrent(nn.GRU, num_layers=2, dropout=0.2),
    "RNNCell": _one(lambda: Cells(nn.RNNCell(WIDTH, WIDTH)), 2, 5, WIDTH),
    "LSTMCell": _one(lambda: Cells(nn.LSTMCell(WIDTH, WIDTH)), 2, 5, WIDTH),
    "GRUCell": _one(lambda: Cells(nn.GRUCell(WIDTH, WIDTH)), 2, 5, WIDTH),
    "Bilinear": _one(Pair, 4, WIDTH),
    "EmbeddingBag": lambda: (Bag(), (_tokens(4, 6),)),
    "AdaptiveLogSoftmaxWithLoss": lambda: (Softmax(), (_x(6, WIDTH), torch.randint(0, 40, (6,)))),
    "MultiheadAttention": _one(Attention, 2, 6, WIDTH),
    "MultiheadAttention_kdim": _one(lambda: Attention(kdim=24, vdim=24), 2, 6, WIDTH),
    "MultiheadAttention_bias_kv": _one(
        lambda: Attention(add_bias_kv=True, add_zero_attn=True), 2, 6, WIDTH
    ),
    "TransformerEncoderLayer": _one(lambda: _layer(nn.TransformerEncoderLayer), 2, 6, WIDTH),
    "TransformerEncoder": _one(_encoder, 2, 6, WIDTH),
    "TransformerEncoder_norm_first": _one(
        lambda: _encoder(norm_first=True, activation="gelu"), 2, 6, WIDTH
    ),
    "TransformerDecoder": lambda: (
        nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer), 2),
        (_x(2, 6, WIDTH), _x(2, 5, WIDTH)),
    ),
    "Transformer": lambda: (
        nn.Transformer(WIDTH, 4, 2, 2, 64, batch_first=True),
        (_x(2, 6, WIDTH), _x(2, 5, WIDTH)),
    ),
    "translation": lambda: (Translation(tied=False), (_tokens(2, 7), _tokens(2, 6))),
    "translation_tied": lambda: (Translation(tied=True), (_tokens(2, 7), _tokens(2, 6))),
    "LazyLinear": _one(_lazy, 4, WIDTH),
    "weight_norm": _one(lambda: _normed(nn.utils.parametrizations.weight_norm), 4, WIDTH),
    "spectral_norm": _one(lambda: _normed(nn.utils.parametrizations.spectral_norm), 4, WIDTH),
    "old_spectral_norm": _one(lambda: _normed(nn.utils.spectral_norm), 4, WIDTH),
    "orthogonal": _one(lambda: _normed(nn.utils.parametrizations.orthogonal), 4, WIDTH),
    "pruned": _one(
        lambda: _normed(lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.3)),
        4,
        WIDTH,
    ),
}


def names() -> list[str]:
    """All entries."""
    return list(MODELS)


def build(name: str, recipe: str = "") -> Case:
    """One entry; raises whatever its construction does."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    case = Case(model.eval(), inputs, recipe="torch.nn")
    try:
        copy.deepcopy(model)
    except RuntimeError:  # old-style norms and prune keep a non-leaf tensor
        case.again = lambda: MODELS[name]()[0]
    return case
