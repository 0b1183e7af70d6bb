"""VIF's generator: hidden states of an image and its text in, an importance map over the image out.

Two branches of one shape: the prior sees image and question, the posterior the answer, too. Each encodes both streams
together, compresses the image's into latent slots and gives a diagonal Gaussian for every slot (eq. 1); a latent is
rendered as a mixture of Gaussians over the image's token grid (eq. 3-4).

Letters beside the usual ones: Z latent width, n slots, P image cells (h·w), Q text tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass, register_static
from jax.typing import DTypeLike

from jaxvqa import sharding
from jaxvqa.attention import NEVER, Mask, attend
from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import ACT_BTD, ACT_BTF, ACT_BTNH, BATCH, ArraySpec, einsum, layout, stack
from jaxvqa.transforms.gaussian_mixture import grid_points, mixture_at
from jaxvqa.typing import Array, Bool, Float, Int
from jaxvqa.vision.clip import LayerNorm, layer_norm, norm_specs

NORM_EPS = 1e-5

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"map_norm": "sum", "text_self_mask": True, "init": "intended", "share_slots": True},
    "released": {"map_norm": "softmax", "text_self_mask": False, "init": "released", "share_slots": True},
}
"""Options of a generator: ours, and those of the released code (ictnlp/VIF) as it runs."""


@register_static
@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes and options of a generator. `of` gives those of the paper."""

    width: int
    """D of the model that it reads."""
    latent_width: int
    num_heads: int
    mlp_width: int
    num_layers: int
    num_slots: int
    min_spread: float
    """The smallest s_k, in sides of the image."""
    share_slots: bool
    """Whether the posterior compresses with the prior's slots (the release) or with its own (the paper's text)."""
    text_self_mask: bool
    """Whether text tokens see no padding. Without it, as in the release, a result depends on the padded length."""
    map_norm: str
    """How h becomes a distribution: "sum" or "softmax" (`transforms.gaussian_mixture`)."""
    temperature: float
    """Of the softmax."""
    init: str
    """Of the renderer: "intended" has centres all over the image and small spreads; "released" is what loading a base
    checkpoint through transformers leaves of it: all centres in the middle, spreads of 0.73 sides."""
    attention: str = "auto"
    """Its attention backend (`jaxvqa.attention`)."""

    def __post_init__(self):
        if self.latent_width % self.num_heads:
            raise JaxVQAError(f"generator: latent_width {self.latent_width} does not split over {self.num_heads} heads")
        if min(self.num_layers, self.num_slots) < 1:
            raise JaxVQAError(f"generator: {self.num_layers} layers and {self.num_slots} slots; expected at least 1")
        for name, allowed in {"map_norm": ("sum", "softmax"), "init": ("intended", "released")}.items():
            if getattr(self, name) not in allowed:
                raise JaxVQAError(f"generator: {name}={getattr(self, name)!r}; expected one of {', '.join(allowed)}")

    @classmethod
    def of(cls, width: int, preset: str = "default", **changes: Any) -> "GeneratorConfig":
        """The paper's generator for a model of `width`: 3 layers, 4 heads, 16 slots, latents as wide as the model.

        preset: a key of `PRESETS`. changes: other values of any field; the MLP is four latents wide.
        """
        if preset not in PRESETS:
            raise JaxVQAError(f"generator: preset {preset!r}; expected one of {', '.join(PRESETS)}")
        latent = changes.get("latent_width", width)
        sizes = dict(latent_width=latent, num_heads=4, mlp_width=4 * latent, num_layers=3, num_slots=16)
        options: dict[str, Any] = dict(width=width, min_spread=0.035, temperature=1.0, **sizes)
        return cls(**options | PRESETS[preset] | changes)


@register_dataclass
@dataclass(frozen=True)
class Linear:
    kernel: Float[Array, "..."]
    """Inputs, then outputs."""
    bias: Float[Array, "..."]


@register_dataclass
@dataclass(frozen=True)
class Attention:
    """Multi-head attention with biases."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear


@register_dataclass
@dataclass(frozen=True)
class Side:
    """One stream's half of an encoder layer."""

    norm1: LayerNorm
    self_attn: Attention
    norm2: LayerNorm
    cross_attn: Attention
    """Its queries; keys and values are the other stream's."""
    norm3: LayerNorm
    fc1: Linear
    fc2: Linear


@register_dataclass
@dataclass(frozen=True)
class Layer:
    """One encoder layer; in an `Encoder` every leaf has a leading layer axis L."""

    vision: Side
    text: Side


@register_dataclass
@dataclass(frozen=True)
class Encoder:
    """Of the last layer's text side only what the image looks at is used: `norm1` and `self_attn`."""

    vision_in: Linear
    text_in: Linear
    layers: Layer
    vision_norm: LayerNorm
    text_norm: LayerNorm
    """Belongs to the checkpoint; nothing reads the text stream's end."""


