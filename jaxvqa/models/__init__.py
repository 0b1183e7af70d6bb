"""Model families.

A family that answers (of `jaxvqa.VLM`) is a module with a config class (`from_hf`, `grid`, `image_tokens`, `vision`,
`decoder`) and the functions `specs`, `encode_images`, `embed`, `prefill`, `extend`, `resume`, `flops` and
`image_flops`; one that matches (of `jaxvqa.Matcher`) has `specs`, `encode_images`, `match`,
`match_gradient`, `gradcam`, `flops` and `image_flops`.
"""

import dataclasses
import json
import sys
from hashlib import sha256
from types import ModuleType
from typing import Any

from jaxvqa.errors import JaxVQAError
from jaxvqa.models import blip_itm, instructblip, internvl, llava, llava_next, llava_onevision, qwen2_5_vl, qwen3_vl

# HF `model_type` -> the family's config class, which lies in the family's module.
FAMILIES: dict[str, type] = {
    "instructblip": instructblip.InstructBlipConfig,
    "internvl": internvl.InternVLConfig,
    "llava": llava.LlavaConfig,
    "llava_next": llava_next.LlavaNextConfig,
    "llava_onevision": llava_onevision.LlavaOnevisionConfig,
    "blip": blip_itm.BlipItmConfig,
    "qwen2_5_vl": qwen2_5_vl.QwenVLConfig,
    "qwen2_vl": qwen2_5_vl.QwenVLConfig,
    "qwen3_vl": qwen3_vl.Qwen3VLConfig,
}


def config_from_hf(hf: dict[str, Any]) -> Any:
    """The family's config from the contents of an HF config.json; JaxVQAError for an unsupported architecture."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise JaxVQAError(f"config.json: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind].from_hf(hf)


def family_of(config: Any) -> ModuleType:
    """The module that computes with `config`."""
    return sys.modules[type(config).__module__]


def fingerprint(config: Any) -> str:
    """A hash of a model's configuration: the same in every process, whatever the weights."""
    said = json.dumps([type(config).__name__, dataclasses.asdict(config)], sort_keys=True)
    return sha256(said.encode()).hexdigest()
