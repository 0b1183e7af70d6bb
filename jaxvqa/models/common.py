"""What every family that answers has in common: image features among the words, and the decoder over them."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.tree_util import register_dataclass

from jaxvqa import decoder
from jaxvqa.decoder import Cache, right_padded
from jaxvqa.decoding import Output, forward
from jaxvqa.sharding import ACT_BTD, BATCH, ArraySpec, constrain
from jaxvqa.taps import ReadSpec
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision.clip import LayerNorm, feed_forward, layer_norm, norm_specs


@register_dataclass
@dataclass(frozen=True)
class Projector:
    """Maps image features to the decoder's width: two linear layers, after a norm where there is one."""

    fc1: Float[Array, "Dv D"]
    fc1_bias: Float[Array, "D"] | None
    fc2: Float[Array, "D D"]
    fc2_bias: Float[Array, "D"] | None
    norm: LayerNorm | None = None


def projector_specs(width_in: int, width: int, *, bias: bool = True, norm: bool = False) -> Projector:
    """Declare a projector from `width_in` to the decoder's `width`."""
    into, out = (ArraySpec((size, width), (None, "embed")) for size in (width_in, width))
    biases = ArraySpec((width,), (None,), "zeros") if bias else None
    return Projector(into, biases, out, biases, norm_specs(width_in) if norm else None)


def project(p: Projector, x: Float[Array, "M P Dv"], activation: str) -> Float[Array, "M P D"]:
    """Image features in the decoder's space."""
    x = x if p.norm is None else layer_norm(x, p.norm, _PROJECTOR_EPS)
    return feed_forward(p, x, activation, ACT_BTD)


_PROJECTOR_EPS = 1e-5  # no config says it


def place(
    x: Float[Array, "B T D"], features: Float[Array, "B S D"] | None, slots: Int[Array, "B T"] | None
) -> Float[Array, "B T D"]:
    """Word embeddings, with image tokens in their places: token t of a row is `features[slots[t]]`, -1 being text."""
    if features is None or slots is None:
        return x
    tokens = jnp.take_along_axis(constrain(features, BATCH), jnp.maximum(slots, 0)[:, :, None], axis=1)
    return jnp.where((slots >= 0)[:, :, None], tokens.astype(x.dtype), x)


def embed(
    params: Any, c: Any, ids: Int[Array, "B T"], features: Float[Array, "B S D"] | None, slots: Int[Array, "B T"] | None
) -> Float[Array, "B T D"]:
    """Word embeddings of a prompt, with its images' tokens in their places (`place`)."""
    return place(decoder.embed_tokens(params.decoder, ids), features, slots)


def prefill(
    params: Any,
    c: Any,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    features: Float[Array, "B S D"] | None = None,
    slots: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T 3"] | None = None,
    **kwargs: Any,
) -> Output:
    """Run right-padded prompts. Keyword arguments as for `decoder.run`; `capacity` keeps a cache for decoding.

    features, slots: the images' tokens, those of a row side by side, and which of them each token of the prompt is.
    positions: of multimodal rotary embeddings; None counts from 0.
    """
    stream = right_padded(embed(params, c, ids, features, slots), lengths, positions=positions)
    return forward(params.decoder, c.decoder, stream, **kwargs)


def extend(
    params: Any,
    c: Any,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: Cache,
    features: Float[Array, "B S D"] | None = None,
    slots: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T 3"] | None = None,
    **kwargs: Any,
) -> Output:
    """Append right-padded tokens, which may hold images, to each row of a cache: a further turn, a prompt's rest."""
    x = embed(params, c, ids, features, slots)
    stream = right_padded(x, lengths, cache.length, positions=positions, shift=cache.shift)
    return forward(params.decoder, c.decoder, stream, cache=cache, **kwargs)


def resume(
    params: Any,
    c: Any,
    hidden: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    spec: ReadSpec,
    positions: Int[Array, "B T 3"] | None = None,
    **kwargs: Any,
) -> Output:
    """Go on from layer `spec.start` with the hidden states of a prefill that stopped there."""
    return forward(params.decoder, c.decoder, right_padded(hidden, lengths, positions=positions), spec=spec, **kwargs)


def flops(c: Any, tokens: int, keys: int, logits: int = 1) -> int:
    """Analytic FLOPs of one row's decoder pass: 2 per multiply-add, `tokens` queries over `keys` keys on average."""
    d = c.decoder
    weights = d.width * d.head_dim * 2 * (d.num_heads + d.num_kv_heads) + 3 * d.width * d.mlp_width
    attention = 2 * d.num_heads * d.head_dim * keys
    return 2 * (d.num_layers * tokens * (weights + attention) + logits * d.width * d.vocab_size)
