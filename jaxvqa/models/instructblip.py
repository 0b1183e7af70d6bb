"""InstructBLIP: EVA-ViT-g, a Q-Former that reads the question, a Vicuna decoder.

What the decoder sees of an image depends on the text: `encode_images` gives the tower's states, which can be kept with
the image, and the Q-Former runs with the prompt. Several images pass it one by one, each with the whole text, and their
queries stand side by side before it (as ViCrop's two-image prompts have them). A query looks at the whole image, so no
token shows a cell: `transforms.query_map` reaches the cells through the Q-Former's cross-attention.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass, register_static
from PIL import Image

from jaxvqa import decoder, geometry
from jaxvqa.decoder import Cache, Decoder, DecoderConfig
from jaxvqa.decoding import Output
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.geometry import Geometry
from jaxvqa.models import common, qformer
from jaxvqa.models.blip_itm import Linear
from jaxvqa.models.common import embed, flops, resume
from jaxvqa.models.qformer import Asked, QFormer, QFormerConfig
from jaxvqa.sharding import ACT_BTD, BATCH, ArraySpec, constrain, einsum, layout
from jaxvqa.taps import ReadSpec
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision import eva
from jaxvqa.vision.clip import ClipConfig
from jaxvqa.vision.eva import BlipVision
from jaxvqa.vision.inputs import ImageInput

SETUPS = {"hf": "instructblip"}
"""How images are made ready, and the prompt template of that: squashed, by the checkpoint's image processor."""


