"""How others find an N:M mask and apply it, along the last dimension of a 2-D weight.

Each is written here from its formula or documentation, and called as its users call it: mask, then
`weight * mask`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

Peer = Callable[[], Tensor]


def paper(weight: Tensor, n: int, m: int) -> Peer:
    """SR-STE's method: argsort of every group, zeros scattered to the M - N smallest."""

    def call() -> Tensor:
        groups = weight.abs().reshape(-1, m)
        smallest = torch.argsort(groups, dim=1)[:, : m - n]
        mask = torch.ones_like(groups).scatter_(1, smallest, 0.0)
        return weight * mask.reshape(weight.shape)

    return call


def topk(weight: Tensor, n: int, m: int) -> Peer:
    """Ones scattered to the N largest."""

    def call() -> Tensor:
        groups = weight.abs().reshape(-1, m)
        largest = groups.topk(n, dim=1, sorted=False).indices
        mask = torch.zeros_like(groups).scatter_(1, largest, 1.0)
        return weight * mask.reshape(weight.shape)

    return call


def two_argsorts(weight: Tensor, n: int, m: int) -> Peer:
    """The rank of every element as the argsort of the argsort."""

    def call() -> Tensor:
        groups = weight.abs().reshape(-1, m)
        ranks = groups.argsort(dim=1, descending=True).argsort(dim=1)
        return weight * (ranks < n).reshape(weight.shape)

    return call


def patterns_matmul(weight: Tensor, n: int, m: int) -> Peer | None:
    """ASP's m4n2_1d, which is also ModelOpt's create_asp_mask: the best of all possible patterns.

    The magnitudes of each group times every pattern, one product of matrices. None where there are
    too many patterns (8:16 has 12,870).
    """
    rows = [
        [1.0 if i in kept else 0.0 for i in range(m)]
        for kept in map(set, itertools.combinations(range(m), n))
    ]
    if len(rows) > 100:
        return None
    patterns = torch.tensor(rows)

    def call() -> Tensor:
        best = (weight.abs().reshape(-1, m) @ patterns.t()).argmax(dim=1)
        return weight * patterns[best].reshape(weight.shape)

    return call


def torch_pruning(weight: Tensor, n: int, m: int) -> Peer:
    """torch.ao.pruning.WeightNormSparsifier with blocks of 1 x M, as its documentation says."""
    from torch.ao.pruning import WeightNormSparsifier

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    sparsifier = WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n
    )
    sparsifier.prepare(layer, [{"tensor_fqn": "weight"}])

    def call() -> Tensor:
        with torch.no_grad():
            sparsifier.step()
            return layer.weight  # a parametrization: computed here

    return call


PEERS = {
    "paper: argsort, scatter": paper,
    "topk, scatter": topk,
    "two argsorts": two_argsorts,
    "ASP, ModelOpt: patterns": patterns_matmul,
    "torch.ao.pruning": torch_pruning,
}
