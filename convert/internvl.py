"""InternVL checkpoints: names, layouts on disk, configuration.

The table uses the names of the published checkpoints in the layout of transformers (OpenGVLab/InternVL3_5-8B-HF), which
transformers 4 and 5 save alike. Checkpoints of the original code (OpenGVLab/InternVL3_5-8B, `InternVLChatModel`) have
the names of `ORIGINAL`, queries, keys and values of the tower in one tensor, and a config that `assemble` translates.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxvqa.convert import llava
from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.files import copy_processor, write_json
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
    split_fused,
    transpose,
)
from jaxvqa.convert.tensors import Tensor, read_json
from jaxvqa.models.internvl import InternVLConfig, specs

ARCHITECTURES = ("InternVLForConditionalGeneration", "InternVLChatModel")
"""InternVL of transformers, and of the original code."""

IMAGE_TOKEN = "<IMG_CONTEXT>"

_V = "vision_tower."
_L = _V + "encoder.layer.{i}."
_P = "multi_modal_projector."
_T = "language_model."

TABLE: Table = {
    _V + "embeddings.cls_token": ("vision.class_embed", as_is),
    _V + "embeddings.position_embeddings": ("vision.position_embed", as_is),
    _V + "embeddings.patch_embeddings.projection.weight": ("vision.patch_embed", conv),
    _V + "embeddings.patch_embeddings.projection.bias": ("vision.patch_bias", as_is),
    _L + "layernorm_before.weight": ("vision.layers.norm1.scale", as_is),
    _L + "layernorm_before.bias": ("vision.layers.norm1.bias", as_is),
    _L + "attention.q_proj.weight": ("vision.layers.q_proj", heads_out),
    _L + "attention.q_proj.bias": ("vision.layers.q_bias", heads_bias),
    _L + "attention.q_norm.weight": ("vision.layers.q_norm", heads_bias),
    _L + "attention.k_proj.weight": ("vision.layers.k_proj", heads_out),
    _L + "attention.k_proj.bias": ("vision.layers.k_bias", heads_bias),
    _L + "attention.k_norm.weight": ("vision.layers.k_norm", heads_bias),
    _L + "attention.v_proj.weight": ("vision.layers.v_proj", heads_out),
    _L + "attention.v_proj.bias": ("vision.layers.v_bias", heads_bias),
    _L + "attention.projection_layer.weight": ("vision.layers.o_proj", heads_in),
    _L + "attention.projection_layer.bias": ("vision.layers.o_bias", as_is),
    _L + "lambda_1": ("vision.layers.scale1", as_is),
    _L + "layernorm_after.weight": ("vision.layers.norm2.scale", as_is),
    _L + "layernorm_after.bias": ("vision.layers.norm2.bias", as_is),
    _L + "mlp.fc1.weight": ("vision.layers.fc1", transpose),
    _L + "mlp.fc1.bias": ("vision.layers.fc1_bias", as_is),
    _L + "mlp.fc2.weight": ("vision.layers.fc2", transpose),
    _L + "mlp.fc2.bias": ("vision.layers.fc2_bias", as_is),
    _L + "lambda_2": ("vision.layers.scale2", as_is),
    _P + "layer_norm.weight": ("projector.norm.scale", as_is),
    _P + "layer_norm.bias": ("projector.norm.bias", as_is),
    _P + "linear_1.weight": ("projector.fc1", transpose),
    _P + "linear_1.bias": ("projector.fc1_bias", as_is),
    _P + "linear_2.weight": ("projector.fc2", transpose),
    _P + "linear_2.bias": ("projector.fc2_bias", as_is),
    **decoder_table(_T + "model.", _T + "lm_head.weight"),
}

HF = Naming(
    prefixes=(
        # transformers 4.52 to 5, module names (save_original_format=False)
        ("model.vision_tower.", _V),
        ("model.multi_modal_projector.", _P),
        ("model.language_model.", _T + "model."),
        ("lm_head.", _T + "lm_head."),
    ),
    unread=llava.BUFFERS,
)

ORIGINAL = Naming(
    prefixes=(
        ("vision_model.embeddings.class_embedding", _V + "embeddings.cls_token"),
        ("vision_model.embeddings.position_embedding", _V + "embeddings.position_embeddings"),
        ("vision_model.embeddings.patch_embedding.", _V + "embeddings.patch_embeddings.projection."),
        ("vision_model.encoder.layers.", _V + "encoder.layer."),
        ("mlp1.0.", _P + "layer_norm."),
        ("mlp1.1.", _P + "linear_1."),
        ("mlp1.3.", _P + "linear_2."),
    ),
    unread=llava.BUFFERS,
)
"""The text model's names are those of the table."""

_ORIGINAL_LAYER = {
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}
"""What stands in a block's names of the original -> what stands in the table's."""

