"""LLaVA-1.5: a CLIP tower, a two-layer connector, a Llama decoder.

Image features replace the image placeholders of the prompt in order, so a prompt may hold any number of images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.tree_util import register_dataclass, register_static
from PIL import Image

from jaxvqa import decoder, geometry
from jaxvqa.decoder import Decoder, DecoderConfig
from jaxvqa.errors import JaxVQAError
from jaxvqa.geometry import Geometry
from jaxvqa.images import pad_to_square
from jaxvqa.models.common import Projector, embed, extend, flops, prefill, project, projector_specs, resume
from jaxvqa.typing import Array, Float
from jaxvqa.vision import clip
from jaxvqa.vision.clip import Clip, ClipConfig
from jaxvqa.vision.inputs import ImageInput

SETUPS = {"pad": "vicuna_v1", "hf": "vicrop_hf"}
"""How images are made ready, and the prompt template with which the published results of that were made: "pad" (to a
square with the mean colour, the original LLaVA-1.5) or "hf" (what the checkpoint's image processor does by itself: a
centre crop)."""


@register_static
@dataclass(frozen=True)
class LlavaConfig:
    """Configuration of a LLaVA-1.5 model."""

    vision: ClipConfig
    decoder: DecoderConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    select: str
    """"default" drops the class token, "full" keeps it."""
    projector_activation: str
    projector_bias: bool

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlavaConfig":
        """Read an HF config.json; raises `JaxVQAError` that names the offending key."""
        if missing := [k for k in ("text_config", "vision_config") if k not in hf]:
            raise JaxVQAError(f"config.json of a llava model lacks {', '.join(missing)}")
        layers = hf.get("vision_feature_layer", -2)
        select = hf.get("vision_feature_select_strategy", "default")
        if select not in ("default", "full"):
            raise JaxVQAError(f"vision_feature_select_strategy {select!r}: expected 'default' or 'full'")
        activation = hf.get("projector_hidden_act", "gelu")
        if activation not in clip.ACTIVATIONS:
            raise JaxVQAError(f"projector_hidden_act {activation!r}: supported are {', '.join(clip.ACTIVATIONS)}")
        text = hf["text_config"]
        tied = hf.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        image_token = hf.get("image_token_id", hf.get("image_token_index", 32000))
        config = cls(
            vision=ClipConfig.from_hf(hf["vision_config"]),
            decoder=DecoderConfig.from_hf(text, tied=bool(tied)),
            image_token_id=image_token,
            feature_layers=(layers,) if isinstance(layers, int) else tuple(layers),
            select=select,
            projector_activation=activation,
            projector_bias=hf.get("multimodal_projector_bias", True),
        )
        for layer in config.feature_layers:
            clip.hidden_index(config.vision, layer)
        return config

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.vision.grid

    @property
    def image_tokens(self) -> int:
        """Decoder tokens of one image; with select="full" the class token comes first."""
        return self.grid[0] * self.grid[1] + (self.select == "full")


@register_dataclass
@dataclass(frozen=True)
class Llava:
    """All parameters."""

    vision: Clip
    projector: Projector
    decoder: Decoder


def specs(c: LlavaConfig) -> Llava:
    """Declare every parameter: shape, logical axes, initialisation."""
    width_in = c.vision.width * len(c.feature_layers)
    return Llava(
        vision=clip.specs(c.vision),
        projector=projector_specs(width_in, c.decoder.width, bias=c.projector_bias),
        decoder=decoder.specs(c.decoder),
    )


def check_processor(c: LlavaConfig, processor: Any) -> None:
    """`JaxVQAError` unless the processor shows the encoder whole squares of its side: cells and pixels would part."""
    side = c.vision.image_size
    sizes = [dict(processor.size)] + ([dict(processor.crop_size)] if processor.do_center_crop else [])
    found = {size.get(name, size.get("shortest_edge")) for size in sizes for name in ("height", "width")}
    if found != {side}:
        raise JaxVQAError(f"preprocessor_config.json makes images of {sizes}; the vision tower needs {side}x{side}")
    if not processor.do_center_crop and "shortest_edge" in processor.size:
        raise JaxVQAError("preprocessor_config.json resizes the shortest edge without do_center_crop: no square image")


def default_buckets(c: LlavaConfig, processor: Any) -> tuple[int, ...]:
    """All images have the same number of tokens."""
    return (c.image_tokens,)


def geometry_of(
    c: LlavaConfig, processor: Any, size: tuple[int, int], buckets: tuple[int, ...], setup: str = "pad"
) -> Geometry:
    """Where each image token of an image of `size` (W, H) looks."""
    place = geometry.for_pad
    if setup != "pad":
        place = geometry.for_crop if processor.do_center_crop else geometry.for_squash
    return place(*size, c.vision.image_size, c.grid)


def process(
    c: LlavaConfig, processor: Any, image: Image.Image, buckets: tuple[int, ...], setup: str = "pad"
) -> ImageInput:
    """An image for the encoder: f32 [E, E, 3], by the checkpoint's processor."""
    red, green, blue = (int(255 * mean) for mean in processor.image_mean)
    shown = pad_to_square(image, (red, green, blue)) if setup == "pad" else image
    pixels = processor(images=[shown], return_tensors="np")["pixel_values"][0]
    first = c.image_tokens - c.grid[0] * c.grid[1]  # a class token before the cells
    return ImageInput(
        np.ascontiguousarray(pixels.transpose(1, 2, 0), np.float32),
        geometry_of(c, processor, image.size, buckets, setup),
        np.arange(first, c.image_tokens, dtype=np.int32),
        c.image_tokens,
        c.image_tokens,
    )


def encode_images(
    params: Llava, c: LlavaConfig, pixels: Float[Array, "M E E 3"], *, backend: str = "auto"
) -> Float[Array, "M P D"]:
    """Image tokens in the decoder's space, row-major."""
    x = clip.encode(params.vision, c.vision, pixels, c.feature_layers, backend=backend)
    return project(params.projector, x if c.select == "full" else x[:, 1:], c.projector_activation)


def image_flops(c: LlavaConfig, arrays: Any = None) -> int:
    """Analytic FLOPs of encoding one image, connector included; all have the same size."""
    v, D = c.vision, c.decoder.width
    T = v.grid[0] * v.grid[1] + 1
    layers = max(clip.hidden_index(v, f) for f in c.feature_layers)
    block = T * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 2 * T * T * v.width
    connector = c.image_tokens * (v.width * len(c.feature_layers) * D + D * D)
    return 2 * (T * 3 * v.patch_size**2 * v.width + layers * block + connector)


__all__ = [
    "SETUPS",
    "Llava",
    "LlavaConfig",
    "Projector",
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
