"""Qwen3-VL: a native-resolution tower, DeepStack, a Qwen3 decoder with interleaved multimodal rope.

Dense models, and images only, no video. An image has as many tokens as its size asks for, h × w of them in raster
order. Buckets count these tokens.

DeepStack (arXiv:2406.04334) is a plugin: the tower's features of depths 1 .. n, which lie behind the main one, are
added to the image tokens behind the decoder's first n layers. It is not in the output: what is decoded is text.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass, register_static
from PIL import Image

from jaxvqa import decoder
from jaxvqa.decoder import Cache, Decoder, DecoderConfig, Stream
from jaxvqa.decoding import Output
from jaxvqa.errors import JaxVQAError
from jaxvqa.models import common
from jaxvqa.models.common import flops, place
from jaxvqa.models.qwen2_5_vl import QwenVLConfig, check_processor, default_buckets, geometry_of, positions
from jaxvqa.taps import Edit, Plugin, ReadSpec
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision import qwen3
from jaxvqa.vision.inputs import ImageInput
from jaxvqa.vision.qwen3 import PlacedPatches, Qwen3Vision, Qwen3VisionConfig

SETUPS = {"hf": "qwen3_vl"}
"""How images are made ready, and the prompt template for it: "hf", what the checkpoint's image processor does."""


@register_static
@dataclass(frozen=True)
class Qwen3VLConfig(QwenVLConfig):
    """Configuration of a dense Qwen3-VL model."""

    vision: Qwen3VisionConfig

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Qwen3VLConfig":
        """Read an HF config.json. Raises `JaxVQAError` with what is missing or not supported."""
        if missing := [key for key in ("text_config", "vision_config") if key not in hf]:
            raise JaxVQAError(f"config.json of a Qwen3-VL model lacks {', '.join(missing)}")
        text = {"model_type": "qwen3_vl_text"} | hf["text_config"]
        tied = hf.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        config = cls(
            vision=Qwen3VisionConfig.from_hf(hf["vision_config"]),
            decoder=DecoderConfig.from_hf(text, tied=bool(tied)),
            image_token_id=hf.get("image_token_id", 151655),
            video_token_id=hf.get("video_token_id", 151656),
        )
        v, d, faults = config.vision, config.decoder, []
        if v.out_width != d.width:
            faults.append(f"image tokens of width {v.out_width} for a decoder of width {d.width}")
        if len(v.deepstack) >= d.num_layers:
            faults.append(f"{len(v.deepstack)} DeepStack features for a decoder of {d.num_layers} layers")
        if faults:
            raise JaxVQAError(f"config.json: {'; '.join(faults)}")
        return config


@register_dataclass
@dataclass(frozen=True)
class Qwen3VL:
    """All parameters."""

    vision: Qwen3Vision
    decoder: Decoder


def specs(c: Qwen3VLConfig) -> Qwen3VL:
    """Declare every parameter: shape, logical axes, initialisation."""
    return Qwen3VL(qwen3.specs(c.vision), decoder.specs(c.decoder))


def process(
    c: Qwen3VLConfig, processor: Any, image: Image.Image, buckets: tuple[int, ...], setup: str = "hf"
) -> ImageInput:
    """An image for the tower, by the checkpoint's processor. Raises UserError for one that it cannot take."""
    where = geometry_of(c, processor, image.size, buckets, setup)
    h, w = where.grid
    capacity = where.capacity or h * w
    pixels = processor(images=[image], return_tensors="np")["pixel_values"]
    arrays = qwen3.lay_out(c.vision, pixels, (h, w), capacity)
    return ImageInput(arrays, where, np.arange(h * w, dtype=np.int32), h * w, capacity)


def encode_images(
    params: Qwen3VL, c: Qwen3VLConfig, arrays: PlacedPatches, *, backend: str = "auto"
) -> Float[Array, "M C W"]:
    """Image tokens, row-major: main features of width D, then those of DeepStack; W = (1 + n)·D."""
    return qwen3.encode(params.vision, c.vision, arrays, backend=backend)


