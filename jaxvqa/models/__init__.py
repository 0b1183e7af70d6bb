"""Model families, one module each.

A family that answers (of `jaxvqa.VLM`) has a config class and these functions; c is the config, M counts images.

- The config: `from_hf`; `vision`, `decoder`, `image_token_id`; `grid` and `image_tokens` of a nominal square image.
- Parameters: `specs(c)` declares them.
- Images, on the host: `SETUPS` (how they can be made ready -> prompt template; the first is the default) and, where the
  images of a prompt of several are made ready otherwise, `SEVERAL`; `check_processor(c, processor)`;
  `default_buckets(c, processor)`, sizes to which images are padded, in the family's unit; `process(c, processor, image,
  buckets, setup)`, an `ImageInput`; `geometry_of(c, processor, size, buckets, setup)`, the same image's `Geometry`
  before it is made ready. Whatever depends on an image's size becomes arrays here, padded to a bucket, so that a
  program is compiled per bucket and padding changes nothing.
- Prompts, on the host: `positions(c, ids, geometries)`, where rotary positions are not 0, 1, 2, ...; `ask(c, tokenizer,
  text)`, where what the decoder sees of an image depends on the text (InstructBLIP, with `query_flops` and further
  arguments of `prefill` and `extend`).
- Programs: `encode_images(params, c, arrays)` -> [M, capacity, W], rows in the order of the image's tokens; `embed`,
  `prefill`, `extend` and `resume`, those of `common` unless the family differs (DeepStack, the Q-Former).
- Costs: `flops(c, ...)` of the decoder, `image_flops(c, arrays)` of one padded image.

One that matches (of `jaxvqa.Matcher`) has `specs`, `encode_images`, `match`, `match_gradient`, `gradcam`, `flops` and
`image_flops`.
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
