"""InstructBLIP checkpoints with a Vicuna decoder (HF `InstructBlipForConditionalGeneration`): names, configuration.

The names are those of the published checkpoints (Salesforce/instructblip-vicuna-7b), which transformers 4 and 5 write
alike. Queries, keys and values of the vision tower are one tensor there, `qkv`.
"""

from typing import Any

import numpy as np

from jaxvqa.convert import blip_itm, llava
from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.tables import Fused, Naming, Table, as_is, heads_bias, heads_in, heads_out, transpose
from jaxvqa.models.instructblip import InstructBlipConfig, specs
from jaxvqa.models.qformer import MAX_LAYERS
from jaxvqa.vision import eva

ARCHITECTURES = ("InstructBlipForConditionalGeneration",)

_Q = "qformer."
_L = _Q + "encoder.layer.{i}."

_QFORMER_LAYER: Table = {
    _L + "attention.attention.query.weight": ("attention.q_proj", heads_out),
    _L + "attention.attention.query.bias": ("attention.q_bias", heads_bias),
    _L + "attention.attention.key.weight": ("attention.k_proj", heads_out),
    _L + "attention.attention.key.bias": ("attention.k_bias", heads_bias),
    _L + "attention.attention.value.weight": ("attention.v_proj", heads_out),
    _L + "attention.attention.value.bias": ("attention.v_bias", heads_bias),
    _L + "attention.output.dense.weight": ("attention.o_proj", heads_in),
    _L + "attention.output.dense.bias": ("attention.o_bias", as_is),
    _L + "attention.output.LayerNorm.weight": ("attention.norm.scale", as_is),
    _L + "attention.output.LayerNorm.bias": ("attention.norm.bias", as_is),
    _L + "crossattention.attention.query.weight": ("cross.q_proj", heads_out),
    _L + "crossattention.attention.query.bias": ("cross.q_bias", heads_bias),
    _L + "crossattention.attention.key.weight": ("cross.k_proj", heads_out),
    _L + "crossattention.attention.key.bias": ("cross.k_bias", heads_bias),
    _L + "crossattention.attention.value.weight": ("cross.v_proj", heads_out),
    _L + "crossattention.attention.value.bias": ("cross.v_bias", heads_bias),
    _L + "crossattention.output.dense.weight": ("cross.o_proj", heads_in),
    _L + "crossattention.output.dense.bias": ("cross.o_bias", as_is),
    _L + "crossattention.output.LayerNorm.weight": ("cross.norm.scale", as_is),
    _L + "crossattention.output.LayerNorm.bias": ("cross.norm.bias", as_is),
    _L + "intermediate.dense.weight": ("text.fc1", transpose),
    _L + "intermediate.dense.bias": ("text.fc1_bias", as_is),
    _L + "output.dense.weight": ("text.fc2", transpose),
    _L + "output.dense.bias": ("text.fc2_bias", as_is),
    _L + "output.LayerNorm.weight": ("text.norm.scale", as_is),
    _L + "output.LayerNorm.bias": ("text.norm.bias", as_is),
    _L + "intermediate_query.dense.weight": ("query.fc1", transpose),
    _L + "intermediate_query.dense.bias": ("query.fc1_bias", as_is),
    _L + "output_query.dense.weight": ("query.fc2", transpose),
    _L + "output_query.dense.bias": ("query.fc2_bias", as_is),
    _L + "output_query.LayerNorm.weight": ("query.norm.scale", as_is),
    _L + "output_query.LayerNorm.bias": ("query.norm.bias", as_is),
}

# Tower and decoder have the names of two other families; the Q-Former's layers are not stacked, each has its own line.
TABLE: Table = {
    **{name: entry for name, entry in blip_itm.TABLE.items() if entry[0].startswith("vision.")},
    "query_tokens": ("qformer.queries", as_is),
    _Q + "embeddings.word_embeddings.weight": ("qformer.embed", as_is),
    _Q + "embeddings.position_embeddings.weight": ("qformer.position_embed", as_is),
    _Q + "embeddings.layernorm.weight": ("qformer.norm.scale", as_is),
    _Q + "embeddings.layernorm.bias": ("qformer.norm.bias", as_is),
    **{
        name.replace("{i}", str(i)): (f"qformer.layers.{i}.{path}", transform)
        for i in range(MAX_LAYERS)
        for name, (path, transform) in _QFORMER_LAYER.items()
    },
    "language_projection.weight": ("projector.weight", transpose),
    "language_projection.bias": ("projector.bias", as_is),
    **{name: entry for name, entry in llava.TABLE.items() if entry[0].startswith("decoder.")},
}

FUSED: Fused = blip_itm.FUSED

HF = Naming(prefixes=(), unread=llava.BUFFERS)

EXPORT: dict[str, str] = {}


def unread(config: InstructBlipConfig) -> dict[str, str]:
    """Further tensors that a checkpoint of `config` may hold and that are not read, with the reason."""
    return {"language_model.lm_head.weight": "the config ties it to the embedding"} if config.decoder.tied else {}


def exported(config: InstructBlipConfig, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The HF config.json of parameters by path, and the parameters as they are stored."""
    return to_hf(config) | {"dtype": str(arrays["decoder.embed"].dtype)}, arrays


def to_hf(config: InstructBlipConfig) -> dict[str, Any]:
    """The HF config.json whose `InstructBlipConfig.from_hf` is `config`."""
    d = config.decoder
    rope = {"rope_type": "default", "rope_theta": d.rope_theta}
    if d.rope_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": d.rope_factor}
    hf = {
        "architectures": list(ARCHITECTURES),
        "model_type": "instructblip",
        "image_token_index": config.image_token_id,
        "num_query_tokens": config.image_tokens,
        "text_config": {
            "model_type": "llama",
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
        "qformer_config": config.qformer.to_hf(),
        "vision_config": eva.config_to_hf(config.vision),
    }
    if (back := InstructBlipConfig.from_hf(hf)) != config:
        raise ConversionError(f"this config has no HF form: it reads back as {back}, expected {config}")
    return hf


__all__ = [
    "ARCHITECTURES",
    "EXPORT",
    "FUSED",
    "HF",
    "TABLE",
    "InstructBlipConfig",
    "exported",
    "specs",
    "to_hf",
    "unread",
]
