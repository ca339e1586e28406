"""Tiny configs from default ones, by the names and values of their fields.

Widths are divided by one factor throughout, so that what must be equal, a multiple or a sum stays
so; numbers of layers, experts, positions and words become small; ids of special tokens that fall
out of the small vocabulary move into it, equal ones to equal ids.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

VOCAB = 512
POSITIONS = 512
IMAGE = 256

_WIDTH = re.compile(
    r"hidden|_dim$|^dim$|dims$|_dim_|d_model|d_ff|d_kv|d_inner|d_head|d_embed|embd|embed|channels|"
    r"ffn|intermediate|rank$|filters|inner|^width$|_width$|units|state_size|head_size|proj_size|"
    r"input_size|output_size|bottleneck|feature_size|head_dim|key_size|value_size|classifier|"
    r"query_pre_attn"
)
_NO_WIDTH = re.compile(
    r"layer|depth|num_(?!.*(channels|filters))|kernel|window|image_|_heads|stride|dropout|prob|"
    r"codebook_size|max_|n_head|ratio|kv_channels_|vocab|embedding_size_per|std|chunk|expan|mult"
)
_HEADS = re.compile(r"(num|n)_(.*_)?heads?$|attention_heads$")
_HEAD_DIM = re.compile(r"head_dim|d_kv|rope_dim|dim_head|d_head")
# Fields that some classes leave unset although their model needs a number.
_UNSET = {
    "prediction_length": 8,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
_NO_WIDTHS = r"kernel|stride|layer|pool|ratio|scale"
_LAYERS = re.compile(
    r"^(num_hidden_layers|num_layers|n_layers?|depth|(en|de)coder_layers|num_blocks|n_blocks)$|"
    r"num_.*layers$|_layers$|num_.*blocks$|_depth$"
)
_NO_LAYERS = re.compile(r"_of_layers|feature|cross|global|_ids|exit|every|period|postnet|prenet")
_EXPERTS = re.compile(
    r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts|num_routed_experts)$"
)
_PER_TOKEN = re.compile(r"experts_per_tok|^(moe_|router_)?top_?k$|moe_k$|num_selected_experts")
_POSITIONS = re.compile(
    r"max_.*position|n_positions|max_seq|max_text_len|context_length|n_ctx|max_target|max_source"
)
_TOKEN = re.compile(r"(token_id|token_index|_id|_index|_token|_ids|_idx)$|^(eos|bos|pad)")


class Shrinker:
    """Shrinks a config and its sub-configs with one factor.

    Attributes:
        factor: that widths are divided by.
        layers: the most layers of a stack, where its pattern needs no more.
        image: the side of a square image where the patch size divides it, or None: as it is, up to
            `IMAGE`.
        heads: whether there are fewer attention heads instead of narrower ones.
    """

    def __init__(
        self, factor: int, layers: int = 2, image: int | None = None, heads: bool = False
    ) -> None:
        self.factor, self.layers, self.image, self.heads = factor, layers, image, heads
        self._ids: dict[int, int] = {}

    def config(self, cls: type, base: Any = None) -> Any:
        """A small config of a class, from its defaults or from an instance."""
        default = cls() if base is None else base
        names = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else None
        new: dict[str, Any] = {}
        count = self._layer_count(default)
        for name, value in vars(default).items():
            if name.startswith("_") or (names is not None and name not in names):
                continue
            if hasattr(value, "to_dict") and hasattr(value, "model_type"):
                new[name] = self.config(type(value), value)
                continue
            small = self._field(default, name, value, count)
            if small is not value:
                new[name] = small
        if base is None:
            return cls(**new)
        held = vars(default)
        kept = {n: held[n] for n in (names or ()) if n in held and _was_set(cls, held[n], n)}
        return cls(**{**kept, **new, **self._outputs(default, count)})

    def _outputs(self, config: Any, count: int) -> dict[str, Any]:
        """Which stages a backbone returns: as many as before, the last ones if there are fewer."""
        wanted = list(getattr(config, "_out_indices", None) or ())
        depths = getattr(config, "depths", None)
        stages = 1 + (len(depths) if depths else count)
        if not wanted or len(wanted) > stages:
            return {}
        if max(wanted) >= stages and not depths:
            wanted = list(range(stages - len(wanted), stages))
        return {"out_indices": wanted}

    def _layer_count(self, config: Any) -> int:
        """Enough layers for every type that the pattern has, 8 at most."""
        types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
        if not isinstance(types, (list, tuple)) or not types:
            return self.layers
        first = [list(types).index(kind) for kind in set(map(str, types)) if kind in types]
        return min(max([self.layers, *(i + 1 for i in first)]), 8)

    def _field(self, config: Any, name: str, value: Any, count: int) -> Any:
        if value is None:
            return _UNSET.get(name)
        if isinstance(value, bool):
            return value
        if name in ("image_size", "img_size", "pretrain_image_size"):
            return self._image(value, getattr(config, "patch_size", None))
        if isinstance(value, int):
            return self._number(name, value, count)
        if isinstance(value, (list, tuple)) and value:
            return self._sequence(config, name, value, count)
        if isinstance(value, dict):
            return self._rope(value)
        return value

    def _number(self, name: str, value: int, count: int) -> int:
        if "vocab" in name and value > VOCAB and "type" not in name:
            return VOCAB
        if _EXPERTS.search(name):
            return min(value, 4)
        if _PER_TOKEN.search(name):
            return min(value, 2)
        if name in ("n_group", "topk_group", "num_expert_group"):
            return 1
        if name.endswith("num_queries") or name == "two_stage_num_proposals":
            return min(value, 16)  # a small image has fewer places to choose them from
        if _TOKEN.search(name) and not name.endswith(("layer_id", "expert_id")):
            return self._token(value)
        if _LAYERS.search(name) and not _NO_LAYERS.search(name):
            return min(value, count)
        if self.heads and _HEADS.search(name):
            return max(value // self.factor, 1)
        if self.heads and _HEAD_DIM.search(name):
            return value
        if _POSITIONS.search(name):
            return min(value, POSITIONS)
        if value >= 32 and _WIDTH.search(name) and not _NO_WIDTH.search(name):
            return value // self.factor if value % self.factor == 0 else value
        return value

    def _image(self, value: Any, patch: Any) -> Any:
        if isinstance(value, int) and self.image is not None and value > self.image:
            patch = patch if isinstance(patch, int) else 16
            wanted = 4 * patch if self.image % patch else self.image
            return min(wanted, value)
        if isinstance(value, int) and value > IMAGE and value % 4 == 0:
            return value // 4
        return value

    def _token(self, value: int) -> int:
        if value < VOCAB:
            return value
        if value not in self._ids:
            self._ids[value] = VOCAB - 1 - len(self._ids)
        return self._ids[value]

    def _sequence(self, config: Any, name: str, value: Any, count: int) -> Any:
        kind = type(value)
        if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            if _TOKEN.search(name):
                return kind(self._token(v) for v in value)
            if re.search(
                r"^depths$|layers_per|num_blocks|^layers$|stage_num_blocks|blocks_per", name
            ):
                return kind(min(v, self.layers) for v in value)
            if re.search(r"image_size", name):
                return value
            wide = _WIDTH.search(name) and not re.search(_NO_WIDTHS, name)
            if wide and all(v % self.factor == 0 for v in value if v >= 32):
                return kind(v // self.factor if v >= 32 else v for v in value)
        per_layer = isinstance(value[0], str) or re.search(r"layer|type|pattern", name)
        layers = getattr(config, "num_hidden_layers", None)
        one_each = per_layer and not hasattr(config, "depths") and len(value) == layers
        return value[:count] if one_each and layers > count else value

    def _rope(self, value: dict[str, Any]) -> dict[str, Any]:
        sections = value.get("mrope_section")
        if not sections:
            return value
        new = copy.deepcopy(value)
        new["mrope_section"] = [max(v // self.factor, 1) for v in sections]
        return new


def _was_set(cls: type, value: Any, name: str) -> bool:
    """Whether the value of a field is not what its class has by default."""
    for field in dataclasses.fields(cls):
        if field.name == name:
            if field.default is not dataclasses.MISSING:
                return value is not field.default
            return field.default_factory is dataclasses.MISSING
    return False
