"""BLIP image-text retrieval checkpoints (HF `BlipForImageTextRetrieval`): names and configuration.

The names are those of the published checkpoints (Salesforce/blip-itm-base-coco), which transformers 4 and 5 write
alike, but for queries, keys and values of the vision tower: there they are one tensor, `qkv`.
"""

from typing import Any

from jaxvqa.convert.tables import Fused, Naming, Table, as_is, conv, heads_bias, heads_in, heads_out, transpose
from jaxvqa.models.blip_itm import BlipItmConfig, specs

ARCHITECTURES = ("BlipForImageTextRetrieval",)

_V = "vision_model."
_T = "text_encoder."
_L = _T + "encoder.layer.{i}."

TABLE: Table = {
    _V + "embeddings.class_embedding": ("vision.class_embed", as_is),
    _V + "embeddings.patch_embedding.weight": ("vision.patch_embed", conv),
    _V + "embeddings.patch_embedding.bias": ("vision.patch_bias", as_is),
    _V + "embeddings.position_embedding": ("vision.position_embed", as_is),
    _V + "encoder.layers.{i}.layer_norm1.weight": ("vision.layers.norm1.scale", as_is),
    _V + "encoder.layers.{i}.layer_norm1.bias": ("vision.layers.norm1.bias", as_is),
    _V + "encoder.layers.{i}.self_attn.query.weight": ("vision.layers.q_proj", heads_out),
    _V + "encoder.layers.{i}.self_attn.query.bias": ("vision.layers.q_bias", heads_bias),
    _V + "encoder.layers.{i}.self_attn.key.weight": ("vision.layers.k_proj", heads_out),
    _V + "encoder.layers.{i}.self_attn.key.bias": ("vision.layers.k_bias", heads_bias),
    _V + "encoder.layers.{i}.self_attn.value.weight": ("vision.layers.v_proj", heads_out),
    _V + "encoder.layers.{i}.self_attn.value.bias": ("vision.layers.v_bias", heads_bias),
    _V + "encoder.layers.{i}.self_attn.projection.weight": ("vision.layers.o_proj", heads_in),
    _V + "encoder.layers.{i}.self_attn.projection.bias": ("vision.layers.o_bias", as_is),
    _V + "encoder.layers.{i}.layer_norm2.weight": ("vision.layers.norm2.scale", as_is),
    _V + "encoder.layers.{i}.layer_norm2.bias": ("vision.layers.norm2.bias", as_is),
    _V + "encoder.layers.{i}.mlp.fc1.weight": ("vision.layers.fc1", transpose),
    _V + "encoder.layers.{i}.mlp.fc1.bias": ("vision.layers.fc1_bias", as_is),
    _V + "encoder.layers.{i}.mlp.fc2.weight": ("vision.layers.fc2", transpose),
    _V + "encoder.layers.{i}.mlp.fc2.bias": ("vision.layers.fc2_bias", as_is),
    _V + "post_layernorm.weight": ("vision.post_norm.scale", as_is),
    _V + "post_layernorm.bias": ("vision.post_norm.bias", as_is),
    _T + "embeddings.word_embeddings.weight": ("text.embed", as_is),
    _T + "embeddings.position_embeddings.weight": ("text.position_embed", as_is),
    _T + "embeddings.LayerNorm.weight": ("text.norm.scale", as_is),
    _T + "embeddings.LayerNorm.bias": ("text.norm.bias", as_is),
    _L + "attention.self.query.weight": ("text.layers.attention.q_proj", heads_out),
    _L + "attention.self.query.bias": ("text.layers.attention.q_bias", heads_bias),
    _L + "attention.self.key.weight": ("text.layers.attention.k_proj", heads_out),
    _L + "attention.self.key.bias": ("text.layers.attention.k_bias", heads_bias),
    _L + "attention.self.value.weight": ("text.layers.attention.v_proj", heads_out),
    _L + "attention.self.value.bias": ("text.layers.attention.v_bias", heads_bias),
    _L + "attention.output.dense.weight": ("text.layers.attention.o_proj", heads_in),
    _L + "attention.output.dense.bias": ("text.layers.attention.o_bias", as_is),
    _L + "attention.output.LayerNorm.weight": ("text.layers.attention.norm.scale", as_is),
    _L + "attention.output.LayerNorm.bias": ("text.layers.attention.norm.bias", as_is),
    _L + "crossattention.self.query.weight": ("text.layers.cross.q_proj", heads_out),
    _L + "crossattention.self.query.bias": ("text.layers.cross.q_bias", heads_bias),
    _L + "crossattention.self.key.weight": ("text.layers.cross.k_proj", heads_out),
    _L + "crossattention.self.key.bias": ("text.layers.cross.k_bias", heads_bias),
    _L + "crossattention.self.value.weight": ("text.layers.cross.v_proj", heads_out),
    _L + "crossattention.self.value.bias": ("text.layers.cross.v_bias", heads_bias),
    _L + "crossattention.output.dense.weight": ("text.layers.cross.o_proj", heads_in),
    _L + "crossattention.output.dense.bias": ("text.layers.cross.o_bias", as_is),
    _L + "crossattention.output.LayerNorm.weight": ("text.layers.cross.norm.scale", as_is),
    _L + "crossattention.output.LayerNorm.bias": ("text.layers.cross.norm.bias", as_is),
    _L + "intermediate.dense.weight": ("text.layers.fc1", transpose),
    _L + "intermediate.dense.bias": ("text.layers.fc1_bias", as_is),
    _L + "output.dense.weight": ("text.layers.fc2", transpose),
    _L + "output.dense.bias": ("text.layers.fc2_bias", as_is),
    _L + "output.LayerNorm.weight": ("text.layers.norm.scale", as_is),
    _L + "output.LayerNorm.bias": ("text.layers.norm.bias", as_is),
    "itm_head.weight": ("head.weight", transpose),
    "itm_head.bias": ("head.bias", as_is),
    "vision_proj.weight": ("vision_proj.weight", transpose),
    "vision_proj.bias": ("vision_proj.bias", as_is),
    "text_proj.weight": ("text_proj.weight", transpose),
    "text_proj.bias": ("text_proj.bias", as_is),
}