@register_dataclass
@dataclass(frozen=True)
class Slots:
    """Learned queries and the attention by which they compress an encoded image."""

    queries: Float[Array, "n Z"]
    attn: Attention


@register_dataclass
@dataclass(frozen=True)
class Branch:
    """From two streams to a Gaussian per slot."""

    encoder: Encoder
    slots: Slots | None
    """None in a posterior that shares the prior's."""
    mean: Linear
    logvar: Linear


@register_dataclass
@dataclass(frozen=True)
class Renderer:
    """From a latent slot to a component: centre (x, y), spread and weight, each before its nonlinearity."""

    centre: Linear
    spread: Linear
    weight: Linear


@register_dataclass
@dataclass(frozen=True)
class Generator:
    """All parameters."""

    prior: Branch
    posterior: Branch | None
    """None where it only answers: the posterior needs the answer, in training."""
    renderer: Renderer


def specs(c: GeneratorConfig, posterior: bool = True) -> Generator:
    """Declare every parameter: shape, logical axes, initialisation (see `initialise`)."""
    D, Z, N, H, F = c.width, c.latent_width, c.num_heads, c.latent_width // c.num_heads, c.mlp_width

    def linear(inputs: int, outputs: int, axes=(None, "embed"), scale: float = 0.02) -> Linear:
        return Linear(ArraySpec((inputs, outputs), axes, scale=scale), ArraySpec((outputs,), (None,), "zeros"))

    # The variance of the Xavier uniform distribution that torch gives to q, k and v as one matrix [3Z, Z].
    heads = Linear(
        ArraySpec((Z, N, H), ("embed", "heads", None), scale=(2 * Z) ** -0.5),
        ArraySpec((N, H), ("heads", None), "zeros"),
    )
    out = Linear(ArraySpec((N, H, Z), ("heads", None, "embed")), ArraySpec((Z,), (None,), "zeros"))
    attention, norm = Attention(heads, heads, heads, out), norm_specs(Z)
    fc1 = Linear(ArraySpec((Z, F), ("embed", "mlp")), ArraySpec((F,), ("mlp",), "zeros"))
    side = Side(norm, attention, norm, attention, norm, fc1, linear(F, Z, ("mlp", "embed")))
    encoder = Encoder(linear(D, Z), linear(D, Z), stack(Layer(side, side), c.num_layers), norm, norm)
    slots = Slots(ArraySpec((c.num_slots, Z), (None, None), scale=1.0), attention)
    branch = Branch(encoder, slots, linear(Z, Z), linear(Z, Z))
    second = replace(branch, slots=None) if c.share_slots else branch
    whole, scale = (None, None), 0.01 if c.init == "intended" else 0.02
    renderer = Renderer(*(linear(Z, outputs, whole, scale) for outputs in (2, 1, 1)))
    return Generator(branch, second if posterior else None, renderer)


def initialise(c: GeneratorConfig, key: Array, dtype: DTypeLike = jnp.float32) -> Generator:
    """Random parameters: N(0, 0.02²) with bias 0, slot queries N(0, 1), and the renderer as `c.init` says.

    Intended: centres σ(U(−1, 1)), the same for all slots but for z, and spreads of softplus(−2) + `min_spread`.
    """
    params = sharding.init(specs(c), key, dtype)
    if c.init == "released":
        return params
    r = params.renderer
    centre = jax.random.uniform(jax.random.fold_in(key, 0), (2,), dtype, -1.0, 1.0)
    spread = jnp.full_like(r.spread.bias, -2.0)
    r = replace(r, centre=replace(r.centre, bias=centre), spread=replace(r.spread, bias=spread))
    return replace(params, renderer=r)


def prior(
    params: Generator, c: GeneratorConfig, vision: Float[Array, "B P D"], text: Float[Array, "B Q D"],
    mask: Bool[Array, "B Q"], seen: Bool[Array, "B P"] | None = None,
) -> tuple[Float[Array, "B n Z"], Float[Array, "B n Z"]]:  # fmt: skip
    """Mean and log-variance of p(z | image, question), in f32.

    mask: which of `text` is the question, not padding. seen: which of `vision` is the image; None is all.
    """
    return _branch(params, params.prior, c, vision, text, mask, seen)


def posterior(
    params: Generator, c: GeneratorConfig, vision: Float[Array, "B P D"], text: Float[Array, "B Q D"],
    mask: Bool[Array, "B Q"], seen: Bool[Array, "B P"] | None = None,
) -> tuple[Float[Array, "B n Z"], Float[Array, "B n Z"]]:  # fmt: skip
    """Mean and log-variance of q(z | image, question, answer); `text` is both of these, in any order."""
    if params.posterior is None:
        raise JaxVQAError("generator: it was loaded without its posterior, which training needs")
    return _branch(params, params.posterior, c, vision, text, mask, seen)


def latent(
    mean: Float[Array, "B n Z"], logvar: Float[Array, "B n Z"], keys: Array | None = None
) -> Float[Array, "B n Z"]:
    """z = μ + exp(½·logvar)·ε with one random key per row (eq. 1); the mean without keys."""
    if keys is None:
        return mean
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
    return mean + jnp.exp(logvar / 2) * noise


