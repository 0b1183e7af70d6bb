"""InternVL3 and 3.5 (arXiv:2508.18265): InternViT on square tiles, pixel shuffle, a projector, Qwen2 or Qwen3.

An image is squashed onto the canvas of rows × columns tiles whose shape is nearest to its own. Its tokens are those of
the tiles, in reading order, each tile's row by row, and, where there is more than one, those of a thumbnail: the whole
image as one tile.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass, register_static
from PIL import Image

from jaxvqa import decoder
from jaxvqa.decoder import Decoder, DecoderConfig
from jaxvqa.errors import JaxVQAError
from jaxvqa.geometry import Geometry
from jaxvqa.models.common import Projector, embed, extend, flops, prefill, project, projector_specs, resume
from jaxvqa.sharding import ACT_BTD, BATCH, constrain, layout
from jaxvqa.typing import Array, Float
from jaxvqa.vision import clip, intern
from jaxvqa.vision.inputs import ImageInput, bucket_of
from jaxvqa.vision.intern import Intern, InternConfig

SETUPS = {"hf": "internvl"}
"""How images are made ready, and the prompt template of that: as HF's processor does it, in tiles with a thumbnail."""

_CANVASES = (2, 4, 6, 9, 12, 20, 40)
"""Sizes of canvases that the default buckets hold exactly: those of photographs and screens."""


