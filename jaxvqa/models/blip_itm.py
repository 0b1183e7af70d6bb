"""BLIP image-text matching: a ViT, and a BERT whose every layer also attends to the image; two logits at its end.

The text is read in both directions; the head reads its first token. Not a `VLM` family: it has no decoder.
Letters beside the usual ones: S image tokens (the class token, then h·w patches).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass, register_static

from jaxvqa.attention import NEVER, Mask, attend, attention_rows
from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import ACT_BTD, ACT_BTNH, BATCH, ArraySpec, constrain, einsum, layout, stack, take
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision import blip
from jaxvqa.vision.blip import BlipVision
from jaxvqa.vision.clip import ACTIVATIONS, ClipConfig, LayerNorm, feed_forward, heads, layer_norm, norm_specs

MATCH = 1
"""The head's class that says that the text matches."""


@register_static
@dataclass(frozen=True)
class BlipTextConfig:
    """Sizes of the text encoder."""

    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    vocab_size: int
    max_length: int
    norm_eps: float
    activation: str

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "BlipTextConfig":
        """Read HF's `text_config`; raises `JaxVQAError` that names the offending key."""
        hf = _TEXT_DEFAULTS | {k: v for k, v in hf.items() if v is not None}
        if hf["model_type"] != "blip_text_model":
            raise JaxVQAError(f"text model type {hf['model_type']!r} is not supported; supported is blip_text_model")
        if not hf["is_decoder"]:
            raise JaxVQAError("text_config is_decoder false: the text encoder has no cross-attention; expected true")
        if hf["hidden_act"] not in ACTIVATIONS:
            raise JaxVQAError(f"text hidden_act {hf['hidden_act']!r}: supported are {', '.join(ACTIVATIONS)}")
        if hf["hidden_size"] % hf["num_attention_heads"]:
            raise JaxVQAError(
                f"text hidden_size {hf['hidden_size']}: expected a multiple of the {hf['num_attention_heads']} heads"
            )
        return cls(
            num_layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            num_heads=hf["num_attention_heads"],
            vocab_size=hf["vocab_size"],
            max_length=hf["max_position_embeddings"],
            norm_eps=hf["layer_norm_eps"],
            activation=hf["hidden_act"],
        )