_ORIGINAL_FUSED: Fused = {".attention.qkv.": (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")}

FUSED: Fused = {}

EXPORT: dict[str, str] = {}


def is_original(hf: dict[str, Any]) -> bool:
    """Whether a config.json is of the original layout."""
    return hf.get("model_type") == "internvl_chat"


def original_tensors(tensors: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors of an original checkpoint under the table's names, the fused ones split."""
    named = []
    for tensor in tensors:
        if (name := ORIGINAL.canonical(tensor.name)) is None:
            continue
        if name.startswith(_V):
            for theirs, ours in _ORIGINAL_LAYER.items():
                name = name.replace(theirs, ours)
        named.append((name, tensor))
    return split_fused(named, _ORIGINAL_FUSED)


def assemble(hf: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An HF InternVL config from an original one and the tokenizer in its folder, which knows the image token.

    Raises `ConversionError` with everything that is missing, and every option that the layout of HF does not have.
    """
    parts = {key: hf.get(key) or {} for key in ("llm_config", "vision_config")}
    vision, text = parts["vision_config"], parts["llm_config"]
    faults = [f"{key} is missing" for key, part in parts.items() if not part]
    faults += [f"vision_config.{key} is missing" for key in _ORIGINAL_VISION if vision and key not in vision]
    faults += [
        f"{key} {hf[key]!r}, expected {value!r}"
        for key, value in _ORIGINAL_FIXED.items()
        if hf.get(key, value) != value
    ]
    if vision and hf.get("force_image_size") not in (None, side := vision.get("image_size")):
        faults.append(f"force_image_size {hf['force_image_size']!r}, expected vision_config.image_size ({side!r})")
    if faults:
        raise ConversionError("config.json of the original InternVL layout is not supported", faults)
    return {
        "architectures": list(ARCHITECTURES[:1]),
        "model_type": "internvl",
        "text_config": text,
        "vision_config": {"model_type": "internvl_vision"}
        | {theirs: vision[ours] for ours, theirs in _ORIGINAL_VISION.items()},
        "image_token_id": _image_token_id(folder),
        "downsample_ratio": hf.get("downsample_ratio", 0.5),
        "vision_feature_layer": hf.get("select_layer", -1),
        "tie_word_embeddings": text.get("tie_word_embeddings", hf.get("tie_word_embeddings", False)),
    }


# The vision keys that shape the model: the original's -> HF's.
_ORIGINAL_VISION = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
# Version 1 of pixel shuffle leaves the grid transposed.
_ORIGINAL_FIXED = {"ps_version": "v2", "dynamic_image_size": True, "use_thumbnail": True, "pad2square": False}


def _image_token_id(folder: Path) -> int:
    """The id of the image token, from whichever of the tokenizer's files has it."""
    ids: dict[str, int] = {}
    if (path := folder / "tokenizer_config.json").exists():
        ids |= {t["content"]: int(i) for i, t in read_json(path).get("added_tokens_decoder", {}).items()}
    if (path := folder / "tokenizer.json").exists():
        ids |= {t["content"]: t["id"] for t in read_json(path).get("added_tokens", [])}
    if (path := folder / "added_tokens.json").exists():
        ids |= read_json(path)
    if IMAGE_TOKEN not in ids:
        raise ConversionError(f"{folder}: the tokenizer has no token {IMAGE_TOKEN}; expected it in tokenizer.json")
    return ids[IMAGE_TOKEN]


def write_processor(folder: Path, hf: dict[str, Any], out: Path) -> None:
    """The tokenizer of an original folder, and the image processor of transformers that cuts tiles as its code does."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    copy_processor(folder, out)
    side = hf["vision_config"]["image_size"]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
    processor = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        min_patches=hf.get("min_dynamic_patch", 1),
        max_patches=hf.get("max_dynamic_patch", 12),
        crop_to_patches=True,
        image_mean=mean,
        image_std=std,
    )
    write_json(out / "preprocessor_config.json", processor.to_dict())


def to_hf(config: InternVLConfig) -> dict[str, Any]:
    """The HF config.json whose `InternVLConfig.from_hf` is `config`."""
    return {
        "architectures": list(ARCHITECTURES[:1]),
        "model_type": "internvl",
        "image_token_id": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "downsample_ratio": 1 / config.shuffle,
        "projector_hidden_act": config.projector_activation,
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.decoder.tied,
        "text_config": config.decoder.to_hf(),
        "vision_config": config.vision.to_hf(),
    }


__all__ = [
    "ARCHITECTURES",
    "EXPORT",
    "FUSED",
    "HF",
    "ORIGINAL",
    "TABLE",
    "InternVLConfig",
    "assemble",
    "is_original",
    "original_tensors",
    "specs",
    "to_hf",
    "write_processor",
]