@register_static
@dataclass(frozen=True)
class InternVLConfig:
    """Configuration of an InternVL model."""

    vision: InternConfig
    decoder: DecoderConfig
    image_token_id: int
    feature_layer: int
    """HF's hidden state of the tower that is read: -1 is the last block's output."""
    shuffle: int
    """Pixel shuffle: squares of shuffle × shuffle patches become one token."""
    projector_activation: str

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "InternVLConfig":
        """Read an HF config.json; raises `JaxVQAError` that names every offending key of a part."""
        if missing := [k for k in ("text_config", "vision_config") if k not in hf]:
            raise JaxVQAError(f"config.json of an internvl model lacks {', '.join(missing)}")
        hf = _DEFAULTS | {k: v for k, v in hf.items() if v is not None}
        text = {k: v for k, v in hf["text_config"].items() if v is not None}
        vision = InternConfig.from_hf(hf["vision_config"])
        shuffle, layer = round(1 / hf["downsample_ratio"]), hf["vision_feature_layer"]
        faults = []
        if vision.grid[0] % shuffle or shuffle * hf["downsample_ratio"] != 1:
            faults.append(
                f"downsample_ratio {hf['downsample_ratio']} (expected 1/n that divides {vision.grid} patches)"
            )
        if (select := hf["vision_feature_select_strategy"]) != "default":
            faults.append(f"vision_feature_select_strategy {select!r} (supported: 'default')")
        if (activation := hf["projector_hidden_act"]) not in clip.ACTIVATIONS:
            faults.append(f"projector_hidden_act {activation!r} (supported: {', '.join(clip.ACTIVATIONS)})")
        if not isinstance(layer, int):
            faults.append(f"vision_feature_layer {layer!r} (supported: one layer)")
        if faults:
            raise JaxVQAError(f"config.json: {'; '.join(faults)}")
        clip.hidden_index(vision, layer)
        # transformers 5 ties by the outer key; transformers 4 wrote it into the text part only.
        tied = hf.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
        return cls(
            vision=vision,
            decoder=DecoderConfig.from_hf(_without_dynamic_rope(text), tied=tied),
            image_token_id=hf["image_token_id"],
            feature_layer=layer,
            shuffle=shuffle,
            projector_activation=activation,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens of one tile, which is what a small square image has."""
        rows, columns = self.vision.grid
        return rows // self.shuffle, columns // self.shuffle

    @property
    def image_tokens(self) -> int:
        """Decoder tokens of one tile."""
        return self.grid[0] * self.grid[1]


# HF's defaults, left out of a config.json when equal.
_DEFAULTS = {
    "image_token_id": 151667,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}


def _without_dynamic_rope(text: dict[str, Any]) -> dict[str, Any]:
    """InternVL3 names dynamic rope scaling, which begins beyond `max_position_embeddings`, where our context ends."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) != "dynamic":
        return text
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return text | {"rope_scaling": None, "rope_parameters": theta | {"rope_type": "default"}}


@register_dataclass
@dataclass(frozen=True)
class InternVL:
    """All parameters."""

    vision: Intern
    projector: Projector
    decoder: Decoder


def specs(c: InternVLConfig) -> InternVL:
    """Declare every parameter: shape, logical axes, initialisation."""
    return InternVL(
        vision=intern.specs(c.vision),
        projector=projector_specs(c.vision.width * c.shuffle**2, c.decoder.width, norm=True),
        decoder=decoder.specs(c.decoder),
    )


def check_processor(c: InternVLConfig, processor: Any) -> None:
    """`JaxVQAError` unless the image processor cuts tiles of the tower's side."""
    size, side = dict(processor.size), c.vision.image_size
    if (size.get("height"), size.get("width")) != (side, side) or not hasattr(processor, "max_patches"):
        raise JaxVQAError(
            f"preprocessor_config.json: {type(processor).__name__} of size {size}; expected GotOcr2ImageProcessor, "
            f"with the tower's tiles of {side}x{side}"
        )


def default_buckets(c: InternVLConfig, processor: Any) -> tuple[int, ...]:
    """Numbers of tiles, thumbnail included, to which images are padded; the last is the most that any image has."""
    most = processor.max_patches
    return tuple(sorted({1, *(n + 1 for n in (*_CANVASES, most) if 1 < n <= most)}))


def canvas_of(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles on which HF's processor draws an image of `size` (W, H)."""
    if processor.max_patches == 1:
        return 1, 1
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    tile = (processor.size["height"], processor.size["width"])
    columns, rows = get_optimal_tiled_canvas(size[::-1], tile, processor.min_patches, processor.max_patches)
    return rows, columns


def geometry_of(
    c: InternVLConfig, processor: Any, size: tuple[int, int], buckets: tuple[int, ...], setup: str = "hf"
) -> Geometry:
    """Where the tokens of an image of `size` (W, H) look: those of its tiles, not of the thumbnail."""
    (rows, columns), (h, w), side = canvas_of(processor, size), c.grid, c.vision.image_size
    return Geometry(
        mode="tiles",
        image_size=size,
        encoder_size=(columns * side, rows * side),
        grid=(rows * h, columns * w),
        origin=(0.0, 0.0),
        extent=(float(size[0]), float(size[1])),
        capacity=_bucket(rows * columns, buckets) * c.image_tokens,
    )


def process(
    c: InternVLConfig, processor: Any, image: Image.Image, buckets: tuple[int, ...], setup: str = "hf"
) -> ImageInput:
    """An image as tiles, f32 [bucket, E, E, 3], by HF's processor; UserError where no bucket holds them."""
    place = geometry_of(c, processor, image.size, buckets, setup)
    pixels = processor(images=[image], crop_to_patches=True, return_tensors="np")["pixel_values"]
    (h, w), (rows, columns) = c.grid, canvas_of(processor, image.size)
    bucket = _bucket(rows * columns, buckets)
    tiles = np.zeros((bucket, *pixels.shape[2:], 3), np.float32)
    tiles[: len(pixels)] = pixels.transpose(0, 2, 3, 1)
    token = np.arange(rows * columns * h * w, dtype=np.int32).reshape(rows, columns, h, w)
    return ImageInput(
        arrays=tiles,
        geometry=place,
        cells=token.swapaxes(1, 2).ravel(),
        tokens=len(pixels) * c.image_tokens,
        capacity=bucket * c.image_tokens,
    )


def _bucket(canvas: int, buckets: tuple[int, ...]) -> int:
    """Tiles, padding included, of an image on a canvas of so many."""
    return bucket_of(canvas + (canvas > 1), buckets, f"an image of {canvas} tiles and a thumbnail")


def encode_images(
    params: InternVL, c: InternVLConfig, pixels: Float[Array, "M t E E 3"], *, backend: str = "auto"
) -> Float[Array, "M P D"]:
    """Image tokens in the decoder's space: tile by tile, each row-major."""
    M, t, *tile = pixels.shape
    tiles = jnp.reshape(constrain(pixels, BATCH), (M * t, *tile), out_sharding=layout(BATCH))
    stop = clip.hidden_index(c.vision, c.feature_layer)
    x = intern.encode(params.vision, c.vision, tiles, stop=stop, backend=backend)[:, 1:]
    x = project(params.projector, pixel_shuffle(x, c.vision.grid, c.shuffle), c.projector_activation)
    return jnp.reshape(x, (M, -1, x.shape[-1]), out_sharding=layout(ACT_BTD))


def pixel_shuffle(x: Float[Array, "M P D"], grid: tuple[int, int], s: int) -> Float[Array, "M Q C"]:
    """Squares of s × s neighbours of a row-major grid side by side in one token, row-major: Q = P / s², C = s² D."""
    (h, w), (M, _, D) = grid, x.shape
    x = jnp.reshape(x, (M, h // s, s, w // s, s, D), out_sharding=layout(BATCH)).swapaxes(2, 3)
    return jnp.reshape(x, (M, h * w // s**2, s**2 * D), out_sharding=layout(ACT_BTD))


def image_flops(c: InternVLConfig, arrays: Any) -> int:
    """Analytic FLOPs of encoding one padded image, tiles `arrays` [t, E, E, 3], projector included."""
    v, D = c.vision, c.decoder.width
    T = v.grid[0] * v.grid[1] + 1
    block = T * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 2 * T * T * v.width
    projector = c.image_tokens * (v.width * c.shuffle**2 * D + D * D)
    tower = T * 3 * v.patch_size**2 * v.width + clip.hidden_index(v, c.feature_layer) * block
    return 2 * len(arrays) * (tower + projector)


__all__ = [
    "SETUPS",
    "InternVL",
    "InternVLConfig",
    "Projector",
    "canvas_of",
    "check_processor",
    "default_buckets",
    "embed",
    "encode_images",
    "extend",
    "flops",
    "geometry_of",
    "image_flops",
    "pixel_shuffle",
    "prefill",
    "process",
    "resume",
    "specs",
]