@register_static
@dataclass(frozen=True)
class InstructBlipConfig:
    """Configuration of an InstructBLIP model."""

    vision: ClipConfig
    qformer: QFormerConfig
    decoder: DecoderConfig
    image_token_id: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "InstructBlipConfig":
        """Read an HF config.json; raises `JaxVQAError` that names the offending key."""
        if missing := [k for k in ("text_config", "vision_config", "qformer_config") if k not in hf]:
            raise JaxVQAError(f"config.json of an instructblip model lacks {', '.join(missing)}")
        image_token = hf.get("image_token_index", hf.get("image_token_id"))
        if image_token is None:
            raise JaxVQAError(
                "config.json of an instructblip model lacks image_token_index (checkpoints of before 2024 have none); "
                "fetch its current revision"
            )
        vision = eva.config_from_hf(hf["vision_config"])
        return cls(
            vision=vision,
            qformer=QFormerConfig.from_hf(hf["qformer_config"], hf.get("num_query_tokens", 32), vision.width),
            decoder=DecoderConfig.from_hf(hf["text_config"]),
            image_token_id=image_token,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image patches."""
        return self.vision.grid

    @property
    def image_tokens(self) -> int:
        """Decoder tokens of one image: the Q-Former's queries."""
        return self.qformer.num_queries

    @property
    def looking(self) -> int:
        """The cross-attention, counted by itself, that says where queries look: the third of six (ViCrop)."""
        count = len(self.qformer.cross_layers)
        return min((2 * count + 3) // 6, count - 1)

    @property
    def image_states(self) -> int:
        """S: states of one image that the Q-Former attends to, the class token's first."""
        return self.grid[0] * self.grid[1] + 1


@register_dataclass
@dataclass(frozen=True)
class InstructBlip:
    """All parameters."""

    vision: BlipVision
    qformer: QFormer
    projector: Linear
    decoder: Decoder


def specs(c: InstructBlipConfig) -> InstructBlip:
    """Declare every parameter: shape, logical axes, initialisation."""
    D, Dq = c.decoder.width, c.qformer.width
    return InstructBlip(
        vision=eva.specs(c.vision),
        qformer=qformer.specs(c.qformer),
        projector=Linear(ArraySpec((Dq, D), (None, "embed")), ArraySpec((D,), (None,), "zeros")),
        decoder=decoder.specs(c.decoder),
    )


def check_processor(c: InstructBlipConfig, processor: Any) -> None:
    """`JaxVQAError` unless the processor squashes images to the encoder's square."""
    side, size = c.vision.image_size, dict(processor.size)
    if size != {"height": side, "width": side} or not processor.do_resize:
        raise JaxVQAError(f"preprocessor_config.json makes images of {size}; the vision tower needs {side}x{side}")


def default_buckets(c: InstructBlipConfig, processor: Any) -> tuple[int, ...]:
    """All images have the same number of tokens."""
    return (c.image_tokens,)


def geometry_of(
    c: InstructBlipConfig, processor: Any, size: tuple[int, int], buckets: tuple[int, ...], setup: str = "hf"
) -> Geometry:
    """Where each patch of an image of `size` (W, H) looks."""
    return geometry.for_squash(*size, c.vision.image_size, c.grid)


def process(
    c: InstructBlipConfig, processor: Any, image: Image.Image, buckets: tuple[int, ...], setup: str = "hf"
) -> ImageInput:
    """An image for the encoder: f32 [E, E, 3], by the checkpoint's processor. No token shows a cell: `cells` is empty.

    Its features have a row per state that the Q-Former attends to (`capacity`), but it is `c.image_tokens` tokens.
    """
    pixels = processor(images=[image], return_tensors="np")["pixel_values"][0]
    return ImageInput(
        np.ascontiguousarray(pixels.transpose(1, 2, 0), np.float32),
        geometry_of(c, processor, image.size, buckets, setup),
        np.zeros(0, np.int32),
        c.image_tokens,
        c.image_states,
        c.image_tokens,
    )


def ask(c: InstructBlipConfig, tokenizer: Any, text: str) -> Int[np.ndarray, "T"]:
    """A prompt's text, images left out, in the ids of the Q-Former's own tokenizer.

    Raises UserError for a text that is longer than the Q-Former's positions.
    """
    ids = np.asarray(tokenizer(text)["input_ids"], np.int32)
    if len(ids) > c.qformer.max_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens for the Q-Former, which reads {c.qformer.max_length}; shorten it"
        )
    if ids.max(initial=0) >= c.qformer.vocab_size:
        raise JaxVQAError(
            f"the Q-Former's tokenizer gives id {ids.max()}, its vocabulary has {c.qformer.vocab_size} tokens; "
            f"expected the tokenizer of the folder qformer_tokenizer"
        )
    return ids


def encode_images(
    params: InstructBlip, c: InstructBlipConfig, pixels: Float[Array, "M E E 3"], *, backend: str = "auto"
) -> Float[Array, "M S Dv"]:
    """What the Q-Former attends to: image tokens of normalised pixels, the class token first."""
    return eva.encode(params.vision, c.vision, pixels, backend=backend)


def query_images(
    params: InstructBlip,
    c: InstructBlipConfig,
    features: Float[Array, "B IS Dv"],
    asked: Asked,
    *,
    bias: Float[Array, "B I #N S"] | None = None,
    perturb: Float[Array, "C B I Q N H"] | None = None,
    cross: ReadSpec = ReadSpec(),
    backend: str = "auto",
) -> tuple[Float[Array, "B IQ D"], dict[str, Array]]:
    """The images' tokens in the decoder's space, those of a row side by side, and what `cross` reads.

    features: of `encode_images`, those of a row side by side. asked: one text per row, for all its images.
    bias, perturb, cross: as in `qformer.run`, by row and image: "rows" are [C, B, I, *N, Q, S], "values"
        [C, B, I, S, N, H].
    """
    B, S, Q = len(features), c.image_states, c.image_tokens
    images = features.shape[1] // S

    def each(x, shape, axis=0):
        """Rows and their images as one axis, or as two."""
        axes = (*(None,) * axis, *BATCH)
        return jnp.reshape(constrain(x, axes), (*x.shape[:axis], *shape), out_sharding=layout(axes))

    def repeat(x):
        return jnp.repeat(constrain(x, BATCH), images, axis=0, out_sharding=layout(BATCH))

    x, read = qformer.run(
        params.qformer,
        c.qformer,
        Asked(repeat(asked.ids), repeat(asked.lengths)),
        each(features, (B * images, S, features.shape[-1])),
        bias=None if bias is None else each(bias, (B * images, *bias.shape[2:])),
        perturb=None if perturb is None else each(perturb, (B * images, *perturb.shape[3:]), 1),
        cross=cross,
        backend=backend,
    )
    x = einsum("BTD,DE->BTE", x[:, :Q], params.projector.weight, out=ACT_BTD) + params.projector.bias
    return each(x, (B, images * Q, x.shape[-1])), {
        name: each(found, (B, images, *found.shape[2:]), 1) for name, found in read.items()
    }


def prefill(
    params: InstructBlip,
    c: InstructBlipConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    features: Float[Array, "B IS Dv"] | None = None,
    slots: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T 3"] | None = None,
    *,
    asked: Asked | None = None,
    bias: Float[Array, "B I #N S"] | None = None,
    perturb: Float[Array, "C B I Q N H"] | None = None,
    cross: ReadSpec = ReadSpec(),
    **kwargs: Any,
) -> Output:
    """Run right-padded prompts. Further keyword arguments as for `decoder.run`; `capacity` keeps a cache for decoding.

    features: of `encode_images`, those of a row side by side; None runs text alone.
    slots: which of the I·Q query tokens of its row's images each token is; -1 for text.
    asked: the texts for the Q-Former (`ask`), one per row; needed with `features`.
    bias, perturb, cross: edits and readouts of the Q-Former's cross-attentions (`qformer.run`), by row and image. What
        is read comes back in `Output.readouts`.
    """
    tokens, read = _tokens(params, c, features, asked, bias, perturb, cross, kwargs.get("backend", "auto"))
    out = common.prefill(params, c, ids, lengths, tokens, slots, positions, **kwargs)
    return _with_readouts(out, read)


def extend(
    params: InstructBlip,
    c: InstructBlipConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: Cache,
    features: Float[Array, "B IS Dv"] | None = None,
    slots: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T 3"] | None = None,
    *,
    asked: Asked | None = None,
    bias: Float[Array, "B I #N S"] | None = None,
    perturb: Float[Array, "C B I Q N H"] | None = None,
    cross: ReadSpec = ReadSpec(),
    **kwargs: Any,
) -> Output:
    """Append right-padded tokens, which may hold images, to each row of a cache: a further turn. See `prefill`."""
    tokens, read = _tokens(params, c, features, asked, bias, perturb, cross, kwargs.get("backend", "auto"))
    out = common.extend(params, c, ids, lengths, cache, tokens, slots, positions, **kwargs)
    return _with_readouts(out, read)


def _tokens(params, c, features, asked, bias, perturb, cross, backend):
    if features is None:
        if cross.layers:
            raise JaxVQAError("a prompt without images has no cross-attention to read")
        return None, {}
    if asked is None:
        raise JaxVQAError("prompts with images need `asked`: the Q-Former reads their text")
    return query_images(params, c, features, asked, bias=bias, perturb=perturb, cross=cross, backend=backend)


def _with_readouts(out: Output, read: dict[str, Array]) -> Output:
    if not read:
        return out
    return replace(out, readouts=replace(out.readouts, cross=read.get("rows"), cross_values=read.get("values")))


def image_flops(c: InstructBlipConfig, arrays: Any = None) -> int:
    """Analytic FLOPs of encoding one image, without the Q-Former; all have the same size."""
    v, T = c.vision, c.image_states
    block = T * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 2 * T * T * v.width
    return 2 * (T * 3 * v.patch_size**2 * v.width + v.num_layers * block)


def query_flops(c: InstructBlipConfig, tokens: int, start: int = 0) -> int:
    """Analytic FLOPs of one image's way through the Q-Former and into the decoder, beside a text of `tokens` ids.

    start: the cross-attention from which on they count.
    """
    projection = 2 * c.image_tokens * c.qformer.width * c.decoder.width
    rest = replace(c.qformer, num_layers=c.qformer.num_layers - start * c.qformer.every)
    return qformer.flops(rest, tokens, c.image_states) + projection


__all__ = [
    "SETUPS",
    "Asked",
    "InstructBlip",
    "InstructBlipConfig",
    "ask",
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
    "query_flops",
    "query_images",
    "resume",
    "specs",
]
