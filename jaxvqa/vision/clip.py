"""The CLIP vision tower (LLaVA-1.5's image encoder), stopped at the last hidden state that is read."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass, register_static

from jaxvqa.attention import attend
from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import ACT_BTD, ACT_BTF, ACT_BTNH, BATCH, ArraySpec, constrain, einsum, layout, stack
from jaxvqa.typing import Array, Float


@register_static
@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP vision tower."""

    image_size: int
    patch_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    norm_eps: float
    activation: str

    @classmethod
    def from_hf(cls, hf: dict[str, Any], kind: str = "clip_vision_model") -> "ClipConfig":
        """Read HF's `vision_config` of the model type `kind`; raises `JaxVQAError` for another one or activation."""
        if (found := hf.get("model_type", kind)) != kind:
            raise JaxVQAError(f"vision model type {found!r} is not supported; supported is {kind}")
        hf = _DEFAULTS[kind] | {k: v for k, v in hf.items() if v is not None}
        if hf["hidden_act"] not in ACTIVATIONS:
            raise JaxVQAError(
                f"vision hidden_act {hf['hidden_act']!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        if not isinstance(hf["image_size"], int) or not isinstance(hf["patch_size"], int):
            raise JaxVQAError(f"image_size {hf['image_size']}, patch_size {hf['patch_size']}: expected a number each")
        if hf["image_size"] % hf["patch_size"] and kind != "siglip_vision_model":
            raise JaxVQAError(f"image_size {hf['image_size']} is not a multiple of patch_size {hf['patch_size']}")
        return cls(
            image_size=hf["image_size"],
            patch_size=hf["patch_size"],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            norm_eps=hf["layer_norm_eps"],
            activation=hf["hidden_act"],
        )

    def to_hf(self, kind: str = "clip_vision_model") -> dict[str, Any]:
        """HF's `vision_config` of the model type `kind`; the inverse of `from_hf`."""
        return {
            "model_type": kind,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": self.activation,
        }

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side


# HF's defaults, left out of a config.json when equal.
_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-5,
}
_DEFAULTS = {
    "clip_vision_model": _BASE | {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"},
    "blip_vision_model": _BASE | {"image_size": 384, "patch_size": 16, "hidden_act": "gelu"},
    "siglip_vision_model": _BASE
    | {"image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "instructblip_vision_model": {
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "layer_norm_eps": 1e-6,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
}


@register_dataclass
@dataclass(frozen=True)
class LayerNorm:
    scale: Float[Array, "D"]
    bias: Float[Array, "D"]


@register_dataclass
@dataclass(frozen=True)
class ClipLayer:
    """One block; in a `Clip` every leaf has a leading layer axis L."""

    norm1: LayerNorm
    q_proj: Float[Array, "D N H"]
    q_bias: Float[Array, "N H"]
    k_proj: Float[Array, "D N H"]
    k_bias: Float[Array, "N H"]
    v_proj: Float[Array, "D N H"]
    v_bias: Float[Array, "N H"]
    o_proj: Float[Array, "N H D"]
    o_bias: Float[Array, "D"]
    norm2: LayerNorm
    fc1: Float[Array, "D F"]
    fc1_bias: Float[Array, "F"]
    fc2: Float[Array, "F D"]
    fc2_bias: Float[Array, "D"]


@register_dataclass
@dataclass(frozen=True)
class Clip:
    """Parameters of the tower. `post_norm` belongs to the checkpoint; hidden states do not pass it."""

    patch_embed: Float[Array, "C p p D"]
    class_embed: Float[Array, "D"]
    position_embed: Float[Array, "P D"]
    pre_norm: LayerNorm
    layers: ClipLayer
    post_norm: LayerNorm


def norm_specs(width: int) -> LayerNorm:
    return LayerNorm(ArraySpec((width,), (None,), "ones"), ArraySpec((width,), (None,), "zeros"))


def layer_specs(c: ClipConfig) -> ClipLayer:
    """Declare the blocks, stacked."""
    D, F, N, H = c.width, c.mlp_width, c.num_heads, c.width // c.num_heads
    norm = norm_specs(D)
    heads = ArraySpec((D, N, H), ("embed", "heads", None))
    head_bias = ArraySpec((N, H), ("heads", None), "zeros")
    out_scale = 0.02 / (2 * c.num_layers) ** 0.5
    layer = ClipLayer(
        norm1=norm,
        q_proj=heads,
        q_bias=head_bias,
        k_proj=heads,
        k_bias=head_bias,
        v_proj=heads,
        v_bias=head_bias,
        o_proj=ArraySpec((N, H, D), ("heads", None, "embed"), scale=out_scale),
        o_bias=ArraySpec((D,), (None,), "zeros"),
        norm2=norm,
        fc1=ArraySpec((D, F), ("embed", "mlp")),
        fc1_bias=ArraySpec((F,), ("mlp",), "zeros"),
        fc2=ArraySpec((F, D), ("mlp", "embed"), scale=out_scale),
        fc2_bias=ArraySpec((D,), (None,), "zeros"),
    )
    return stack(layer, c.num_layers)


def specs(c: ClipConfig) -> Clip:
    """Declare every parameter: shape, logical axes, initialisation."""
    D, p, patches = c.width, c.patch_size, c.grid[0] * c.grid[1]
    return Clip(
        patch_embed=ArraySpec((3, p, p, D), (None, None, None, "embed")),
        class_embed=ArraySpec((D,), (None,)),
        position_embed=ArraySpec((patches + 1, D), (None, "embed")),
        pre_norm=norm_specs(D),
        layers=layer_specs(c),
        post_norm=norm_specs(D),
    )


def hidden_index(c: ClipConfig, feature_layer: int) -> int:
    """Blocks to run for HF's hidden state `feature_layer` (0 is the embedding, −1 the last block's output)."""
    index = feature_layer if feature_layer >= 0 else c.num_layers + 1 + feature_layer
    if not 0 <= index <= c.num_layers:
        raise JaxVQAError(f"vision_feature_layer {feature_layer}: the tower has {c.num_layers} layers")
    return index


def encode(
    params: Clip,
    c: ClipConfig,
    pixels: Float[Array, "M E E 3"],
    feature_layers: tuple[int, ...] = (-2,),
    *,
    backend: str = "auto",
) -> Float[Array, "M P D"]:
    """Hidden states of normalised pixels, the class token first; several feature layers are concatenated along D.

    Runs only as many blocks as the highest feature layer needs.
    """
    x = embed_patches(params.patch_embed, c, pixels)
    first = jnp.broadcast_to(params.class_embed, (len(x), 1, c.width), out_sharding=layout(ACT_BTD))
    x = jnp.concatenate([first, x], axis=1) + constrain(params.position_embed, (None, None))
    return run_to(params.layers, c, layer_norm(x, params.pre_norm, c.norm_eps), feature_layers, backend)


def embed_patches(
    kernel: Float[Array, "C p p D"], c: ClipConfig, pixels: Float[Array, "M E E 3"]
) -> Float[Array, "M P D"]:
    """The convolution of non-overlapping patches, row-major."""
    p, (rows, cols), M = c.patch_size, c.grid, pixels.shape[0]
    if pixels.shape[1:] != (c.image_size, c.image_size, 3):
        raise JaxVQAError(f"pixels {pixels.shape}: expected [M, {c.image_size}, {c.image_size}, 3]")
    pixels = constrain(pixels, BATCH).astype(kernel.dtype)
    patches = jnp.reshape(pixels, (M, rows, p, cols, p, 3), out_sharding=layout(BATCH))
    x = einsum("MhpwqC,CpqD->MhwD", patches, kernel, out=BATCH)
    return jnp.reshape(x, (M, rows * cols, c.width), out_sharding=layout(ACT_BTD))


def run_to(
    layers: ClipLayer, c: ClipConfig, x: Float[Array, "M P D"], feature_layers: tuple[int, ...], backend: str
) -> Float[Array, "M P C"]:
    """The hidden states `feature_layers` of embedded patches, side by side along D, by as few blocks as they need."""
    wanted = [hidden_index(c, f) for f in feature_layers]
    states, done = {0: x}, 0
    for stop in sorted(set(wanted)):
        states[stop] = x = run_blocks(layers, c, x, done, stop, backend)
        done = stop
    return jnp.concatenate([states[i] for i in wanted], axis=-1)


def run_blocks(
    layers: ClipLayer, c: ClipConfig, x: Float[Array, "M P D"], start: int, stop: int, backend: str
) -> Float[Array, "M P D"]:
    """The blocks start..stop-1."""

    def step(x, i):
        with jax.named_scope("vision/layer"):
            layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), layers)
            return _block(layer, c, x, backend), None

    return jax.lax.scan(step, x, jnp.arange(start, stop))[0] if stop > start else x


