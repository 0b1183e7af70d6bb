"""Qwen3-VL checkpoints: names and configuration.

The names are those of the published checkpoints (Qwen/Qwen3-VL-8B-Instruct), which transformers 4 and 5 write alike,
but for queries, keys and values of the vision tower: there they are one tensor, `qkv`.
"""

from typing import Any

import numpy as np

from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.qwen2_5_vl import conv3d
from jaxvqa.convert.tables import Fused, Naming, Table, as_is, heads_bias, heads_in, heads_out, transpose
from jaxvqa.models.qwen3_vl import Qwen3VLConfig, specs

ARCHITECTURES = ("Qwen3VLForConditionalGeneration",)

_V = "model.visual."
_B = _V + "blocks.{i}."
_M = _V + "merger."
_S = _V + "deepstack_merger_list.{i}."
_T = "model.language_model."
_L = _T + "layers.{i}."

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
    _T + "embed_tokens.weight": ("decoder.embed", as_is),
    _L + "input_layernorm.weight": ("decoder.layers.attn_norm", as_is),
    _L + "self_attn.q_proj.weight": ("decoder.layers.q_proj", heads_out),
    _L + "self_attn.q_norm.weight": ("decoder.layers.q_norm", as_is),
    _L + "self_attn.k_proj.weight": ("decoder.layers.k_proj", heads_out),
    _L + "self_attn.k_norm.weight": ("decoder.layers.k_norm", as_is),
    _L + "self_attn.v_proj.weight": ("decoder.layers.v_proj", heads_out),
    _L + "self_attn.o_proj.weight": ("decoder.layers.o_proj", heads_in),
    _L + "post_attention_layernorm.weight": ("decoder.layers.mlp_norm", as_is),
    _L + "mlp.gate_proj.weight": ("decoder.layers.gate_proj", transpose),
    _L + "mlp.up_proj.weight": ("decoder.layers.up_proj", transpose),
    _L + "mlp.down_proj.weight": ("decoder.layers.down_proj", transpose),
    _T + "norm.weight": ("decoder.norm", as_is),
    "lm_head.weight": ("decoder.lm_head", transpose),
}

FUSED: Fused = {"attn.qkv.": ("attn.q.", "attn.k.", "attn.v.")}

HF = Naming(prefixes=(), unread={})

EXPORT: dict[str, str] = {}


def unread(config: Qwen3VLConfig) -> dict[str, str]:
    """Further tensors that a checkpoint of `config` may hold and that are not read, with the reason."""
    return {"lm_head.weight": "the config ties it to the embedding"} if config.decoder.tied else {}


def to_hf(config: Qwen3VLConfig) -> dict[str, Any]:
    """The HF config.json whose `Qwen3VLConfig.from_hf` is `config`."""
    d = config.decoder
    hf = {
        "architectures": list(ARCHITECTURES),
        "model_type": "qwen3_vl",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "tie_word_embeddings": d.tied,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": d.vocab_size,
            "hidden_size": d.width,
            "intermediate_size": d.mlp_width,
            "num_hidden_layers": d.num_layers,
            "num_attention_heads": d.num_heads,
            "num_key_value_heads": d.num_kv_heads,
            "head_dim": d.head_dim,
            "max_position_embeddings": d.max_length,
            "rms_norm_eps": d.norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": d.rope_theta,
                "mrope_section": list(d.mrope or ()),
                "mrope_interleaved": d.mrope_interleaved,
            },
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": d.tied,
        },
        "vision_config": config.vision.to_hf(),
    }
    if (back := Qwen3VLConfig.from_hf(hf)) != config:
        raise ConversionError(f"this config has no HF form: it reads back as {back}, expected {config}")
    return hf


def exported(config: Qwen3VLConfig, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The HF config.json of parameters by path, and the parameters as they are stored."""
    return to_hf(config) | {"dtype": str(arrays["decoder.embed"].dtype)}, arrays


__all__ = ["ARCHITECTURES", "EXPORT", "FUSED", "HF", "TABLE", "Qwen3VLConfig", "exported", "specs", "to_hf", "unread"]
