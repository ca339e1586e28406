"""Every model type of transformers that runs here with a small config and made-up inputs.

Of each type the first class in the order of `_TASKS` that runs, at the first factor that its
config can be divided by.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import product
from typing import Any
from zlib import crc32

import torch
from torch import nn

from sweep.case import Case, call, finite, liven, outputs
from sweep.shrink import Shrinker
from sweep.tokens import candidates, with_placeholders

FACTORS = (16, 8, 4, 32, 2)
WIDE_FACTORS = (32, 16, 64, 8, 4)
MOST_PARAMETERS = 40_000_000
SEARCH_SECONDS = 40.0
_TASKS = [
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "PRETRAINING",
    "OBJECT_DETECTION",
    "INSTANCE_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "CTC",
    "RNNT",
    "AUDIO_CLASSIFICATION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    "ZERO_SHOT_OBJECT_DETECTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "MASK_GENERATION",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "TIME_SERIES_PREDICTION",
    "IMAGE_TO_IMAGE",
    "VISUAL_QUESTION_ANSWERING",
    "SEQUENCE_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "TOKEN_CLASSIFICATION",
    "TEXT_RECOGNITION",
    "POSE_ESTIMATION",
]


def names() -> list[str]:
    """All model types with a model class; families apart, so that a part of a sweep is a sample."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found = [name for name in CONFIG_MAPPING_NAMES if _class_names(name)]
    return sorted(found, key=lambda name: crc32(name.encode()))


def _class_names(model_type: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    found: list[str] = []
    for table in [*(f"MODEL_FOR_{task}_MAPPING_NAMES" for task in _TASKS), "MODEL_MAPPING_NAMES"]:
        entry = getattr(modeling_auto, table, {}).get(model_type, ())
        for name in (entry,) if isinstance(entry, str) else entry:
            if name not in found:
                found.append(name)
    return found


def build(name: str, recipe: str = "") -> Case:
    """A model of a type, and inputs; raises with the last error if nothing runs."""
    errors: list[str] = []
    end = time.process_time() + SEARCH_SECONDS
    for label, cls, shrinker in _ways(name):
        if recipe and label != recipe.partition(":")[0]:
            continue
        try:
            model = _small(cls, shrinker)
            inputs = _inputs(model)
        except Exception as error:  # noqa: BLE001 (another size or class may do)
            errors.append(f"{label}: {type(error).__name__}: {error}"[:300])
        else:
            return Case(model, inputs, recipe=f"{label}: {', '.join(inputs)}")
        if time.process_time() > end:
            break
    raise ValueError(" | ".join(dict.fromkeys(errors[:2] + errors[-1:])))


def _ways(name: str) -> Iterator[tuple[str, type[nn.Module], Shrinker]]:
    import transformers

    for class_name in _class_names(name):
        cls = getattr(transformers, class_name)
        factors = WIDE_FACTORS if _width(cls) >= 2048 else FACTORS
        images = (64, None) if _has_images(cls) else (64,)
        for factor, image in product(factors, images):
            size = "" if image else "/full image"
            yield f"{class_name}/{factor}{size}", cls, Shrinker(factor, image=image)
        for factor in factors[:2]:
            yield f"{class_name}/{factor}/few heads", cls, Shrinker(factor, image=64, heads=True)
        # All layers, for what picks the outputs of some by number.
        yield f"{class_name}/{factors[0]}/deep", cls, Shrinker(factors[0], layers=99)


def _has_images(cls: Any) -> bool:
    main = getattr(cls, "main_input_name", "")
    return "pixel" in str(main) or "image" in str(main)


def _width(cls: Any) -> int:
    try:
        config = cls.config_class()
        text = config.get_text_config()
    except Exception:  # noqa: BLE001 (building it will tell)
        return 0
    found = [getattr(c, n, 0) for c in (config, text) for n in ("hidden_size", "d_model")]
    return max((v for v in found if isinstance(v, int)), default=0)


def _small(cls: Any, shrinker: Shrinker) -> nn.Module:
    config = shrinker.config(cls.config_class)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters at factor {shrinker.factor}")
    torch.manual_seed(0)
    model = cls(config).eval()
    model.float()
    for one in (config, *(c for c in vars(config).values() if hasattr(c, "model_type"))):
        if getattr(one, "use_cache", False):
            one.use_cache = False
    liven(model)
    return model


def _inputs(model: nn.Module) -> dict[str, Any]:
    errors = []
    for inputs in candidates(model):
        for _ in range(2):
            try:
                with torch.no_grad():
                    result = outputs(call(model, inputs))
                if not finite(result):
                    raise ValueError("the output is not finite, or zero")
                return inputs
            except Exception as error:  # noqa: BLE001 (other inputs may do)
                errors.append(f"{sorted(inputs)}: {type(error).__name__}: {error}"[:250])
                more = _more(model, inputs, str(error))
                if more is None:
                    break
                inputs = more
    raise ValueError("; ".join(errors[:1] + errors[-1:]))


def _more(model: nn.Module, inputs: dict[str, Any], error: str) -> dict[str, Any] | None:
    wave = inputs.get("input_values", inputs.get("audio_values"))
    if "expected input[1, 2, " in error and wave is not None and wave.ndim == 2:
        name = "input_values" if "input_values" in inputs else "audio_values"
        return {**inputs, name: wave[:, None]}  # a codec, which takes channels
    found = re.search(r"features:? (?:torch\.Size\(\[)?(\d+)", error)
    return with_placeholders(model, inputs, int(found[1])) if found else None
