"""LLaVA-OneVision and LLaVA-NeXT checkpoints: LLaVA's names, a newline, and SigLIP's patch bias.

The table uses the names of the published checkpoints (llava-hf/llava-onevision-qwen2-7b-ov-hf,
llava-hf/llava-v1.6-vicuna-7b-hf, written by transformers 4).
"""

from typing import Any

from jaxvqa.convert import llava
from jaxvqa.convert.tables import Fused, Naming, Table, as_is
from jaxvqa.models.llava_next import LlavaNextConfig
from jaxvqa.models.llava_onevision import LlavaOnevisionConfig, specs

ARCHITECTURES = ("LlavaOnevisionForConditionalGeneration", "LlavaNextForConditionalGeneration")

_V = "vision_tower.vision_model."

TABLE: Table = llava.TABLE | {
    _V + "embeddings.patch_embedding.bias": ("vision.patch_bias", as_is),
    "image_newline": ("newline", as_is),
}

HF = Naming(
    prefixes=(*llava.HF.prefixes, ("model.image_newline", "image_newline")),
    unread=llava.BUFFERS | {_V + "head.*": "SigLIP's pooled output; LLaVA-OneVision reads hidden states"},
)

FUSED: Fused = {}

EXPORT = llava.EXPORT


def to_hf(config: LlavaOnevisionConfig) -> dict[str, Any]:
    """The HF config.json whose `from_hf` is `config`."""
    layers, is_next = config.feature_layers, isinstance(config, LlavaNextConfig)
    return {
        "architectures": [ARCHITECTURES[is_next]],
        "model_type": "llava_next" if is_next else "llava_onevision",
        "image_token_index": config.image_token_id,
        "image_grid_pinpoints": [list(size) for size in config.canvases],
        "projector_hidden_act": config.projector_activation,
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": config.select,
        "tie_word_embeddings": config.decoder.tied,
        "text_config": config.decoder.to_hf(),
        "vision_config": config.vision.to_hf(),
    } | ({} if is_next else {"vision_aspect_ratio": f"anyres_max_{config.max_tiles}"})


__all__ = [
    "ARCHITECTURES",
    "EXPORT",
    "FUSED",
    "HF",
    "TABLE",
    "LlavaNextConfig",
    "LlavaOnevisionConfig",
    "specs",
    "to_hf",
]
