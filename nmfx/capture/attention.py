"""nn.MultiheadAttention on lowered projections: torch's attention around nmfx's products.

    in_proj_weight      in_proj_weight_values, _index     linear_nm, whole or by blocks of rows
    q_, k_, v_proj_weight                                 the same
    out_proj            a lowered linear layer            its own forward, as torch calls none

`F.multi_head_attention_forward` runs with its three helpers that multiply by a weight replaced, so
masks, biases, dropout and the softmax stay torch's, whatever its version. torch's fused paths,
which read dense weights, are left out: `lower` times the whole model with and without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear_nm import linear_nm
from ..packing import BLOCK
from .forms import packed_names
from .generate import base_class, generated_class
from .packed import dense_property
from .renamed import with_helpers
from .site import Site

IN_PROJ = "in_proj_weight"
OUT_PROJ = "out_proj.weight"

Project = Callable[..., Any]
Part = tuple[int, int]  # of the rows of `in_proj_weight`: from, to


def in_projection_parts(query: Any, key: Any, value: Any, size: int) -> list[tuple[Any, Part]]:
    """The products that make q, k and v, as torch splits them: (input, rows of the weight).

    Args:
        query, key, value: which of them are the same object decides.
        size: `embed_dim`.
    """
    if key is not value:
        return [(x, (i * size, (i + 1) * size)) for i, x in enumerate((query, key, value))]
    if query is not key:
        return [(query, (0, size)), (key, (size, 3 * size))]
    return [(query, (0, 3 * size))]


def why_not_lowered(module: nn.Module, path: str) -> str | None:
    """Why a weight of an nn.MultiheadAttention cannot be lowered, or None.

    Args:
        module: with its class or a generated one.
        path: of the weight, below it.
    """
    base = base_class(module)
    if base.forward is not nn.MultiheadAttention.forward or "forward" in module.__dict__:
        return f"{base.__name__} has a forward of its own"
    out_proj = module._modules.get("out_proj")
    if out_proj is None:
        return "it has no out_proj"
    if base_class(out_proj).forward is not nn.Linear.forward or "forward" in out_proj.__dict__:
        return f"its out_proj is a {base_class(out_proj).__name__}"
    if not _HELPERS.keys() <= set(_TORCH.__code__.co_names):
        return f"torch {torch.__version__} computes attention in a way that nmfx does not know"
    size: Any = module.embed_dim
    if path == IN_PROJ and size % BLOCK:
        return f"its parts of embed_dim={size} rows do not fill packed blocks of {BLOCK}"
    return None


def attention_class(module: nn.Module, sites: Sequence[Site]) -> type[nn.Module]:
    """The class that runs an nn.MultiheadAttention with packed input projections.

    Args:
        module: `why_not_lowered` found nothing.
        sites: of its own parameters, all packed; none if only `out_proj` is lowered.
    """
    base = base_class(module)
    packed = {site.path: site for site in sites}

    def linear(self: Any, path: str, x: Tensor, bias: Tensor | None, part: Part) -> Tensor:
        start, stop = part
        if path not in packed:
            return F.linear(x, getattr(self, path)[start:stop], bias)
        site = packed[path]
        values, index = (getattr(self, name) for name in packed_names(path))
        if part != (0, site.shape[0]):
            blocks = slice(start // BLOCK, stop // BLOCK)
            values, index = values[blocks], index[blocks]
        n, m = site.pattern.n, site.pattern.m
        return linear_nm(x, values, index, bias, stop - start, site.shape[1], n, m)

    def attend(
        self: Any, query: Any, key: Any, value: Any, kept: Tensor | None, **rest: Any
    ) -> Any:
        size = self.embed_dim

        def project(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> list[Tensor]:
            made: list[Tensor] = []
            for x, part in in_projection_parts(query, key, value, size):
                of_part = None if bias is None else bias[slice(*part)]
                y = _on_rows(functools.partial(linear, self, IN_PROJ), x, kept, of_part, part)
                count = (part[1] - part[0]) // size
                # As torch does: several at once lie beside one another, and are moved apart.
                made += [y] if count == 1 else _apart(y, count)
            return made

        def single(path: str) -> Project:
            return lambda x, bias: linear(self, path, x, bias, (0, size))

        separate = {
            f"{name}_proj_weight": single(f"{name}_proj_weight")
            for name in ("qkv" if not self._qkv_same_embed_dim else "")
        }
        return _ATTENTION(
            query,
            key,
            value,
            size,
            self.num_heads,
            project,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            functools.partial(_on_rows, self.out_proj.forward, kept=kept),
            None,
            training=self.training,
            use_separate_proj_weight=bool(separate),
            **separate,
            **rest,
        )

    @functools.wraps(base.forward)
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        rest = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            alone = query is key and key is value and self.batch_first
            if masked or need_weights or not alone:  # torch takes it with dense weights, or refuses
                return base.forward(self, query, key, value, **rest)
            x, padding = _padded(query)
            rest["key_padding_mask"], x = padding, x.transpose(1, 0)
            kept = padding.t().flatten().logical_not().nonzero().squeeze(1)
            y = attend(self, x, x, x, kept, **rest)[0].transpose(1, 0)
            parts = [row[~beyond] for row, beyond in zip(y, padding, strict=True)]
            return torch.nested.as_nested_tensor(parts), None
        turned = self.batch_first and query.dim() == 3
        if turned:
            query, key, value = _turned(query, key, value)
        y, weights = attend(self, query, key, value, None, **rest)
        return (y.transpose(1, 0) if turned else y), weights

    key = "attention", tuple((site.path, site.shape, site.pattern) for site in sites)
    members: dict[str, Any] = {path: dense_property(site) for path, site in packed.items()}
    return generated_class(base, key, lambda: forward, **members)


def _turned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All with the sequence first; what is one object stays one."""
    turned = query.transpose(1, 0)
    other = turned if key is query else key.transpose(1, 0)
    return turned, other, other if value is key else value.transpose(1, 0)


