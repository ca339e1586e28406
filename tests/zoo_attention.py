"""torch's own attention modules, whose evaluation fast paths read the weights behind `forward`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo_entry import HEAD, Entry, Inputs


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x + attended)


class CrossAttention(nn.Module):
    """Separate q, k and v projections (kdim, vdim), sequence first, attention weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, kdim=16, vdim=24, add_bias_kv=True)
        self.head = nn.Linear(32, 10)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        attended, weights = self.attention(query, key, value)
        return self.head(attended), weights


class PaddedEncoder(nn.Module):
    """With padding, torch's fast path runs on nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        encoded = self.encoder(x, src_key_padding_mask=padding)
        # The fast path returns zeros at padding, the ordinary path whatever attention gives.
        return self.head(encoded).masked_fill(padding.unsqueeze(-1), 0.0)


def transformer() -> tuple[nn.Module, Inputs]:
    model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
    return model, (torch.randn(2, 8, 32), torch.randn(2, 6, 32))


def encoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 8, 32),)


def encoder_pre_norm() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 1, nn.LayerNorm(32), enable_nested_tensor=False)
    return model, (torch.randn(2, 8, 32),)


def encoder_padded() -> tuple[nn.Module, Inputs]:
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 5:] = True
    return PaddedEncoder(), (torch.randn(2, 8, 32), padding)


def self_attention() -> tuple[nn.Module, Inputs]:
    return SelfAttention(), (torch.randn(2, 8, 32),)


def cross_attention() -> tuple[nn.Module, Inputs]:
    return CrossAttention(), (torch.randn(6, 2, 32), torch.randn(8, 2, 16), torch.randn(8, 2, 24))


# The bare encoders and the bare transformer have no head of their own: the policy takes the last
# linear of the last block for it.
ATTENTION_MODELS = {
    "transformer": Entry(transformer, {"decoder.layers.0.linear2.weight": HEAD}),
    "encoder": Entry(encoder, {"layers.1.linear2.weight": HEAD}),
    "encoder_pre_norm": Entry(encoder_pre_norm, {"layers.0.linear2.weight": HEAD}),
    "encoder_padded": Entry(encoder_padded, {"head.weight": HEAD}),
    "self_attention": Entry(self_attention, {"head.weight": HEAD}),
    "cross_attention": Entry(cross_attention, {"head.weight": HEAD}),
}