def image_flops(c: Qwen3VLConfig, arrays: PlacedPatches) -> int:
    """Analytic FLOPs of encoding one image, padding and mergers included."""
    return qwen3.flops(c.vision, arrays.weights.shape[-2])


def deepstack(
    c: Qwen3VLConfig, features: Float[Array, "B S W"] | None, slots: Int[Array, "B T"] | None
) -> tuple[Plugin, ...]:
    """The plugin that adds `features` behind the main one to the tokens that `slots` names; none without images."""
    cuts = tuple(range(1, len(c.vision.deepstack) + 1))
    return () if features is None or slots is None or not cuts else (Plugin(step, cuts, carry=(features, slots)),)


def step(
    params: None, cut: int, stream: Stream, carry: tuple[Float[Array, "B S W"], Int[Array, "B T"]]
) -> tuple[Stream, tuple[Float[Array, "B S W"], Int[Array, "B T"]], tuple[Edit, ...]]:
    """Add the features of depth `cut` to the image tokens."""
    features, slots = carry
    D = stream.hidden.shape[-1]
    added = place(jnp.zeros_like(stream.hidden), features[..., cut * D : (cut + 1) * D], slots)
    return replace(stream, hidden=stream.hidden + added), carry, ()


def embed(
    params: Qwen3VL,
    c: Qwen3VLConfig,
    ids: Int[Array, "B T"],
    features: Float[Array, "B S W"] | None,
    slots: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """Word embeddings of a prompt, with the main features of its images in their places."""
    return common.embed(params, c, ids, _main(c, features), slots)


def prefill(
    params: Qwen3VL,
    c: Qwen3VLConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    features: Float[Array, "B S W"] | None = None,
    slots: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T 3"] | None = None,
    *,
    plugins: tuple[Plugin, ...] = (),
    **kwargs: Any,
) -> Output:
    """As `common.prefill`, with DeepStack before the caller's plugins; the output has the caller's alone."""
    own = deepstack(c, features, slots)
    out = common.prefill(
        params, c, ids, lengths, _main(c, features), slots, positions, plugins=(*own, *plugins), **kwargs
    )
    return replace(out, plugins=out.plugins[len(own) :])


def extend(
    params: Qwen3VL,
    c: Qwen3VLConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: Cache,
    features: Float[Array, "B S W"] | None = None,
    slots: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T 3"] | None = None,
    *,
    plugins: tuple[Plugin, ...] = (),
    **kwargs: Any,
) -> Output:
    """As `common.extend`, with DeepStack as in `prefill`."""
    own = deepstack(c, features, slots)
    out = common.extend(
        params, c, ids, lengths, cache, _main(c, features), slots, positions, plugins=(*own, *plugins), **kwargs
    )
    return replace(out, plugins=out.plugins[len(own) :])


def resume(
    params: Qwen3VL,
    c: Qwen3VLConfig,
    hidden: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    spec: ReadSpec,
    positions: Int[Array, "B T 3"] | None = None,
    **kwargs: Any,
) -> Output:
    """As `common.resume`. Raises `JaxVQAError` for a layer before which DeepStack still adds to `hidden`."""
    if spec.start <= (last := len(c.vision.deepstack)):
        raise JaxVQAError(
            f"Qwen3-VL cannot go on from layer {spec.start}: image features enter before layers 1 to {last}, and they "
            f"are gone by then; stop at layer {last + 1} or above"
        )
    return common.resume(params, c, hidden, lengths, spec, positions, **kwargs)


def _main(c: Qwen3VLConfig, features: Float[Array, "B S W"] | None) -> Float[Array, "B S D"] | None:
    return None if features is None else features[..., : c.decoder.width]


__all__ = [
    "SETUPS",
    "Qwen3VL",
    "Qwen3VLConfig",
    "check_processor",
    "deepstack",
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