def components(
    renderer: Renderer, c: GeneratorConfig, z: Float[Array, "B n Z"]
) -> tuple[Float[Array, "B n 2"], Float[Array, "B n"], Float[Array, "B n"]]:
    """Centres c (x, y) in 0..1, spreads s and weights π of the mixture, in f32."""

    def head(p: Linear):
        p = jax.tree.map(lambda x: x.astype(jnp.float32), p)
        return einsum("BnZ,ZC->BnC", z.astype(jnp.float32), p.kernel, out=BATCH) + p.bias

    spreads = jax.nn.softplus(head(renderer.spread)[..., 0]) + c.min_spread
    return jax.nn.sigmoid(head(renderer.centre)), spreads, jax.nn.softmax(head(renderer.weight)[..., 0], axis=-1)


def render(
    renderer: Renderer, c: GeneratorConfig, z: Float[Array, "B n Z"], shape: Int[Array, "B 2"], count: int
) -> Float[Array, "B P"]:
    """The importance map M over P = `count` cells, of which the first are a grid of `shape`: f32, >= 0, of sum one."""
    there = jnp.arange(count) < shape.prod(-1, keepdims=True)
    mixture, points = components(renderer, c, z), grid_points(shape, count)
    return mixture_at(*mixture, points, there, map_norm=c.map_norm, temperature=c.temperature)


def _branch(params: Generator, w: Branch, c: GeneratorConfig, vision, text, mask, seen):
    e, slots = w.encoder, w.slots or params.prior.slots
    assert slots is not None, "the prior has its own"
    v = _linear(e.vision_in, vision)
    # The release pads text with zeros, before the projection; they matter only without `text_self_mask`.
    t = _linear(e.text_in, jnp.where(mask[:, :, None], text, 0))

    def layer(v, t, i):
        with jax.named_scope("vif/layer"):
            w = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), e.layers)
            return _layer(w, c, v, t, mask, seen)

    def step(vt, i):
        return layer(vt[0], vt[1], i), None

    last = c.num_layers - 1
    if last:
        (v, t), _ = jax.lax.scan(step, (v, t), jnp.arange(last))
    # Outside the scan, so that XLA drops what its text side would still compute.
    v, _ = layer(v, t, last)
    v = layer_norm(v, e.vision_norm, NORM_EPS)
    queries = jnp.broadcast_to(slots.queries, (len(v), *slots.queries.shape), out_sharding=layout(ACT_BTD))
    x = _attend(slots.attn, c, queries, v, seen)
    mean, logvar = (_linear(head, x).astype(jnp.float32) for head in (w.mean, w.logvar))
    return mean, jnp.clip(logvar, -5.0, 5.0)


def _layer(w: Layer, c: GeneratorConfig, v, t, mask, seen):
    """Both streams: self-attention, then each looks at the other as it now is, not normalised; then the MLPs."""
    h = layer_norm(v, w.vision.norm1, NORM_EPS)
    v = v + _attend(w.vision.self_attn, c, h, h, seen)
    h = layer_norm(t, w.text.norm1, NORM_EPS)
    t = t + _attend(w.text.self_attn, c, h, h, mask if c.text_self_mask else None)
    v = v + _attend(w.vision.cross_attn, c, layer_norm(v, w.vision.norm2, NORM_EPS), t, mask)
    t = t + _attend(w.text.cross_attn, c, layer_norm(t, w.text.norm2, NORM_EPS), v, seen)
    return v + _mlp(w.vision, v), t + _mlp(w.text, t)


def _mlp(w: Side, x):
    h = einsum("BTD,DF->BTF", layer_norm(x, w.norm3, NORM_EPS), w.fc1.kernel, out=ACT_BTF) + w.fc1.bias
    return _linear(w.fc2, jax.nn.gelu(h, approximate=False))


def _attend(w: Attention, c: GeneratorConfig, x, keys, mask):
    """Multi-head attention of `x` to `keys`, of which `mask` [B, S] hides some."""
    q, k, v = (
        einsum("BTD,DNH->BTNH", source, p.kernel, out=ACT_BTNH) + p.bias
        for source, p in ((x, w.q), (keys, w.k), (keys, w.v))
    )
    seen = None
    if mask is not None:
        everywhere = jnp.zeros_like(mask[:, :1], jnp.int32) + jnp.zeros(x.shape[1], jnp.int32)
        seen = Mask(everywhere, jnp.where(mask, 0, NEVER))
    out = attend(q, k, v, seen, scale=q.shape[-1] ** -0.5, backend=c.attention)
    return einsum("BTNH,NHD->BTD", out, w.o.kernel, out=ACT_BTD) + w.o.bias


def _linear(p: Linear, x):
    return einsum("BTI,IO->BTO", x.astype(p.kernel.dtype), p.kernel, out=ACT_BTD) + p.bias
