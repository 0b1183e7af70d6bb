"""LLaVA-1.5 checkpoints: names, layouts on disk, configuration.

The table uses the names of the published checkpoints (llava-hf/llava-1.5-7b-hf, written by transformers 4), so it can
be held beside their `model.safetensors.index.json`; the other layouts are told by the prefixes in `HF` and `ORIGINAL`.
"""

from pathlib import Path
from typing import Any

from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.tables import (
    Fused,
    Naming,
    Table,
    as_is,
    conv,
    decoder_table,
    heads_bias,
    heads_in,
    heads_out,
    transpose,
)
from jaxvqa.convert.tensors import read_json
from jaxvqa.models.llava import LlavaConfig, specs

ARCHITECTURES = ("LlavaForConditionalGeneration", "LlavaLlamaForCausalLM")
"""LLaVA-1.5 of transformers, and of the original code."""

_V = "vision_tower.vision_model."
_T = "language_model.model."

TABLE: Table = {
    _V + "embeddings.class_embedding": ("vision.class_embed", as_is),
    _V + "embeddings.patch_embedding.weight": ("vision.patch_embed", conv),
    _V + "embeddings.position_embedding.weight": ("vision.position_embed", as_is),
    _V + "pre_layrnorm.weight": ("vision.pre_norm.scale", as_is),
    _V + "pre_layrnorm.bias": ("vision.pre_norm.bias", as_is),
    _V + "encoder.layers.{i}.layer_norm1.weight": ("vision.layers.norm1.scale", as_is),
    _V + "encoder.layers.{i}.layer_norm1.bias": ("vision.layers.norm1.bias", as_is),
    _V + "encoder.layers.{i}.self_attn.q_proj.weight": ("vision.layers.q_proj", heads_out),
    _V + "encoder.layers.{i}.self_attn.q_proj.bias": ("vision.layers.q_bias", heads_bias),
    _V + "encoder.layers.{i}.self_attn.k_proj.weight": ("vision.layers.k_proj", heads_out),
    _V + "encoder.layers.{i}.self_attn.k_proj.bias": ("vision.layers.k_bias", heads_bias),
    _V + "encoder.layers.{i}.self_attn.v_proj.weight": ("vision.layers.v_proj", heads_out),
    _V + "encoder.layers.{i}.self_attn.v_proj.bias": ("vision.layers.v_bias", heads_bias),
    _V + "encoder.layers.{i}.self_attn.out_proj.weight": ("vision.layers.o_proj", heads_in),
    _V + "encoder.layers.{i}.self_attn.out_proj.bias": ("vision.layers.o_bias", as_is),
    _V + "encoder.layers.{i}.layer_norm2.weight": ("vision.layers.norm2.scale", as_is),
    _V + "encoder.layers.{i}.layer_norm2.bias": ("vision.layers.norm2.bias", as_is),
    _V + "encoder.layers.{i}.mlp.fc1.weight": ("vision.layers.fc1", transpose),
    _V + "encoder.layers.{i}.mlp.fc1.bias": ("vision.layers.fc1_bias", as_is),
    _V + "encoder.layers.{i}.mlp.fc2.weight": ("vision.layers.fc2", transpose),
    _V + "encoder.layers.{i}.mlp.fc2.bias": ("vision.layers.fc2_bias", as_is),
    _V + "post_layernorm.weight": ("vision.post_norm.scale", as_is),
    _V + "post_layernorm.bias": ("vision.post_norm.bias", as_is),
    "multi_modal_projector.linear_1.weight": ("projector.fc1", transpose),
    "multi_modal_projector.linear_1.bias": ("projector.fc1_bias", as_is),
    "multi_modal_projector.linear_2.weight": ("projector.fc2", transpose),
    "multi_modal_projector.linear_2.bias": ("projector.fc2_bias", as_is),
    **decoder_table(_T, "language_model.lm_head.weight"),
}

BUFFERS = {
    "*.rotary_emb.inv_freq": "computed from the config (older transformers stored it)",
    "*.embeddings.position_ids": "0, 1, 2, ... (older transformers stored it)",
}
"""Tensors that are known and deliberately not read, with the reason."""

