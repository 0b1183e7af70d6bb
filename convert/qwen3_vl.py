"""Qwen3-VL checkpoints: names and configuration.

The names are those of the published checkpoints (Qwen/Qwen3-VL-8B-Instruct), which transformers 4 and 5 write alike,
but for queries, keys and values of the vision tower: there they are one tensor, `qkv`.
"""

from typing import Any

from jaxvqa.convert.tables import (
    Fused,
    Naming,
    Table,
    as_is,
    conv3d,
    decoder_table,
    heads_bias,
    heads_in,
    heads_out,
    transpose,
)
from jaxvqa.models.qwen3_vl import Qwen3VLConfig, specs

ARCHITECTURES = ("Qwen3VLForConditionalGeneration",)

_V = "model.visual."
_B = _V + "blocks.{i}."
_M = _V + "merger."
_S = _V + "deepstack_merger_list.{i}."
_T = "model.language_model."

TABLE: Table = {
    _V + "patch_embed.proj.weight": ("vision.tower.patch_embed", conv3d),
    _V + "patch_embed.proj.bias": ("vision.patch_bias", as_is),
    _V + "pos_embed.weight": ("vision.position_embed", as_is),
    _B + "norm1.weight": ("vision.tower.blocks.norm1.scale", as_is),
    _B + "norm1.bias": ("vision.tower.blocks.norm1.bias", as_is),
    _B + "attn.q.weight": ("vision.tower.blocks.q_proj", heads_out),
    _B + "attn.q.bias": ("vision.tower.blocks.q_bias", heads_bias),
    _B + "attn.k.weight": ("vision.tower.blocks.k_proj", heads_out),
    _B + "attn.k.bias": ("vision.tower.blocks.k_bias", heads_bias),
    _B + "attn.v.weight": ("vision.tower.blocks.v_proj", heads_out),
    _B + "attn.v.bias": ("vision.tower.blocks.v_bias", heads_bias),
    _B + "attn.proj.weight": ("vision.tower.blocks.o_proj", heads_in),
    _B + "attn.proj.bias": ("vision.tower.blocks.o_bias", as_is),
    _B + "norm2.weight": ("vision.tower.blocks.norm2.scale", as_is),
    _B + "norm2.bias": ("vision.tower.blocks.norm2.bias", as_is),
    _B + "mlp.linear_fc1.weight": ("vision.tower.blocks.mlp.fc1", transpose),
    _B + "mlp.linear_fc1.bias": ("vision.tower.blocks.mlp.fc1_bias", as_is),
    _B + "mlp.linear_fc2.weight": ("vision.tower.blocks.mlp.fc2", transpose),
    _B + "mlp.linear_fc2.bias": ("vision.tower.blocks.mlp.fc2_bias", as_is),
    _M + "norm.weight": ("vision.tower.merger.norm.scale", as_is),
    _M + "norm.bias": ("vision.tower.merger.norm.bias", as_is),
    _M + "linear_fc1.weight": ("vision.tower.merger.mlp.fc1", transpose),
    _M + "linear_fc1.bias": ("vision.tower.merger.mlp.fc1_bias", as_is),
    _M + "linear_fc2.weight": ("vision.tower.merger.mlp.fc2", transpose),
    _M + "linear_fc2.bias": ("vision.tower.merger.mlp.fc2_bias", as_is),
    _S + "norm.weight": ("vision.deepstack.norm.scale", as_is),
    _S + "norm.bias": ("vision.deepstack.norm.bias", as_is),
    _S + "linear_fc1.weight": ("vision.deepstack.mlp.fc1", transpose),
    _S + "linear_fc1.bias": ("vision.deepstack.mlp.fc1_bias", as_is),
    _S + "linear_fc2.weight": ("vision.deepstack.mlp.fc2", transpose),
    _S + "linear_fc2.bias": ("vision.deepstack.mlp.fc2_bias", as_is),
    **decoder_table(_T, "lm_head.weight"),
}

FUSED: Fused = {"attn.qkv.": ("attn.q.", "attn.k.", "attn.v.")}

HF = Naming(prefixes=(), unread={})

EXPORT: dict[str, str] = {}


def to_hf(config: Qwen3VLConfig) -> dict[str, Any]:
    """The HF config.json whose `Qwen3VLConfig.from_hf` is `config`."""
    return {
        "architectures": list(ARCHITECTURES),
        "model_type": "qwen3_vl",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "tie_word_embeddings": config.decoder.tied,
        "text_config": config.decoder.to_hf("qwen3_vl_text"),
        "vision_config": config.vision.to_hf(),
    }


__all__ = ["ARCHITECTURES", "EXPORT", "FUSED", "HF", "TABLE", "Qwen3VLConfig", "specs", "to_hf"]
