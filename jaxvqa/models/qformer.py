"""The Q-Former of InstructBLIP: a BERT over learned queries and a text, whose queries look at an image now and then.

Queries and text see each other in every layer; in every n-th one, from the first on, the queries then attend to the
image. Each has a feed-forward network of its own. What becomes of the queries is what the decoder sees of the image.
Letters beside the usual ones: M images, each with its text; Q queries; S image tokens (the class token, then h·w
patches); C cross-attentions, counted by themselves (0, 1, 2, … are HF's `cross_attentions`).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass, register_static

from jaxvqa.attention import NEVER, Mask, attend, attention_rows
from jaxvqa.errors import JaxVQAError
from jaxvqa.models.blip_itm import Attention, attention_specs, close
from jaxvqa.sharding import ACT_BTD, ArraySpec, constrain, layout, take
from jaxvqa.taps import ReadSpec
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision.clip import ACTIVATIONS, LayerNorm, feed_forward, heads, layer_norm, norm_specs

MAX_LAYERS = 48
"""Of a checkpoint: as many are named in its table."""


@register_static
@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former."""

    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    vocab_size: int
    max_length: int
    num_queries: int
    image_width: int
    every: int
    """Layers from one cross-attention to the next."""
    norm_eps: float
    activation: str

    @classmethod
    def from_hf(cls, hf: dict[str, Any], num_queries: int, image_width: int) -> "QFormerConfig":
        """Read HF's `qformer_config`; raises `JaxVQAError` that names the offending keys."""
        hf = _DEFAULTS | {k: v for k, v in hf.items() if v is not None}
        faults = []
        if hf["model_type"] != KIND:
            faults.append(f"model_type {hf['model_type']!r} (supported: {KIND})")
        if hf["hidden_act"] not in ACTIVATIONS:
            faults.append(f"hidden_act {hf['hidden_act']!r} (supported: {', '.join(ACTIVATIONS)})")
        if hf["hidden_size"] % hf["num_attention_heads"]:
            faults.append(f"hidden_size {hf['hidden_size']} (not a multiple of {hf['num_attention_heads']} heads)")
        if hf["cross_attention_frequency"] < 1:
            faults.append(f"cross_attention_frequency {hf['cross_attention_frequency']} (expected 1 or more)")
        if hf["num_hidden_layers"] > MAX_LAYERS:
            faults.append(f"num_hidden_layers {hf['num_hidden_layers']} (at most {MAX_LAYERS})")
        if hf["position_embedding_type"] != "absolute":
            faults.append(f"position_embedding_type {hf['position_embedding_type']!r} (supported: absolute)")
        if faults:
            raise JaxVQAError(f"config.json, qformer_config: {'; '.join(faults)}")
        return cls(
            num_layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            num_heads=hf["num_attention_heads"],
            vocab_size=hf["vocab_size"],
            max_length=hf["max_position_embeddings"],
            num_queries=num_queries,
            image_width=image_width,
            every=hf["cross_attention_frequency"],
            norm_eps=hf["layer_norm_eps"],
            activation=hf["hidden_act"],
        )

    def to_hf(self) -> dict[str, Any]:
        """HF's `qformer_config`; with the number of queries and the image's width the inverse of `from_hf`."""
        return {
            "model_type": KIND,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_attention_heads": self.num_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_length,
            "encoder_hidden_size": self.image_width,
            "cross_attention_frequency": self.every,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": self.activation,
        }

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """The layers that have a cross-attention."""
        return tuple(range(0, self.num_layers, self.every))


KIND = "instructblip_qformer"

# HF's InstructBlipQFormerConfig, whose values a config.json leaves out when equal.
_DEFAULTS = {
    "model_type": KIND,
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
    "position_embedding_type": "absolute",
}


@register_dataclass
@dataclass(frozen=True)
class Mlp:
    """A feed-forward network, and the norm that closes it."""

    fc1: Float[Array, "D F"]
    fc1_bias: Float[Array, "F"]
    fc2: Float[Array, "F D"]
    fc2_bias: Float[Array, "D"]
    norm: LayerNorm


@register_dataclass
@dataclass(frozen=True)
class QFormerLayer:
    attention: Attention
    cross: Attention | None
    text: Mlp
    query: Mlp


@register_dataclass
@dataclass(frozen=True)
class QFormer:
    """All parameters. Few and unlike layers: they are not stacked, and run one by one."""

    queries: Float[Array, "1 Q D"]
    embed: Float[Array, "V D"]
    position_embed: Float[Array, "T D"]
    norm: LayerNorm
    layers: tuple[QFormerLayer, ...]


def specs(c: QFormerConfig) -> QFormer:
    """Declare every parameter: shape, logical axes, initialisation."""
    D, F = c.width, c.mlp_width
    out_scale = 0.02 / (3 * c.num_layers) ** 0.5

    def vector(size: int) -> ArraySpec:
        return ArraySpec((size,), (None,), "zeros")

    def attention(width_in: int) -> Attention:
        return attention_specs(D, c.num_heads, width_in, out_scale)

    mlp = Mlp(
        fc1=ArraySpec((D, F), ("embed", "mlp")),
        fc1_bias=ArraySpec((F,), ("mlp",), "zeros"),
        fc2=ArraySpec((F, D), ("mlp", "embed"), scale=out_scale),
        fc2_bias=vector(D),
        norm=norm_specs(D),
    )
    return QFormer(
        queries=ArraySpec((1, c.num_queries, D), (None, None, None)),
        # Not split by vocabulary: BERT's, with one token more, is an odd number.
        embed=ArraySpec((c.vocab_size, D), (None, "embed")),
        position_embed=ArraySpec((c.max_length, D), (None, "embed")),
        norm=norm_specs(D),
        layers=tuple(
            QFormerLayer(attention(D), attention(c.image_width) if i in c.cross_layers else None, mlp, mlp)
            for i in range(c.num_layers)
        ),
    )


