"""Qwen2.5-VL and Qwen2-VL checkpoints: names and configuration.

The names are those of the published checkpoints (Qwen/Qwen2.5-VL-7B-Instruct), which transformers 4 and 5 write alike,
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
from jaxvqa.models.qwen2_5_vl import QwenVLConfig, specs

ARCHITECTURES = ("Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration")

_V = "visual.blocks.{i}."
_M = "visual.merger."
_T = "model."

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
    **decoder_table(_T, "lm_head.weight"),
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


def to_hf(config: QwenVLConfig) -> dict[str, Any]:
    """The HF config.json whose `QwenVLConfig.from_hf` is `config`."""
    kind = "qwen2_5_vl" if config.vision.gated else "qwen2_vl"
    return {
        "architectures": [ARCHITECTURES[not config.vision.gated]],
        "model_type": kind,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "tie_word_embeddings": config.decoder.tied,
        "text_config": config.decoder.to_hf(f"{kind}_text"),
        "vision_config": config.vision.to_hf(),
    }


__all__ = ["ARCHITECTURES", "EXPORT", "FUSED", "HF", "TABLE", "QwenVLConfig", "specs", "to_hf"]