def _apart(y: Tensor, count: int) -> list[Tensor]:
    parts = y.unflatten(-1, (count, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2)
    return list(parts.contiguous().unbind())


def _on_rows(call: Project, x: Tensor, kept: Tensor | None, *rest: Any) -> Tensor:
    """`call(x, *rest)`, of the vectors `kept` alone; zeros for the others."""
    if kept is None:
        return call(x, *rest)
    rows = x.reshape(-1, x.shape[-1])
    y = call(rows[kept], *rest)
    made = y.new_zeros(len(rows), y.shape[-1]).index_copy(0, kept, y)
    return made.view(*x.shape[:-1], -1)


def _padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, longest, features) of a nested tensor, and where there is nothing in it."""
    lengths = torch.tensor([len(part) for part in nested.unbind()], device=nested.device)
    padded = nested.to_padded_tensor(0.0)
    return padded, torch.arange(padded.shape[1], device=nested.device) >= lengths[:, None]


# --- torch's function, with other helpers -------------------------------------------------------

_TORCH: Any = F.multi_head_attention_forward


def _in_projection_packed(
    q: Tensor, k: Tensor, v: Tensor, w: Project, b: Tensor | None
) -> list[Tensor]:
    return w(q, k, v, b)


def _in_projection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Project,
    w_k: Project,
    w_v: Project,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return w_q(q, b_q), w_k(k, b_k), w_v(v, b_v)


def _linear(x: Tensor, w: Project, b: None) -> Tensor:
    return w(x)


def _check_key_padding_mask(mask: Tensor, keys: int, batch: int) -> None:
    if mask.shape != (batch, keys):  # torch's message is a closure, which Dynamo does not take
        raise AssertionError(f"key_padding_mask has shape {tuple(mask.shape)}, not {(batch, keys)}")


_HELPERS = {
    "linear": _linear,
    "_in_projection_packed": _in_projection_packed,
    "_in_projection": _in_projection,
}


_ATTENTION = with_helpers(
    _TORCH,
    **_HELPERS,
    _check_key_padding_mask=_check_key_padding_mask,
    has_torch_function=lambda tensors: False,
)