FUSED: Fused = {"self_attn.qkv.": ("self_attn.query.", "self_attn.key.", "self_attn.value.")}

HF = Naming(
    prefixes=(),
    unread={"*.embeddings.position_ids": "0, 1, 2, ... (older transformers stored it)"},
)

EXPORT: dict[str, str] = {}


def to_hf(config: BlipItmConfig) -> dict[str, Any]:
    """The HF config.json whose `BlipItmConfig.from_hf` is `config`."""
    v, t = config.vision, config.text
    return {
        "architectures": list(ARCHITECTURES),
        "model_type": "blip",
        "image_text_hidden_size": config.projection_width,
        "text_config": {
            "model_type": "blip_text_model",
            "is_decoder": True,
            "vocab_size": t.vocab_size,
            "hidden_size": t.width,
            "encoder_hidden_size": v.width,
            "intermediate_size": t.mlp_width,
            "num_hidden_layers": t.num_layers,
            "num_attention_heads": t.num_heads,
            "max_position_embeddings": t.max_length,
            "hidden_act": t.activation,
            "layer_norm_eps": t.norm_eps,
            # Ids of text generation, which matching has no use for; transformers would put in BERT's.
            "bos_token_id": None,
            "eos_token_id": None,
            "sep_token_id": None,
        },
        "vision_config": config.vision.to_hf("blip_vision_model"),
    }


__all__ = ["ARCHITECTURES", "EXPORT", "FUSED", "HF", "TABLE", "BlipItmConfig", "specs", "to_hf"]
