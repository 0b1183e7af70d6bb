"""EVA-ViT-g, InstructBLIP's image encoder: BLIP's vision tower (`vision.blip`) in another size."""

from typing import Any

from jaxvqa.errors import JaxVQAError
from jaxvqa.vision.blip import BlipVision, encode, specs
from jaxvqa.vision.clip import ClipConfig

KIND = "instructblip_vision_model"


def config_from_hf(hf: dict[str, Any]) -> ClipConfig:
    """Read HF's `vision_config`; raises `JaxVQAError` that names the offending key."""
    if not hf.get("qkv_bias", True):
        raise JaxVQAError("vision qkv_bias false: the tower's queries, keys and values have biases; expected true")
    return ClipConfig.from_hf(hf, KIND)


def config_to_hf(c: ClipConfig) -> dict[str, Any]:
    """HF's `vision_config`; the inverse of `config_from_hf`."""
    return c.to_hf(KIND) | {"qkv_bias": True}


__all__ = ["KIND", "BlipVision", "config_from_hf", "config_to_hf", "encode", "specs"]