HF = Naming(
    prefixes=(
        ("vision_tower.vision_model.", _V),  # transformers 4
        ("model.vision_tower.vision_model.", _V),  # transformers 4.52 to 4.57, module names
        ("model.vision_tower.", _V),  # transformers 5, module names (save_original_format=False)
        ("vision_tower.", _V),  # transformers 5, as it saves by default
        ("model.language_model.", _T),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
    unread=BUFFERS,
)

ORIGINAL = Naming(
    prefixes=(
        ("model.vision_tower.vision_tower.vision_model.", _V),  # where the tower was trained along
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
        ("model.", _T),
        ("lm_head.", "language_model.lm_head."),
    ),
    unread=BUFFERS,
)

CLIP = Naming(
    prefixes=(
        ("vision_model.", _V),  # CLIPModel; CLIPVisionModel of transformers 4
        ("embeddings.", _V + "embeddings."),  # CLIPVisionModel of transformers 5
        ("encoder.", _V + "encoder."),
        ("pre_layrnorm.", _V + "pre_layrnorm."),
        ("post_layernorm.", _V + "post_layernorm."),
    ),
    unread=BUFFERS
    | {
        "text_model.*": "CLIP's text side has no part in LLaVA",
        "text_projection.weight": "CLIP's text side has no part in LLaVA",
        "visual_projection.weight": "LLaVA reads hidden states before CLIP's joint space",
        "logit_scale": "CLIP's contrastive loss only",
    },
)

FUSED: Fused = {}

EXPORT = {_V: "vision_tower."}
"""Prefixes of the table that transformers 5 spells differently where it saves by default."""


def is_original(hf: dict[str, Any]) -> bool:
    """Whether a config.json is of the original (liuhaotian) layout: a Llama config with `mm_` keys."""
    return "mm_vision_tower" in hf and "vision_config" not in hf


def assemble(hf: dict[str, Any], clip_folder: Path) -> dict[str, Any]:
    """An HF LLaVA config from an original one and its vision tower's folder.

    The original has no image token: its first free id becomes one, as in llava-hf/llava-1.5-7b-hf.
    """
    clip = read_config(clip_folder)
    vision = clip.get("vision_config", clip)
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise ConversionError(f"{clip_folder}/config.json: vision tower {vision['model_type']!r}; expected a CLIP")
    faults = []
    if (kind := hf.get("mm_projector_type", "linear")) != "mlp2x_gelu":
        faults.append(f"mm_projector_type {kind!r}, expected 'mlp2x_gelu' (LLaVA-1.5)")
    if hf.get("mm_use_im_start_end"):
        faults.append("mm_use_im_start_end true, expected false (LLaVA-1.5)")
    if (aspect := hf.get("image_aspect_ratio", "pad")) not in ("pad", "square"):
        faults.append(f"image_aspect_ratio {aspect!r}, expected 'pad' (LLaVA-1.5)")
    select = {"patch": "default", "cls_patch": "full"}
    if (feature := hf.get("mm_vision_select_feature", "patch")) not in select:
        faults.append(f"mm_vision_select_feature {feature!r}, expected 'patch' or 'cls_patch'")
    if faults:
        raise ConversionError("config.json of the original LLaVA layout is not supported", faults)
    text = {k: v for k, v in hf.items() if not k.startswith("mm_") and k not in ("architectures", "_name_or_path")}
    layer = hf.get("mm_vision_select_layer", -2)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text | {"model_type": "llama"},
        "vision_config": vision | {"model_type": "clip_vision_model"},
        "image_token_index": hf.get("vocab_size", 32000),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": select[feature],
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    if not (folder / "config.json").exists():
        raise ConversionError(f"{folder}: no config.json; expected the folder of a Hugging Face checkpoint")
    return read_json(folder / "config.json")


def to_hf(config: LlavaConfig) -> dict[str, Any]:
    """The HF config.json whose `LlavaConfig.from_hf` is `config`."""
    layers = config.feature_layers
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": config.projector_activation,
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": config.select,
        "tie_word_embeddings": config.decoder.tied,
        "text_config": config.decoder.to_hf(),
        "vision_config": config.vision.to_hf(),
    }


__all__ = [
    "ARCHITECTURES",
    "CLIP",
    "EXPORT",
    "FUSED",
    "HF",
    "ORIGINAL",
    "TABLE",
    "LlavaConfig",
    "assemble",
    "is_original",
    "read_config",
    "specs",
    "to_hf",
]
