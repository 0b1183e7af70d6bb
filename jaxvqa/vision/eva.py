"""EVA-ViT-g, InstructBLIP's image encoder: BLIP's vision tower (`vision.blip`) in another size."""

from typing import Any

from jaxvqa.errors import JaxVQAError
from jaxvqa.vision.blip import BlipVision, encode, specs
from jaxvqa.vision.clip import ClipConfig

KIND = "instructblip_vision_model"


def config_from_hf(hf: dict[str, Any]) -> ClipConfig:
    """Read HF's `vision_config`; raises `JaxVQAError` that names the offending key."""
    hf = _DEFAULTS | {k: v for k, v in hf.items() if v is not None}
    if hf["model_type"] != KIND:
        raise JaxVQAError(f"vision model type {hf['model_type']!r} is not supported; supported is {KIND}")
    if not isinstance(hf["image_size"], int) or not isinstance(hf["patch_size"], int):
        raise JaxVQAError(f"image_size {hf['image_size']}, patch_size {hf['patch_size']}: expected a number each")
    if not hf["qkv_bias"]:
        raise JaxVQAError("vision qkv_bias false: the tower's queries, keys and values have biases; expected true")
    return ClipConfig.from_hf(hf | {"model_type": "blip_vision_model"}, "blip_vision_model")


def config_to_hf(c: ClipConfig) -> dict[str, Any]:
    """HF's `vision_config`; the inverse of `config_from_hf`."""
    return c.to_hf(KIND) | {"qkv_bias": True}


# HF's InstructBlipVisionConfig, whose values a config.json leaves out when equal.
_DEFAULTS = {
    "model_type": KIND,
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}

__all__ = ["KIND", "BlipVision", "config_from_hf", "config_to_hf", "encode", "specs"]
