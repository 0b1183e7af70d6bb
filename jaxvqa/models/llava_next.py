"""LLaVA-NeXT (LLaVA-1.6): LLaVA-OneVision's tiles with a CLIP tower, a Llama or Mistral decoder, and whole grids.

Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024. All but the configuration is
`llava_onevision`'s.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from jax.tree_util import register_static

from jaxvqa.models.llava_onevision import (
    LlavaOnevisionConfig,
    check_processor,
    default_buckets,
    embed,
    encode_images,
    extend,
    flops,
    geometry_of,
    image_flops,
    prefill,
    process,
    resume,
    specs,
)

SETUPS = {"hf": "vicuna_v1", "pad": "vicuna_v1"}
"""As for LLaVA-OneVision, with the template of the Vicuna models."""


@register_static
@dataclass(frozen=True)
class LlavaNextConfig(LlavaOnevisionConfig):
    """Configuration of a LLaVA-NeXT model."""

    HF_DEFAULTS: ClassVar[dict[str, Any]] = {
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    }


__all__ = [
    "SETUPS",
    "LlavaNextConfig",
    "check_processor",
    "default_buckets",
    "embed",
    "encode_images",
    "extend",
    "flops",
    "geometry_of",
    "image_flops",
    "prefill",
    "process",
    "resume",
    "specs",
]