# HF's BlipTextConfig defaults, left out of a config.json when equal.
_TEXT_DEFAULTS = {
    "model_type": "blip_text_model",
    "is_decoder": True,
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


@register_static
@dataclass(frozen=True)
class BlipItmConfig:
    """Configuration of a BLIP image-text retrieval model."""

    vision: ClipConfig
    text: BlipTextConfig
    projection_width: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "BlipItmConfig":
        """Read an HF config.json; raises `JaxVQAError` that names the offending key."""
        if missing := [k for k in ("text_config", "vision_config") if k not in hf]:
            raise JaxVQAError(f"config.json of a blip model lacks {', '.join(missing)}")
        return cls(
            vision=ClipConfig.from_hf(hf["vision_config"], "blip_vision_model"),
            text=BlipTextConfig.from_hf(hf["text_config"]),
            projection_width=hf.get("image_text_hidden_size", 256),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image patches."""
        return self.vision.grid


@register_dataclass
@dataclass(frozen=True)
class Linear:
    weight: Float[Array, "I O"]
    bias: Float[Array, "O"]


@register_dataclass
@dataclass(frozen=True)
class Attention:
    """Attention of the text (D) to itself or to the image (Dk), and the norm that closes it."""

    q_proj: Float[Array, "D N H"]
    q_bias: Float[Array, "N H"]
    k_proj: Float[Array, "Dk N H"]
    k_bias: Float[Array, "N H"]
    v_proj: Float[Array, "Dk N H"]
    v_bias: Float[Array, "N H"]
    o_proj: Float[Array, "N H D"]
    o_bias: Float[Array, "D"]
    norm: LayerNorm


@register_dataclass
@dataclass(frozen=True)
class TextLayer:
    """One layer; in a `BlipText` every leaf has a leading layer axis L."""

    attention: Attention
    cross: Attention
    fc1: Float[Array, "D F"]
    fc1_bias: Float[Array, "F"]
    fc2: Float[Array, "F D"]
    fc2_bias: Float[Array, "D"]
    norm: LayerNorm


@register_dataclass
@dataclass(frozen=True)
class BlipText:
    embed: Float[Array, "V D"]
    position_embed: Float[Array, "T D"]
    norm: LayerNorm
    layers: TextLayer


@register_dataclass
@dataclass(frozen=True)
class BlipItm:
    """All parameters. The two projections (BLIP's contrastive side) belong to the checkpoint; matching has no use."""

    vision: BlipVision
    text: BlipText
    head: Linear
    vision_proj: Linear
    text_proj: Linear


def attention_specs(width: int, num_heads: int, width_in: int, out_scale: float) -> Attention:
    """Declare an attention of states of `width` to some of `width_in`; `out_scale` is that of its output."""
    N, H, vector = num_heads, width // num_heads, ArraySpec((width,), (None,), "zeros")
    keys, bias = ArraySpec((width_in, N, H), ("embed", "heads", None)), ArraySpec((N, H), ("heads", None), "zeros")
    out = ArraySpec((N, H, width), ("heads", None, "embed"), scale=out_scale)
    queries = ArraySpec((width, N, H), ("embed", "heads", None))
    return Attention(queries, bias, keys, bias, keys, bias, out, vector, norm_specs(width))


def specs(c: BlipItmConfig) -> BlipItm:
    """Declare every parameter: shape, logical axes, initialisation."""
    t, D, F, Dv = c.text, c.text.width, c.text.mlp_width, c.vision.width
    N, out_scale = t.num_heads, 0.02 / (3 * t.num_layers) ** 0.5

    def vector(size: int) -> ArraySpec:
        return ArraySpec((size,), (None,), "zeros")

    def linear(size_in: int, size_out: int) -> Linear:
        return Linear(ArraySpec((size_in, size_out), ("embed", None)), vector(size_out))

    layer = TextLayer(
        attention=attention_specs(D, N, D, out_scale),
        cross=attention_specs(D, N, Dv, out_scale),
        fc1=ArraySpec((D, F), ("embed", "mlp")),
        fc1_bias=ArraySpec((F,), ("mlp",), "zeros"),
        fc2=ArraySpec((F, D), ("mlp", "embed"), scale=out_scale),
        fc2_bias=vector(D),
        norm=norm_specs(D),
    )
    return BlipItm(
        vision=blip.specs(c.vision),
        text=BlipText(
            embed=ArraySpec((t.vocab_size, D), ("vocab", "embed")),
            position_embed=ArraySpec((t.max_length, D), (None, "embed")),
            norm=norm_specs(D),
            layers=stack(layer, t.num_layers),
        ),
        head=linear(D, 2),
        vision_proj=linear(Dv, c.projection_width),
        text_proj=linear(D, c.projection_width),
    )


def encode_images(
    params: BlipItm, c: BlipItmConfig, pixels: Float[Array, "M E E 3"], *, backend: str = "auto"
) -> Float[Array, "M S D"]:
    """What the text attends to: image tokens of normalised pixels, the class token first."""
    return blip.encode(params.vision, c.vision, pixels, backend=backend)


def embed(
    params: BlipItm, c: BlipItmConfig, ids: Int[Array, "B T"], position: Int[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """Normalised sums of word and position embeddings. position: default 0, 1, 2, …"""
    text = params.text
    if ids.shape[1] > c.text.max_length and position is None:
        raise JaxVQAError(f"a text of {ids.shape[1]} tokens: the text encoder has {c.text.max_length} positions")
    places = constrain(text.position_embed, (None, None))
    places = places[: ids.shape[1]] if position is None else places[position]
    return layer_norm(take(text.embed, ids, ACT_BTD) + places, text.norm, c.text.norm_eps)


def text_mask(ids: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Mask:
    """Every token sees every token of its right-padded text."""
    order = jnp.where(jnp.arange(ids.shape[1]) < lengths[:, None], 0, NEVER)
    return Mask(jnp.zeros_like(order), order)


def run_layers(
    params: BlipItm,
    c: BlipItmConfig,
    x: Float[Array, "B T D"],
    mask: Mask,
    image: Float[Array, "B S Dk"],
    start: int = 0,
    stop: int | None = None,
    *,
    backend: str = "auto",
) -> Float[Array, "B T D"]:
    """The text layers start..stop-1 (default: all) on embedded tokens; `image` from `encode_images`, a row per text."""

    def step(x, i):
        return run_layer(params, c, x, mask, image, i, backend=backend)[0], None

    stop = c.text.num_layers if stop is None else stop
    return jax.lax.scan(step, x, jnp.arange(start, stop))[0] if stop > start else x


def run_layer(
    params: BlipItm,
    c: BlipItmConfig,
    x: Float[Array, "B T D"],
    mask: Mask,
    image: Float[Array, "B S Dk"],
    at: int | Int[Array, ""],
    perturb: Float[Array, "B T N H"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Array, "B T D"], tuple[Array, Array, Array]]:
    """Text layer `at`, and its cross-attention's queries [B, T, N, H], keys and values [B, S, N, H].

    perturb: added to the outputs of the cross-attention's heads.
    """
    with jax.named_scope("text/layer"):
        w = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, at, keepdims=False), params.text.layers)
        q, k, v = heads(w.attention, x, x)
        out = attend(q, k, v, mask, scale=q.shape[-1] ** -0.5, backend=backend)
        x = close(w.attention, x, out, c.text.norm_eps)
        q, k, v = heads(w.cross, x, image)
        out = attend(q, k, v, None, scale=q.shape[-1] ** -0.5, backend=backend)
        out = out if perturb is None else (out + perturb).astype(out.dtype)
        x = close(w.cross, x, out, c.text.norm_eps)
        x = layer_norm(x + feed_forward(w, x, c.text.activation), w.norm, c.text.norm_eps)
        return x, (q, k, v)


def close(
    w: Attention, x: Float[Array, "B T D"], out: Float[Array, "B T N H"], norm_eps: float
) -> Float[Array, "B T D"]:
    """The heads' outputs projected, added to `x`, and normalised: BERT has its norms after the sums."""
    return layer_norm(x + einsum("BTNH,NHD->BTD", out, w.o_proj, out=ACT_BTD) + w.o_bias, w.norm, norm_eps)


def score(params: BlipItm, first: Float[Array, "*B D"]) -> Float[Array, "*B 2"]:
    """Logits of "no match" and "match" from the last hidden state of a text's first token."""
    first, weight = first.astype(jnp.float32), params.head.weight.astype(jnp.float32)
    return einsum("...D,DO->...O", first, weight, out=BATCH) + params.head.bias


def match(
    params: BlipItm,
    c: BlipItmConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    image: Float[Array, "B S D"],
    *,
    backend: str = "auto",
) -> Float[Array, "B 2"]:
    """Logits f32 of "no match" and "match" of right-padded texts, each with its image (from `encode_images`)."""
    x = run_layers(params, c, embed(params, c, ids), text_mask(ids, lengths), image, backend=backend)
    return score(params, x[:, 0])


def gradcam(
    params: BlipItm,
    c: BlipItmConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    image: Float[Array, "B S D"],
    layer: int = -1,
    *,
    relu: str = "sum",
    backend: str = "auto",
) -> Float[Array, "B T h w"]:
    """Gradient-weighted cross-attention of a text layer: a map f32 over the image's patches for every text token.

    With A the probabilities of the layer's cross-attention, y the logit of "match" and ∇A = ∂y/∂A, per row t of A:

        relu="sum"   max(0, Σ_heads ∇A ⊙ A)            HiPerson Eq. 3-4, on the row of the first token
        relu="grad"  mean_heads max(0, ∇A) ⊙ A         LAVIS, averaged over the rows 1 … length − 2

    The rows of padding are zero. Raises `JaxVQAError` for a layer that is not there, or another `relu`.
    """
    if relu not in ("sum", "grad"):
        raise JaxVQAError(f"relu {relu!r}: expected 'sum' (after the sum over heads) or 'grad' (of the gradient)")
    _, probs, slopes = match_gradient(params, c, ids, lengths, image, layer, backend=backend)
    if relu == "sum":
        maps = jnp.maximum(jnp.sum(slopes * probs, axis=1), 0)
    else:
        maps = jnp.mean(jnp.maximum(slopes, 0) * probs, axis=1)
    return jnp.reshape(maps, (*maps.shape[:2], *c.grid), out_sharding=layout(BATCH))


def match_gradient(
    params: BlipItm,
    c: BlipItmConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    image: Float[Array, "B S D"],
    layer: int = -1,
    *,
    backend: str = "auto",
) -> tuple[Float[Array, "B 2"], Float[Array, "B N T P"], Float[Array, "B N T P"]]:
    """`match`'s logits, a text layer's cross-attention A to the P patches, and ∂y/∂A of y, the logit of "match"; f32.

    ∂y/∂A[n, t, s] = ⟨∂y/∂O[n, t], V[s, n]⟩ with O the heads' outputs, so that only the layers above are differentiated.
    The head reads the first token only: at the last layer the gradient of all other rows is exactly zero. So is that of
    padding, at any layer.
    """
    at = layer_index(c, layer)
    t, mask = c.text, text_mask(ids, lengths)
    below = run_layers(params, c, embed(params, c, ids), mask, image, 0, at, backend=backend)

    def logit(perturb):
        x, (q, k, v) = run_layer(params, c, below, mask, image, at, perturb, backend=backend)
        x = run_layers(params, c, x, mask, image, at + 1, backend=backend)
        logits = score(params, x[:, 0])
        return jnp.sum(logits[:, MATCH]), (logits, q, k, v)

    B, T, _ = below.shape
    zero = jnp.zeros((B, T, t.num_heads, t.width // t.num_heads), jnp.float32, out_sharding=layout(ACT_BTNH))
    gradient, (logits, q, k, v) = jax.grad(logit, has_aux=True)(zero)
    probs = attention_rows(q, k, None, scale=q.shape[-1] ** -0.5)
    slopes = einsum("BTNH,BSNH->BNTS", gradient, v.astype(jnp.float32), out=("batch", "heads"))
    return logits, probs[..., 1:], slopes[..., 1:]


def flops(c: BlipItmConfig, tokens: int, layers: int | None = None) -> int:
    """Analytic FLOPs of one row's pass through `layers` text layers (None: all) and the head: 2 per multiply-add."""
    t, patches = c.text, c.grid[0] * c.grid[1] + 1
    weights = tokens * (6 * t.width**2 + 2 * t.width * t.mlp_width) + 2 * patches * c.vision.width * t.width
    attention = 2 * tokens * (tokens + patches) * t.width
    return 2 * ((t.num_layers if layers is None else layers) * (weights + attention) + 2 * t.width)


def image_flops(c: BlipItmConfig, arrays: Any = None) -> int:
    """Analytic FLOPs of encoding one image."""
    v = c.vision
    T = c.grid[0] * c.grid[1] + 1
    block = T * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 2 * T * T * v.width
    return 2 * (T * 3 * v.patch_size**2 * v.width + v.num_layers * block)


def layer_index(c: BlipItmConfig, layer: int) -> int:
    """`layer` counted from the first; negative ones count from the last."""
    if not -c.text.num_layers <= layer < c.text.num_layers:
        raise JaxVQAError(f"text layer {layer}: the text encoder has {c.text.num_layers} layers")
    return layer % c.text.num_layers
