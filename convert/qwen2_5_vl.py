"""Qwen2.5-VL and Qwen2-VL checkpoints: names and configuration.

The names are those of the published checkpoints (Qwen/Qwen2.5-VL-7B-Instruct), which transformers 4 and 5 write alike,
but for queries, keys and values of the vision tower: there they are one tensor, `qkv`.
"""

from typing import Any

import numpy as np

from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.tables import Fused, Naming, Table, Transform, as_is, heads_bias, heads_in, heads_out, transpose
from jaxvqa.models.qwen2_5_vl import QwenVLConfig, specs

ARCHITECTURES = ("Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration")

conv3d = Transform("conv3d", (1, 2, 3, 4, 0))  # [D, 3, t, p, p] -> [3, t, p, p, D]

_V = "visual.blocks.{i}."
_M = "visual.merger."
_T = "model."
_L = _T + "layers.{i}."

TABLE: Table = {
    "visual.patch_embed.proj.weight": ("vision.patch_embed", conv3d),
    _V + "norm1.weight": ("vision.blocks.norm1.scale", as_is),
    _V + "norm1.bias": ("vision.blocks.norm1.bias", as_is),
    _V + "attn.q.weight": ("vision.blocks.q_proj", heads_out),
    _V + "attn.q.bias": ("vision.blocks.q_bias", heads_bias),
    _V + "attn.k.weight": ("vision.blocks.k_proj", heads_out),
    _V + "attn.k.bias": ("vision.blocks.k_bias", heads_bias),
    _V + "attn.v.weight": ("vision.blocks.v_proj", heads_out),
    _V + "attn.v.bias": ("vision.blocks.v_bias", heads_bias),
    _V + "attn.proj.weight": ("vision.blocks.o_proj", heads_in),
    _V + "attn.proj.bias": ("vision.blocks.o_bias", as_is),
    _V + "norm2.weight": ("vision.blocks.norm2.scale", as_is),
    _V + "norm2.bias": ("vision.blocks.norm2.bias", as_is),
    _V + "mlp.gate_proj.weight": ("vision.blocks.mlp.gate_proj", transpose),
    _V + "mlp.gate_proj.bias": ("vision.blocks.mlp.gate_bias", as_is),
    _V + "mlp.up_proj.weight": ("vision.blocks.mlp.up_proj", transpose),
    _V + "mlp.up_proj.bias": ("vision.blocks.mlp.up_bias", as_is),
    _V + "mlp.down_proj.weight": ("vision.blocks.mlp.down_proj", transpose),
    _V + "mlp.down_proj.bias": ("vision.blocks.mlp.down_bias", as_is),
    _V + "mlp.fc1.weight": ("vision.blocks.mlp.fc1", transpose),
    _V + "mlp.fc1.bias": ("vision.blocks.mlp.fc1_bias", as_is),
    _V + "mlp.fc2.weight": ("vision.blocks.mlp.fc2", transpose),
    _V + "mlp.fc2.bias": ("vision.blocks.mlp.fc2_bias", as_is),
    _M + "ln_q.weight": ("vision.merger.norm.scale", as_is),
    _M + "ln_q.bias": ("vision.merger.norm.bias", as_is),
    _M + "mlp.0.weight": ("vision.merger.mlp.fc1", transpose),
    _M + "mlp.0.bias": ("vision.merger.mlp.fc1_bias", as_is),
    _M + "mlp.2.weight": ("vision.merger.mlp.fc2", transpose),
    _M + "mlp.2.bias": ("vision.merger.mlp.fc2_bias", as_is),
    _T + "embed_tokens.weight": ("decoder.embed", as_is),
    _L + "input_layernorm.weight": ("decoder.layers.attn_norm", as_is),
    _L + "self_attn.q_proj.weight": ("decoder.layers.q_proj", heads_out),
    _L + "self_attn.q_proj.bias": ("decoder.layers.q_bias", heads_bias),
    _L + "self_attn.k_proj.weight": ("decoder.layers.k_proj", heads_out),
    _L + "self_attn.k_proj.bias": ("decoder.layers.k_bias", heads_bias),
    _L + "self_attn.v_proj.weight": ("decoder.layers.v_proj", heads_out),
    _L + "self_attn.v_proj.bias": ("decoder.layers.v_bias", heads_bias),
    _L + "self_attn.o_proj.weight": ("decoder.layers.o_proj", heads_in),
    _L + "post_attention_layernorm.weight": ("decoder.layers.mlp_norm", as_is),
    _L + "mlp.gate_proj.weight": ("decoder.layers.gate_proj", transpose),
    _L + "mlp.up_proj.weight": ("decoder.layers.up_proj", transpose),
    _L + "mlp.down_proj.weight": ("decoder.layers.down_proj", transpose),
    _T + "norm.weight": ("decoder.norm", as_is),
    "lm_head.weight": ("decoder.lm_head", transpose),
}

FUSED: Fused = {"attn.qkv.": ("attn.q.", "attn.k.", "attn.v.")}

HF = Naming(
    prefixes=(
        ("model.visual.", "visual."),  # module names, of transformers 4.52 and later
        ("model.language_model.", _T),
    ),
    unread={"*.inv_freq": "computed from the config"},
)

EXPORT: dict[str, str] = {}


def unread(config: QwenVLConfig) -> dict[str, str]:
    """Further tensors that a checkpoint of `config` may hold and that are not read, with the reason."""
    return {"lm_head.weight": "the config ties it to the embedding"} if config.decoder.tied else {}


def to_hf(config: QwenVLConfig) -> dict[str, Any]:
    """The HF config.json whose `QwenVLConfig.from_hf` is `config`."""
    d, gated = config.decoder, config.vision.gated
    kind = "qwen2_5_vl" if gated else "qwen2_vl"
    hf = {
        "architectures": [ARCHITECTURES[0 if gated else 1]],
        "model_type": kind,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "tie_word_embeddings": d.tied,
        "text_config": {
            "model_type": f"{kind}_text",
            "vocab_size": d.vocab_size,
            "hidden_size": d.width,
            "intermediate_size": d.mlp_width,
            "num_hidden_layers": d.num_layers,
            "num_attention_heads": d.num_heads,
            "num_key_value_heads": d.num_kv_heads,
            "max_position_embeddings": d.max_length,
            "rms_norm_eps": d.norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": d.rope_theta,
                "mrope_section": list(d.mrope or ()),
            },
            "hidden_act": "silu",
            "tie_word_embeddings": d.tied,
        },
        "vision_config": config.vision.to_hf(),
    }
    if (back := QwenVLConfig.from_hf(hf)) != config:
        raise ConversionError(f"this config has no HF form: it reads back as {back}, expected {config}")
    return hf


def exported(config: QwenVLConfig, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The HF config.json of parameters by path, and the parameters as they are stored."""
    return to_hf(config) | {"dtype": str(arrays["decoder.embed"].dtype)}, arrays


__all__ = ["ARCHITECTURES", "EXPORT", "FUSED", "HF", "TABLE", "QwenVLConfig", "exported", "specs", "to_hf", "unread"]