def _block(w: ClipLayer, c: ClipConfig, x, backend):
    h = layer_norm(x, w.norm1, c.norm_eps)
    q, k, v = heads(w, h, h)
    out = attend(q, k, v, None, scale=q.shape[-1] ** -0.5, backend=backend)
    x = x + einsum("BTNH,NHD->BTD", out, w.o_proj, out=ACT_BTD) + w.o_bias
    return x + feed_forward(w, layer_norm(x, w.norm2, c.norm_eps), c.activation)


def heads(
    w: Any, x: Float[Array, "M T D"], source: Float[Array, "M S Dk"]
) -> tuple[Float[Array, "M T N H"], Float[Array, "M S N H"], Float[Array, "M S N H"]]:
    """Queries of `x`, keys and values of `source`, by the projections `w` has, and their biases where it has those."""
    q = einsum("BTD,DNH->BTNH", x, w.q_proj, out=ACT_BTNH)
    k = einsum("BSD,DNH->BSNH", source, w.k_proj, out=ACT_BTNH)
    v = einsum("BSD,DNH->BSNH", source, w.v_proj, out=ACT_BTNH)
    return (q, k, v) if w.q_bias is None else (q + w.q_bias, k + w.k_bias, v + w.v_bias)


def feed_forward(
    w: Any, x: Float[Array, "M T D"], activation: str, inner: tuple[str | None, ...] = ACT_BTF
) -> Float[Array, "M T E"]:
    """Two linear layers, with biases where `w` has those, and an activation between them. inner: the layout there."""
    h = einsum("BTD,DF->BTF", x, w.fc1, out=inner)
    h = ACTIVATIONS[activation](h if w.fc1_bias is None else h + w.fc1_bias)
    h = einsum("BTF,FE->BTE", h, w.fc2, out=ACT_BTD)
    return h if w.fc2_bias is None else h + w.fc2_bias


def layer_norm(x: Float[Array, "*B D"], p: LayerNorm, eps: float) -> Float[Array, "*B D"]:
    """Layer normalisation with f32 statistics."""
    f = x.astype(jnp.float32)
    f = f - jnp.mean(f, axis=-1, keepdims=True)
    f = f * jax.lax.rsqrt(jnp.mean(jnp.square(f), axis=-1, keepdims=True) + eps)
    return (f * p.scale + p.bias).astype(x.dtype)
