"""InternViT (InternVL, arXiv:2312.14238): a vision transformer whose residual branches have a learned scale.

Small towers (300M) have layer norms and biases; the large one (6B) has RMS norms, no query, key and value biases, and
an RMS norm of queries and keys over all heads at once.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass, register_static

from jaxvqa.attention import attend
from jaxvqa.decoder import rms_norm
from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import ACT_BTD, ArraySpec, constrain, einsum, layout, stack
from jaxvqa.typing import Array, Float
from jaxvqa.vision.clip import ACTIVATIONS, ClipConfig, LayerNorm, embed_patches, feed_forward, heads, layer_norm

QK_EPS = 1e-6
"""Of the norm of queries and keys, whatever the other norms have."""


@register_static
@dataclass(frozen=True)
class InternConfig(ClipConfig):
    """Sizes and options of an InternViT."""

    norm: str
    """"layer_norm" or "rms_norm"."""
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def from_hf(cls, hf: dict[str, Any], kind: str = "internvl_vision") -> "InternConfig":
        """Read HF's `vision_config`; raises `JaxVQAError` with every option that this tower does not have."""
        hf = _DEFAULTS | {"model_type": kind} | {k: v for k, v in hf.items() if v is not None}
        wrong = [
            f"{key} {hf[key]!r} (supported: {', '.join(map(repr, known))})"
            for key, known in (_SUPPORTED | {"model_type": (kind,)}).items()
            if hf[key] not in known
        ]
        image, patch = (_pair(hf[key]) for key in ("image_size", "patch_size"))
        if len({*image}) > 1 or len({*patch}) > 1 or image[0] % patch[0]:
            wrong.append(f"image_size {hf['image_size']} of patches {hf['patch_size']} (supported: squares of squares)")
        if hf["hidden_size"] % hf["num_attention_heads"]:
            wrong.append(f"hidden_size {hf['hidden_size']} is not a multiple of {hf['num_attention_heads']} heads")
        if wrong:
            raise JaxVQAError(f"config.json, vision model: {'; '.join(wrong)}")
        return cls(
            image_size=image[0],
            patch_size=patch[0],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            norm_eps=hf["layer_norm_eps"],
            activation=hf["hidden_act"],
            norm=hf["norm_type"],
            qkv_bias=hf["attention_bias"],
            qk_norm=hf["use_qk_norm"],
        )

    def to_hf(self, kind: str = "internvl_vision") -> dict[str, Any]:
        """HF's `vision_config`; the inverse of `from_hf`."""
        return super().to_hf(kind) | {
            "image_size": [self.image_size] * 2,
            "patch_size": [self.patch_size] * 2,
            "norm_type": self.norm,
            "attention_bias": self.qkv_bias,
            "use_qk_norm": self.qk_norm,
        }


