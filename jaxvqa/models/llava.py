"""LLaVA-1.5: a CLIP tower, a two-layer connector, a Llama decoder.

Image features replace the image placeholders of the prompt in order, so a prompt may hold any number of images.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.tree_util import register_dataclass, register_static

from jaxvqa import decoder
from jaxvqa.decoder import Cache, Decoder, DecoderConfig, right_padded
from jaxvqa.decoding import Output, forward
from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import ACT_BTD, BATCH, ArraySpec, constrain, einsum, layout
from jaxvqa.taps import ReadSpec
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision import clip
from jaxvqa.vision.clip import Clip, ClipConfig


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
class Projector:
    fc1: Float[Array, "Dv D"]
    fc1_bias: Float[Array, "D"] | None
    fc2: Float[Array, "D D"]
    fc2_bias: Float[Array, "D"] | None


@register_dataclass
@dataclass(frozen=True)
class Llava:
    """All parameters."""

    vision: Clip
    projector: Projector
    decoder: Decoder


def specs(c: LlavaConfig) -> Llava:
    """Declare every parameter: shape, logical axes, initialisation."""
    width_in, D = c.vision.width * len(c.feature_layers), c.decoder.width
    bias = ArraySpec((D,), (None,), "zeros") if c.projector_bias else None
    return Llava(
        vision=clip.specs(c.vision),
        projector=Projector(ArraySpec((width_in, D), (None, "embed")), bias, ArraySpec((D, D), (None, "embed")), bias),
        decoder=decoder.specs(c.decoder),
    )


def encode_images(
    params: Llava, c: LlavaConfig, pixels: Float[Array, "M E E 3"], *, backend: str = "auto"
) -> Float[Array, "M P D"]:
    """Image tokens in the decoder's space, row-major."""
    x = clip.encode(params.vision, c.vision, pixels, c.feature_layers, backend=backend)
    if c.select == "default":
        x = x[:, 1:]
    p = params.projector
    x = einsum("BTC,CD->BTD", x, p.fc1, out=ACT_BTD)
    x = clip.ACTIVATIONS[c.projector_activation](x if p.fc1_bias is None else x + p.fc1_bias)
    x = einsum("BTD,DE->BTE", x, p.fc2, out=ACT_BTD)
    return x if p.fc2_bias is None else x + p.fc2_bias


def embed(
    params: Llava,
    c: LlavaConfig,
    ids: Int[Array, "B T"],
    features: Float[Array, "B I P D"] | None,
    before: Int[Array, "B"] | None = None,
) -> Float[Array, "B T D"]:
    """Word embeddings, with the n-th image placeholder of a row replaced by the row's n-th image token.

    before: image tokens that `ids` do not hold, as they came earlier.
    """
    x = decoder.embed_tokens(params.decoder, ids)
    if features is None:
        return x
    B, _, _, D = features.shape
    features = jnp.reshape(constrain(features, BATCH), (B, -1, D), out_sharding=layout(BATCH))
    is_image = ids == c.image_token_id
    index = jnp.cumsum(is_image, axis=1) - 1 + (0 if before is None else before[:, None])
    index = jnp.clip(index, 0, features.shape[1] - 1)
    tokens = jnp.take_along_axis(features, index[:, :, None], axis=1)
    return jnp.where(is_image[:, :, None], tokens.astype(x.dtype), x)


def prefill(
    params: Llava,
    c: LlavaConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    features: Float[Array, "B I P D"] | None = None,
    **kwargs,
) -> Output:
    """Run right-padded prompts. Keyword arguments as for `decoder.run`; `capacity` keeps a cache for decoding."""
    return forward(params.decoder, c.decoder, right_padded(embed(params, c, ids, features), lengths), **kwargs)


def extend(
    params: Llava,
    c: LlavaConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: Cache,
    features: Float[Array, "B I P D"] | None = None,
    before: Int[Array, "B"] | None = None,
    **kwargs,
) -> Output:
    """Append right-padded tokens, which may hold images, to each row of a cache: a further turn, a prompt's rest.

    before: image tokens of `features` that the cache holds already.
    """
    stream = right_padded(embed(params, c, ids, features, before), lengths, cache.length)
    return forward(params.decoder, c.decoder, stream, cache=cache, **kwargs)


def resume(
    params: Llava, c: LlavaConfig, hidden: Float[Array, "B T D"], lengths: Int[Array, "B"], spec: ReadSpec, **kwargs
) -> Output:
    """Go on from layer `spec.start` with the hidden states of a prefill that stopped there."""
    return forward(params.decoder, c.decoder, right_padded(hidden, lengths), spec=spec, **kwargs)


def flops(c: LlavaConfig, tokens: int, keys: int, logits: int = 1) -> int:
    """Analytic FLOPs of one row's decoder pass: 2 per multiply-add, `tokens` queries over `keys` keys on average."""
    d = c.decoder
    weights = d.width * d.head_dim * 2 * (d.num_heads + d.num_kv_heads) + 3 * d.width * d.mlp_width
    attention = 2 * d.num_heads * d.head_dim * keys
    return 2 * (d.num_layers * tokens * (weights + attention) + logits * d.width * d.vocab_size)


def image_flops(c: LlavaConfig) -> int:
    """Analytic FLOPs of encoding one image, connector included."""
    v, D = c.vision, c.decoder.width
    T = v.grid[0] * v.grid[1] + 1
    layers = max(clip.hidden_index(v, f) for f in c.feature_layers)
    block = T * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 2 * T * T * v.width
    connector = c.image_tokens * (v.width * len(c.feature_layers) * D + D * D)
    return 2 * (T * 3 * v.patch_size**2 * v.width + layers * block + connector)
