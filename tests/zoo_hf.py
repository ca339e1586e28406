"""Hugging Face architectures with random weights, as small as keeps their structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_entry import DEPTHWISE, HEAD, STEM, TIED, Entry, Inputs

VOCAB = 64


def make(model: str, config: str, **fields: Any) -> nn.Module:
    """A randomly initialised `transformers` model; nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**fields))


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, 8))  # 0, 1 and 2 are the special tokens below


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def decoder_fields(layers: int) -> dict[str, Any]:
    """Shared by the Llama family, with grouped-query attention."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "use_cache": False,
    }


def encoder_fields() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }


def bert() -> tuple[nn.Module, Inputs]:
    fields = {**encoder_fields(), "vocab_size": VOCAB, "max_position_embeddings": 32}
    model = make("BertForSequenceClassification", "BertConfig", **fields)
    return model, {"input_ids": tokens()}


def gpt2() -> tuple[nn.Module, Inputs]:
    fields = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    model = make("GPT2LMHeadModel", "GPT2Config", **fields, **special)
    return model, {"input_ids": tokens()}


def llama() -> tuple[nn.Module, Inputs]:
    model = make("LlamaForCausalLM", "LlamaConfig", **decoder_fields(2))
    return model, {"input_ids": tokens()}


def mistral() -> tuple[nn.Module, Inputs]:
    model = make("MistralForCausalLM", "MistralConfig", **decoder_fields(1))
    return model, {"input_ids": tokens()}


def mixtral() -> tuple[nn.Module, Inputs]:
    """Its experts are 3-D parameters, its router a bare 2-D one, which no linear module holds."""
    model = make("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **decoder_fields(1))
    return model, {"input_ids": tokens()}


def t5() -> tuple[nn.Module, Inputs]:
    fields = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
    special = {"num_heads": 4, "decoder_start_token_id": 0, "use_cache": False}
    model = make("T5ForConditionalGeneration", "T5Config", **fields, **special)
    return model, {"input_ids": tokens(), "decoder_input_ids": tokens()}


def whisper() -> tuple[nn.Module, Inputs]:
    sides = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    model = make(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=VOCAB,
        d_model=32,
        num_mel_bins=16,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        use_cache=False,
        **sides,
    )
    return model, {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": tokens()}


def vit() -> tuple[nn.Module, Inputs]:
    fields = {**encoder_fields(), "image_size": 32, "patch_size": 8}
    return make("ViTForImageClassification", "ViTConfig", **fields), {"pixel_values": pixels()}


def convnext() -> tuple[nn.Module, Inputs]:
    fields = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32}
    model = make("ConvNextForImageClassification", "ConvNextConfig", **fields)
    return model, {"pixel_values": pixels()}


def resnet() -> tuple[nn.Module, Inputs]:
    fields = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    model = make("ResNetForImageClassification", "ResNetConfig", **fields)
    return model, {"pixel_values": pixels()}


def swin() -> tuple[nn.Module, Inputs]:
    fields = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    model = make(
        "SwinForImageClassification", "SwinConfig", depths=[2, 1], num_heads=[2, 4], **fields
    )
    return model, {"pixel_values": pixels()}


def clip() -> tuple[nn.Module, Inputs]:
    text = {**encoder_fields(), "vocab_size": VOCAB, "max_position_embeddings": 32}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**encoder_fields(), "image_size": 32, "patch_size": 8}
    fields = {"text_config": {**text, **special}, "vision_config": vision, "projection_dim": 16}
    return make("CLIPModel", "CLIPConfig", **fields), {
        "input_ids": tokens(),
        "pixel_values": pixels(),
    }


HF_MODELS = {
    "hf_bert": Entry(bert, {"classifier.weight": HEAD}),
    "hf_gpt2": Entry(gpt2, {"lm_head.weight": TIED}),
    "hf_llama": Entry(llama, {"lm_head.weight": HEAD}),
    "hf_mistral": Entry(mistral, {"lm_head.weight": HEAD}),
    "hf_mixtral": Entry(mixtral, {"lm_head.weight": HEAD}),
    "hf_t5": Entry(t5, {"lm_head.weight": TIED}),
    "hf_whisper": Entry(whisper, {"proj_out.weight": TIED}),
    "hf_vit": Entry(
        vit,
        {"vit.embeddings.patch_embeddings.projection.weight": STEM, "classifier.weight": HEAD},
    ),
    "hf_convnext": Entry(
        convnext,
        {
            "convnext.embeddings.patch_embeddings.weight": STEM,
            "convnext.encoder.stages.0.layers.0.dwconv.weight": DEPTHWISE,
            "convnext.encoder.stages.1.layers.0.dwconv.weight": DEPTHWISE,
            "classifier.weight": HEAD,
        },
    ),
    "hf_resnet": Entry(
        resnet,
        {"resnet.embedder.embedder.convolution.weight": STEM, "classifier.1.weight": HEAD},
    ),
    "hf_swin": Entry(
        swin,
        {"swin.embeddings.patch_embeddings.projection.weight": STEM, "classifier.weight": HEAD},
    ),
    # A dual encoder has two heads of equal rank; the policy knows only the last linear.
    "hf_clip": Entry(
        clip,
        {
            "vision_model.embeddings.patch_embedding.weight": STEM,
            "text_projection.weight": HEAD,
        },
    ),
}
