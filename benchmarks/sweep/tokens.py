"""Inputs for transformers' models, from the names in their forward's signature and their config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH = 2, 8


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Sets of keywords to try, the fullest first, then what the model calls its main input."""
    names = [n for n in inspect.signature(model.forward).parameters if n in _MAKERS]
    main = getattr(model, "main_input_name", "input_ids")
    required = _required(model)
    whole = [n for n in names if n in _MODALITIES or n in required or n == main]
    seen = []
    for chosen in (
        whole,
        [n for n in whole if n not in _DECODER],
        [main, *required],
        [main, *required, *(n for n in names if n in _DECODER)],
        [n for n in whole if n != "pixel_values" and not n.startswith("pixel_values_")],
        [n for n in whole if n.startswith(("input_ids", "decoder", "attention"))],
        names,
        [n for n in names if "pixel" in n or n in required],
    ):
        wanted = sorted({n for n in chosen if n in _MAKERS})
        if not wanted or wanted in seen:
            continue
        seen.append(wanted)
        made = {n: _MAKERS[n](model.config, model) for n in wanted}
        yield {n: value for n, value in made.items() if value is not None}


def _required(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def with_placeholders(
    model: nn.Module, inputs: dict[str, Any], features: int
) -> dict[str, Any] | None:
    """Token ids with as many image or audio placeholders as the features that were computed."""
    config = model.config
    for name in (
        "image_token_id",
        "image_token_index",
        "audio_token_id",
        "audio_token_index",
        "video_token_id",
    ):
        token = _get(config, name)
        if isinstance(token, int) and "input_ids" in inputs and features % BATCH == 0:
            text = inputs["input_ids"][:, :LENGTH]
            marks = torch.full((BATCH, features // BATCH), token)
            return {**inputs, "input_ids": torch.cat([text[:, :2], marks, text[:, 2:]], 1)}
    return None


def _get(config: Any, name: str, default: Any = None) -> Any:
    """A field of the config, or of the first sub-config that has it."""
    value = getattr(config, name, None)
    if value is not None and not callable(value):
        return value
    for sub in vars(config).values():
        if hasattr(sub, "to_dict") and hasattr(sub, "model_type"):
            value = _get(sub, name)
            if value is not None:
                return value
    return default


def _text(config: Any) -> Any:
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def _ids(config: Any, decoder: bool = False) -> Tensor:
    text = _text(config)
    vocab = getattr(text, "vocab_size", None) or _get(config, "vocab_size", 100)
    if isinstance(vocab, (list, tuple)):
        vocab = min(vocab)
    special = {
        v
        for c in (config, text)
        for k, v in vars(c).items()
        if k.endswith(("_id", "_index")) and isinstance(v, int)
    }
    free = [i for i in range(min(int(vocab), 100)) if i not in special]
    free = free or list(range(int(vocab)))
    draw = torch.randint(0, len(free), (BATCH, LENGTH), generator=_seeded())
    return torch.tensor(free)[draw]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_seeded())


def _square(config: Any) -> tuple[int, int]:
    size = _get(config, "image_size", None) or _get(config, "img_size", None) or 64
    if isinstance(size, dict):
        size = (size.get("height", 64), size.get("width", 64))
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


def _pixels(config: Any, model: nn.Module) -> Tensor | None:
    channels = _get(config, "num_channels", None) or _get(config, "in_channels", 3)
    channels = channels if isinstance(channels, int) else 3
    frames = _get(config, "num_frames", None)
    name = type(model).__name__.lower()
    if isinstance(frames, int) and ("video" in name or "vivit" in name or "timesformer" in name):
        return _randn(BATCH, frames, channels, *_square(config))
    return _randn(BATCH, channels, *_square(config))


def _features(config: Any, model: nn.Module) -> Tensor:
    bins = _get(config, "num_mel_bins", None) or _get(config, "input_feat_per_channel", None)
    bins = bins or _get(config, "feature_size", None) or _get(config, "input_dim", 80)
    length = _get(config, "max_source_positions", None)
    name = type(model).__name__
    if "Whisper" in name or "Qwen2Audio" in name or "Voxtral" in name:
        return _randn(BATCH, int(bins), 2 * int(length or 64))
    return _randn(BATCH, 64, int(bins))


def _wave(config: Any, model: nn.Module) -> Tensor:
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):  # a spectrogram
        return _randn(BATCH, int(config.max_length), int(config.num_mel_bins))
    if "Codec" in type(model).__name__ or hasattr(config, "audio_channels"):
        return _randn(BATCH, int(_get(config, "audio_channels", 1)), 3200)
    return _randn(BATCH, 3200)


def _boxes(config: Any, model: nn.Module) -> Tensor:
    corner = torch.randint(0, 100, (BATCH, LENGTH, 2), generator=_seeded())
    return torch.cat([corner, corner + 50], -1)


def _mask(config: Any, model: nn.Module) -> Tensor:
    return torch.ones(BATCH, LENGTH, dtype=torch.long)


def _series(config: Any, model: nn.Module) -> Tensor:
    length = getattr(config, "context_length", 32)
    lags = getattr(config, "lags_sequence", None)
    if lags:
        return _randn(BATCH, length + max(lags))
    channels = getattr(config, "num_input_channels", None)
    return _randn(BATCH, length, channels) if channels else _randn(BATCH, length)


def _patches(config: Any, model: nn.Module) -> Tensor:
    """Flat patches of one image of 4 x 4, for towers that take their grid; else hidden states."""
    if "grid_thw" not in inspect.signature(model.forward).parameters:
        return _randn(BATCH, LENGTH, int(_get(config, "hidden_size", 32)))
    channels = _get(config, "in_channels", None) or _get(config, "num_channels", 3)
    frames = int(_get(config, "temporal_patch_size", 1))
    return _randn(16, int(channels) * frames * int(_get(config, "patch_size", 14)) ** 2)


_MODALITIES = (
    "input_ids",
    "pixel_values",
    "input_features",
    "input_values",
    "decoder_input_ids",
    "bbox",
    "past_values",
    "audio_values",
    "pixel_values_videos",
    "image",
    "waveform",
)
_DECODER = ("decoder_input_ids", "decoder_attention_mask")
_MAKERS: dict[str, Any] = {
    "input_ids": lambda c, m: _ids(c),
    "decoder_input_ids": lambda c, m: _ids(c),
    "labels": lambda c, m: None,
    "attention_mask": _mask,
    "pixel_values": _pixels,
    "pixel_values_videos": lambda c, m: _randn(BATCH, 4, 3, *_square(c)),
    "pixel_values_images": _pixels,
    "pixel_mask": lambda c, m: torch.ones(BATCH, *_square(c), dtype=torch.long),
    "input_features": _features,
    "input_values": _wave,
    "audio_values": _wave,
    "waveform": _wave,
    "bbox": _boxes,
    "past_values": _series,
    "past_time_features": lambda c, m: _randn(
        BATCH, _series(c, m).shape[1], int(getattr(c, "num_time_features", 0))
    ),
    "past_observed_mask": lambda c, m: torch.ones_like(_series(c, m)),
    "image": _pixels,
    "inputs": lambda c, m: _randn(BATCH, LENGTH, int(_get(c, "d_model", 32))),
    "hidden_states": _patches,
    "grid_thw": lambda c, m: torch.tensor([[1, 4, 4]]),
    "query_embeds": lambda c, m: _randn(BATCH, LENGTH, int(_get(c, "hidden_size", 32))),
    "input_features_mask": lambda c, m: torch.ones(
        BATCH, _features(c, m).shape[-1], dtype=torch.long
    ),
    "encoder_hidden_states": lambda c, m: _randn(
        BATCH, LENGTH, int(_get(c, "encoder_hidden_size", None) or _get(c, "hidden_size", 32))
    ),
    "inputs_embeds": lambda c, m: _randn(BATCH, LENGTH, int(_get(c, "hidden_size", 32))),
    "xpath_tags_seq": lambda c, m: None,
    "image_grid_thw": lambda c, m: None,
    "states": lambda c, m: _randn(BATCH, LENGTH, int(_get(c, "state_dim", 17))),
    "actions": lambda c, m: _randn(BATCH, LENGTH, int(_get(c, "act_dim", 4))),
    "rewards": lambda c, m: _randn(BATCH, LENGTH, 1),
    "returns_to_go": lambda c, m: _randn(BATCH, LENGTH, 1),
    "timesteps": lambda c, m: torch.arange(LENGTH).expand(BATCH, LENGTH),
}
