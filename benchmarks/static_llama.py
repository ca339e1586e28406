"""A Llama with a static key-value cache, in plain torch: for CUDA graphs and torch.compile.

A prompt attends to itself and fills the cache. One token is written at its position and attends to
the whole cache, so a step at the last position is a step against a full cache, whatever ran before.
No shape depends on a position, and nothing waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Of a model; the defaults are Llama-3.2-1B's but for the vocabulary, which is smaller."""

    width: int = 2048
    inner: int = 8192
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 8192


TINY = Size(width=64, inner=128, layers=2, heads=4, kv_heads=2, vocab=64)


class StaticLlama(nn.Module):
    """Random weights, and a cache of random keys and values.

    Args:
        size: of the model.
        batch: sequences.
        length: tokens that the cache holds.
    """

    def __init__(self, size: Size, batch: int, length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocab, size.width)
        self.layers = nn.ModuleList(_Layer(size, batch, length) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-5)
        self.lm_head = nn.Linear(size.width, size.vocab, bias=False)
        cos, sin = _rotary(size.width // size.heads, length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The logits of the last token (batch, vocab); positions are those of all tokens."""
        x = self.embed_tokens(tokens)
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        for layer in self.layers:
            x = layer(x, cos, sin, positions)
        return self.lm_head(self.norm(x[:, -1]))


class _Layer(nn.Module):
    def __init__(self, size: Size, batch: int, length: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size.width, eps=1e-5)
        self.self_attn = _Attention(size, batch, length)
        self.post_attention_layernorm = nn.RMSNorm(size.width, eps=1e-5)
        self.mlp = _MLP(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    def __init__(self, size: Size, batch: int, length: int) -> None:
        super().__init__()
        self.head = size.width // size.heads
        self.q_proj = nn.Linear(size.width, size.heads * self.head, bias=False)
        self.k_proj = nn.Linear(size.width, size.kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(size.width, size.kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(size.heads * self.head, size.width, bias=False)
        shape = batch, size.kv_heads, length, self.head
        self.register_buffer("keys", torch.randn(shape), persistent=False)
        self.register_buffer("values", torch.randn(shape), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        if x.shape[1] > 1:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            mixed = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.inner, bias=False)
        self.up_proj = nn.Linear(size.width, size.inner, bias=False)
        self.down_proj = nn.Linear(size.inner, size.width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _rotary(head: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head) of Llama 3's rotary embedding, its two halves alike."""
    frequencies = 500_000.0 ** -(torch.arange(0, head, 2, dtype=torch.float32) / head)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
