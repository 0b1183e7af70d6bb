"""Qwen2.5-VL and Qwen2-VL: a native-resolution tower, a Qwen2 decoder with multimodal rope. Images only, no video.

An image has as many tokens as its size asks for, h × w of them in raster order. Buckets count these tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.tree_util import register_dataclass, register_static
from PIL import Image

from jaxvqa import decoder
from jaxvqa.decoder import Decoder, DecoderConfig
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.geometry import Geometry
from jaxvqa.models.common import embed, extend, flops, prefill, resume
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision import qwen
from jaxvqa.vision.inputs import ImageInput, bucket_of
from jaxvqa.vision.qwen import Patches, QwenVision, QwenVisionConfig, patch_grid

SETUPS = {"hf": "qwen2_5_vl"}
"""How images are made ready, and the prompt template for it: "hf", what the checkpoint's image processor does."""


@register_static
@dataclass(frozen=True)
class QwenVLConfig:
    """Configuration of a Qwen2.5-VL or Qwen2-VL model."""

    vision: QwenVisionConfig
    decoder: DecoderConfig
    image_token_id: int
    video_token_id: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "QwenVLConfig":
        """Read an HF config.json, text options nested (transformers 5) or not (as published).

        Raises `JaxVQAError` with what is missing or not supported.
        """
        if "vision_config" not in hf:
            raise JaxVQAError("config.json of a Qwen-VL model lacks vision_config")
        kind = hf.get("model_type", "qwen2_5_vl")
        text = hf.get("text_config", hf) | {"model_type": f"{kind}_text"}
        tied = hf.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        config = cls(
            vision=QwenVisionConfig.from_hf(hf["vision_config"], kind),
            decoder=DecoderConfig.from_hf(text, tied=bool(tied)),
            image_token_id=hf.get("image_token_id", 151655),
            video_token_id=hf.get("video_token_id", 151656),
        )
        if (out := config.vision.out_width) != config.decoder.width:
            raise JaxVQAError(f"config.json: image tokens of width {out} for a decoder of width {config.decoder.width}")
        return config

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of the nominal square image."""
        side = self.vision.image_size // (self.vision.patch_size * self.vision.merge_size)
        return side, side

    @property
    def image_tokens(self) -> int:
        """Decoder tokens of the nominal square image."""
        return self.grid[0] * self.grid[1]


@register_dataclass
@dataclass(frozen=True)
class QwenVL:
    """All parameters."""

    vision: QwenVision
    decoder: Decoder


def specs(c: QwenVLConfig) -> QwenVL:
    """Declare every parameter: shape, logical axes, initialisation."""
    return QwenVL(qwen.specs(c.vision), decoder.specs(c.decoder))


def check_processor(c: Any, processor: Any) -> None:
    """`JaxVQAError` unless the image processor cuts the patches that the tower was made for."""
    v = c.vision
    want = {"patch_size": v.patch_size, "merge_size": v.merge_size, "temporal_patch_size": v.frames, "do_resize": True}
    if wrong := [
        f"{name} {found}, not {value}"
        for name, value in want.items()
        if (found := getattr(processor, name, None)) != value
    ]:
        raise JaxVQAError(f"preprocessor_config.json does not fit the vision tower: {'; '.join(wrong)}")
    qwen.pixel_limits(processor)


def default_buckets(c: Any, processor: Any) -> tuple[int, ...]:
    """Image tokens: halves, quarters, ... of the most that the processor gives."""
    return qwen.token_buckets(processor)


def geometry_of(c: Any, processor: Any, size: tuple[int, int], buckets: tuple[int, ...], setup: str = "hf") -> Geometry:
    """Where each image token of an image of `size` (W, H) looks. Raises UserError for one that fits no bucket."""
    m, p = processor.merge_size, processor.patch_size
    rows, columns = patch_grid(processor, size)
    h, w = rows // m, columns // m
    capacity = bucket_of(h * w, buckets, f"an image of {size[0]} x {size[1]} pixels")
    extent = (float(size[0]), float(size[1]))
    return Geometry("native", size, (columns * p, rows * p), (h, w), (0.0, 0.0), extent, capacity)


def process(
    c: QwenVLConfig, processor: Any, image: Image.Image, buckets: tuple[int, ...], setup: str = "hf"
) -> ImageInput:
    """An image for the tower, by the checkpoint's processor. Raises UserError for one that it cannot take."""
    place = geometry_of(c, processor, image.size, buckets, setup)
    (h, w), m = place.grid, c.vision.merge_size
    capacity = place.capacity or h * w
    made = processor(images=[image], return_tensors="np")
    if (found := tuple(made["image_grid_thw"][0])) != (1, h * m, w * m):
        raise JaxVQAError(
            f"the image processor made patches {found} of an image of {image.size}; expected {(1, h * m, w * m)}"
        )
    patches = qwen.lay_out(
        made["pixel_values"],
        place.grid,
        capacity,
        patch_size=c.vision.patch_size,
        merge_size=m,
        window=c.vision.window,
    )
    return ImageInput(patches, place, np.arange(h * w, dtype=np.int32), h * w, capacity)


def encode_images(params: QwenVL, c: QwenVLConfig, patches: Patches, *, backend: str = "auto") -> Float[Array, "M C D"]:
    """Image tokens in the decoder's space, row-major; those behind an image's own mean nothing."""
    return qwen.encode(params.vision, c.vision, patches, backend=backend)


def positions(c: Any, ids: Int[np.ndarray, "T"], geometries: Sequence[Geometry]) -> Int[np.ndarray, "T 3"]:
    """Multimodal rope positions (time, row, column) of a prompt (arXiv:2409.12191, §2.1).

    A word has its count three times over. An image stands still in time and counts rows and columns from where it
    begins; what follows it counts on from the largest of these.

    c: a config with `image_token_id` and `video_token_id`. geometries: of the prompt's images, in its order; every
        image token is a cell of its image's grid, in raster order.
    Raises UserError for a video token, JaxVQAError where image tokens and grids differ in number.
    """
    if (ids == c.video_token_id).any():
        raise UserError(
            f"the prompt has video tokens (id {c.video_token_id}): images only; give a video's frames as images"
        )
    slots = np.flatnonzero(ids == c.image_token_id)
    if len(slots) != (needed := sum(h * w for h, w in (g.grid for g in geometries))):
        raise JaxVQAError(f"the prompt has {len(slots)} image tokens; its {len(geometries)} images need {needed}")
    offsets, steps, at = np.zeros((len(ids), 3), np.int32), np.ones(len(ids), np.int32), 0
    for geometry in geometries:
        h, w = geometry.grid
        run = slots[at : at + h * w]
        offsets[run, 1], offsets[run, 2] = np.divmod(np.arange(h * w), w)
        steps[run], steps[run[-1]] = 0, max(h, w)
        at += h * w
    return offsets + (np.cumsum(steps) - steps)[:, None].astype(np.int32)


def image_flops(c: QwenVLConfig, arrays: Patches) -> int:
    """Analytic FLOPs of encoding one image, padding and merger included."""
    return qwen.flops(c.vision, arrays.window.shape[-1])


__all__ = [
    "SETUPS",
    "QwenVL",
    "QwenVLConfig",
    "check_processor",
    "default_buckets",
    "embed",
    "encode_images",
    "extend",
    "flops",
    "geometry_of",
    "image_flops",
    "positions",
    "prefill",
    "process",
    "resume",
    "specs",
]