def _pair(side: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return (side, side) if isinstance(side, int) else tuple(side)


# HF's defaults, left out of a config.json when equal.
_DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": False,
    "use_qk_norm": False,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "num_channels": 3,
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
_SUPPORTED = {
    "hidden_act": tuple(ACTIVATIONS),
    "norm_type": ("layer_norm", "rms_norm"),
    "num_channels": (3,),
    "use_mask_token": (False,),
    "use_absolute_position_embeddings": (True,),
    "use_mean_pooling": (True,),  # otherwise a further norm follows the last block
}


@register_dataclass
@dataclass(frozen=True)
class Norm:
    """A layer norm or, without bias, an RMS norm."""

    scale: Float[Array, "D"]
    bias: Float[Array, "D"] | None


@register_dataclass
@dataclass(frozen=True)
class InternLayer:
    """One block; in an `Intern` every leaf has a leading layer axis L. `scale1`, `scale2`: of its two branches."""

    norm1: Norm
    q_proj: Float[Array, "D N H"]
    q_bias: Float[Array, "N H"] | None
    q_norm: Float[Array, "N H"] | None
    k_proj: Float[Array, "D N H"]
    k_bias: Float[Array, "N H"] | None
    k_norm: Float[Array, "N H"] | None
    v_proj: Float[Array, "D N H"]
    v_bias: Float[Array, "N H"] | None
    o_proj: Float[Array, "N H D"]
    o_bias: Float[Array, "D"]
    scale1: Float[Array, "D"]
    norm2: Norm
    fc1: Float[Array, "D F"]
    fc1_bias: Float[Array, "F"]
    fc2: Float[Array, "F D"]
    fc2_bias: Float[Array, "D"]
    scale2: Float[Array, "D"]


@register_dataclass
@dataclass(frozen=True)
class Intern:
    """Parameters of the tower; the axes of length 1 are the checkpoint's."""

    patch_embed: Float[Array, "C p p D"]
    patch_bias: Float[Array, "D"]
    class_embed: Float[Array, "1 1 D"]
    position_embed: Float[Array, "1 P D"]
    layers: InternLayer


def specs(c: InternConfig) -> Intern:
    """Declare every parameter: shape, logical axes, initialisation."""
    D, F, N, H, p = c.width, c.mlp_width, c.num_heads, c.width // c.num_heads, c.patch_size
    vector = ArraySpec((D,), (None,), "zeros")
    ones = ArraySpec((D,), (None,), "ones")
    norm = Norm(ones, vector if c.norm == "layer_norm" else None)
    heads = ArraySpec((D, N, H), ("embed", "heads", None))
    head_bias = ArraySpec((N, H), ("heads", None), "zeros") if c.qkv_bias else None
    head_norm = ArraySpec((N, H), ("heads", None), "ones") if c.qk_norm else None
    out_scale = 0.02 / (2 * c.num_layers) ** 0.5
    layer = InternLayer(
        norm1=norm,
        q_proj=heads,
        q_bias=head_bias,
        q_norm=head_norm,
        k_proj=heads,
        k_bias=head_bias,
        k_norm=head_norm,
        v_proj=heads,
        v_bias=head_bias,
        o_proj=ArraySpec((N, H, D), ("heads", None, "embed"), scale=out_scale),
        o_bias=vector,
        scale1=ones,
        norm2=norm,
        fc1=ArraySpec((D, F), ("embed", "mlp")),
        fc1_bias=ArraySpec((F,), ("mlp",), "zeros"),
        fc2=ArraySpec((F, D), ("mlp", "embed"), scale=out_scale),
        fc2_bias=vector,
        scale2=ones,
    )
    return Intern(
        patch_embed=ArraySpec((3, p, p, D), (None, None, None, "embed")),
        patch_bias=vector,
        class_embed=ArraySpec((1, 1, D), (None, None, None)),
        position_embed=ArraySpec((1, c.grid[0] * c.grid[1] + 1, D), (None, None, "embed")),
        layers=stack(layer, c.num_layers),
    )


def encode(
    params: Intern, c: InternConfig, pixels: Float[Array, "M E E 3"], *, stop: int | None = None, backend: str = "auto"
) -> Float[Array, "M P D"]:
    """Hidden states of normalised pixels after `stop` blocks (default: all), the class token first."""
    x = embed_patches(params.patch_embed, c, pixels) + params.patch_bias
    first = jnp.broadcast_to(params.class_embed, (len(x), 1, c.width), out_sharding=layout(ACT_BTD))
    x = jnp.concatenate([first, x], axis=1) + constrain(params.position_embed, (None, None, None))

    def step(x, i):
        with jax.named_scope("vision/layer"):
            w = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), params.layers)
            return _block(w, c, x, backend), None

    return jax.lax.scan(step, x, jnp.arange(c.num_layers if stop is None else stop))[0]


def _block(w: InternLayer, c: InternConfig, x, backend):
    h = _normalise(x, w.norm1, c)
    q, k, v = heads(w, h, h)
    if w.q_norm is not None:
        q, k = _norm_heads(q, w.q_norm), _norm_heads(k, w.k_norm)
    out = attend(q, k, v, None, scale=q.shape[-1] ** -0.5, backend=backend)
    x = x + w.scale1 * (einsum("BTNH,NHD->BTD", out, w.o_proj, out=ACT_BTD) + w.o_bias)
    return x + w.scale2 * feed_forward(w, _normalise(x, w.norm2, c), c.activation)


def _normalise(x, w: Norm, c: InternConfig):
    if w.bias is None:
        return rms_norm(x, w.scale, c.norm_eps)
    return layer_norm(x, LayerNorm(w.scale, w.bias), c.norm_eps)


def _norm_heads(x, scale):
    """RMS norm over heads and head size together."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(jnp.square(f), axis=(-2, -1), keepdims=True) + QK_EPS)
    return scale * f.astype(x.dtype)
