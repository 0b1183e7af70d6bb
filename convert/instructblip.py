"""InstructBLIP checkpoints with a Vicuna decoder (HF `InstructBlipForConditionalGeneration`): names, configuration.

The names are those of the published checkpoints (Salesforce/instructblip-vicuna-7b), which transformers 4 and 5 write
alike. Queries, keys and values of the vision tower are one tensor there, `qkv`.
"""

from typing import Any

from jaxvqa.convert import blip_itm, llava
from jaxvqa.convert.tables import Fused, Naming, Table, as_is, decoder_table, heads_bias, heads_in, heads_out, transpose
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
    **decoder_table("language_model.model.", "language_model.lm_head.weight"),
}

FUSED: Fused = blip_itm.FUSED

HF = Naming(prefixes=(), unread=llava.BUFFERS)

EXPORT: dict[str, str] = {}


def to_hf(config: InstructBlipConfig) -> dict[str, Any]:
    """The HF config.json whose `InstructBlipConfig.from_hf` is `config`."""
    return {
        "architectures": list(ARCHITECTURES),
        "model_type": "instructblip",
        "image_token_index": config.image_token_id,
        "num_query_tokens": config.image_tokens,
        "text_config": config.decoder.to_hf(),
        "qformer_config": config.qformer.to_hf(),
        "vision_config": eva.config_to_hf(config.vision),
    }


__all__ = [
    "ARCHITECTURES",
    "EXPORT",
    "FUSED",
    "HF",
    "TABLE",
    "InstructBlipConfig",
    "specs",
    "to_hf",
]