@register_dataclass
@dataclass(frozen=True)
class Asked:
    """What the Q-Former looks for: right-padded texts in the ids of its own tokenizer."""

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]


def embed(params: QFormer, c: QFormerConfig, asked: Asked) -> Float[Array, "M T D"]:
    """The queries, then the text's word and position embeddings, all normalised: T = Q + the text's tokens."""
    M, length = asked.ids.shape
    if length > c.max_length:
        raise JaxVQAError(f"a text of {length} tokens: the Q-Former has {c.max_length} positions")
    words = take(params.embed, asked.ids, ACT_BTD) + constrain(params.position_embed, (None, None))[:length]
    queries = jnp.broadcast_to(params.queries, (M, c.num_queries, c.width), out_sharding=layout(ACT_BTD))
    return layer_norm(jnp.concatenate([queries, words], axis=1), params.norm, c.norm_eps)


def run(
    params: QFormer,
    c: QFormerConfig,
    asked: Asked,
    image: Float[Array, "M S Dv"],
    *,
    bias: Float[Array, "M #N S"] | None = None,
    perturb: Float[Array, "C M Q N H"] | None = None,
    cross: ReadSpec = ReadSpec(),
    stop: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "M T D"], dict[str, Array]]:
    """The hidden states after `stop` layers (None: all), queries first, and what `cross` reads.

    bias: added to the scaled scores of every cross-attention and query, e.g. log λ·m (CoF).
    perturb: added to the outputs of the heads at the cross-attentions `cross.layers`. Its gradient g, at zero, gives
        ∂y/∂A = g·Vᵀ exactly.
    cross: of the cross-attentions `cross.layers`, "rows" [C, M, *N, Q, S] (f32 probabilities) and "values"
        [C, M, S, N, H].
    Raises `JaxVQAError` for a cross-attention that is not there, and for what else `cross` may ask of a decoder.
    """
    _check(c, cross, perturb)
    x = embed(params, c, asked)
    order = jnp.where(jnp.arange(x.shape[1]) < c.num_queries + asked.lengths[:, None], 0, NEVER)
    mask = Mask(jnp.zeros_like(order), order)
    scale, read = (c.width // c.num_heads) ** -0.5, {name: [] for name in cross.read}
    for i, w in enumerate(params.layers[:stop]):
        with jax.named_scope("qformer/layer"):
            q, k, v = heads(w.attention, x, x)
            x = close(w.attention, x, attend(q, k, v, mask, scale=scale, backend=backend), c.norm_eps)
            queries, text = x[:, : c.num_queries], x[:, c.num_queries :]
            if w.cross is not None:
                q, k, v = heads(w.cross, queries, image)
                out = attend(q, k, v, None, scale=scale, key_bias=bias, backend=backend)
                if (number := i // c.every) in cross.layers:
                    if "rows" in read:
                        probs = attention_rows(q, k, None, scale=scale, key_bias=bias)
                        read["rows"].append(probs.mean(axis=1) if cross.heads == "mean" else probs)
                    if "values" in read:
                        read["values"].append(v)
                    if perturb is not None:
                        out = (out + perturb[cross.layers.index(number)]).astype(out.dtype)
                queries = close(w.cross, queries, out, c.norm_eps)
            x = jnp.concatenate([_mlp(w.query, c, queries), _mlp(w.text, c, text)], axis=1)
    return x, {name: jnp.stack(found) for name, found in read.items()}


def flops(c: QFormerConfig, tokens: int, image_tokens: int) -> int:
    """Analytic FLOPs of one image's pass beside a text of `tokens` tokens: 2 per multiply-add."""
    D, Q, both = c.width, c.num_queries, c.num_queries + tokens
    layer = both * (4 * D**2 + 2 * D * c.mlp_width) + 2 * both**2 * D
    cross = 2 * Q * D**2 + 2 * image_tokens * c.image_width * D + 2 * Q * image_tokens * D
    return 2 * (c.num_layers * layer + len(c.cross_layers) * cross)


def _check(c: QFormerConfig, cross: ReadSpec, perturb) -> None:
    count = len(c.cross_layers)
    if outside := [number for number in cross.layers if not 0 <= number < count]:
        raise JaxVQAError(f"cross-attentions {outside}: the Q-Former has {count}, 0 to {count - 1}")
    if (unknown := cross.read - {"rows", "values"}) or cross.stop is not None or cross.start:
        raise JaxVQAError(
            f"a Q-Former runs whole, and its cross-attentions have rows and values to read: found {sorted(unknown)}, "
            f"start {cross.start}, stop {cross.stop}"
        )
    if perturb is not None and len(perturb) != len(cross.layers):
        raise JaxVQAError(f"{len(perturb)} perturbations for {len(cross.layers)} cross-attentions: expected one each")


def _mlp(w: Mlp, c: QFormerConfig, x):
    return layer_norm(x + feed_forward(w, x, c.activation), w.norm, c.norm_eps)
