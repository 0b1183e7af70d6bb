"""LLaVA-OneVision and LLaVA-NeXT checkpoints: LLaVA's names, a newline, and SigLIP's patch bias.

The table uses the names of the published checkpoints (llava-hf/llava-onevision-qwen2-7b-ov-hf,
llava-hf/llava-v1.6-vicuna-7b-hf, written by transformers 4).
"""

from typing import Any

import numpy as np

from jaxvqa.convert import llava
from jaxvqa.convert.errors import ConversionError
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


def unread(config: LlavaOnevisionConfig) -> dict[str, str]:
    """Further tensors that a checkpoint of `config` may hold and that are not read, with the reason."""
    return {"language_model.lm_head.weight": "the config ties it to the embedding"} if config.decoder.tied else {}


def to_hf(config: LlavaOnevisionConfig) -> dict[str, Any]:
    """The HF config.json whose `from_hf` is `config`."""
    d, layers, is_next = config.decoder, config.feature_layers, isinstance(config, LlavaNextConfig)
    rope = {"rope_type": "default", "rope_theta": d.rope_theta}
    if d.rope_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": d.rope_factor}
    hf = {
        "architectures": [ARCHITECTURES[is_next]],
        "model_type": "llava_next" if is_next else "llava_onevision",
        "image_token_index": config.image_token_id,
        "image_grid_pinpoints": [list(size) for size in config.canvases],
        "projector_hidden_act": config.projector_activation,
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": config.select,
        "tie_word_embeddings": d.tied,
        "text_config": {
            "model_type": "qwen3" if d.qk_norm else "qwen2" if d.qkv_bias else "llama",
            "vocab_size": d.vocab_size,
            "hidden_size": d.width,
            "intermediate_size": d.mlp_width,
            "num_hidden_layers": d.num_layers,
            "num_attention_heads": d.num_heads,
            "num_key_value_heads": d.num_kv_heads,
            "head_dim": d.head_dim,
            "max_position_embeddings": d.max_length,
            "rms_norm_eps": d.norm_eps,
            "rope_parameters": rope,
            "hidden_act": "silu",
            "tie_word_embeddings": d.tied,
        },
        "vision_config": config.vision.to_hf(),
    }
    if not is_next:
        hf |= {"vision_aspect_ratio": f"anyres_max_{config.max_tiles}"}
    if (back := type(config).from_hf(hf)) != config:
        raise ConversionError(f"this config has no HF form: it reads back as {back}, expected {config}")
    return hf


def exported(
    config: LlavaOnevisionConfig, arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The HF config.json of parameters by path, and the parameters as they are stored."""
    return to_hf(config) | {"dtype": str(arrays["decoder.embed"].dtype)}, arrays


__all__ = [
    "ARCHITECTURES",
    "EXPORT",
    "FUSED",
    "HF",
    "TABLE",
    "LlavaNextConfig",
    "LlavaOnevisionConfig",
    "exported",
    "specs",
    "to_hf",
    "unread",
]
