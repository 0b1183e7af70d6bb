"""The SigLIP vision tower (LLaVA-OneVision's image encoder): CLIP's blocks, no class token, no norm before them."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.tree_util import register_dataclass, register_static

from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import ArraySpec, constrain
from jaxvqa.typing import Array, Float
from jaxvqa.vision.clip import (
    ACTIVATIONS,
    ClipConfig,
    ClipLayer,
    LayerNorm,
    embed_patches,
    hidden_index,
    layer_specs,
    norm_specs,
    run_blocks,
)

# HF's defaults, left out of a config.json when equal.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


@register_static
@dataclass(frozen=True)
class SiglipConfig(ClipConfig):
    """Sizes of a SigLIP vision tower. Where `patch_size` does not divide `image_size`, the last pixels are not seen."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any], kind: str = "siglip_vision_model") -> "SiglipConfig":
        """Read HF's `vision_config`; raises `JaxVQAError` for another model type or activation."""
        if (found := hf.get("model_type", kind)) != kind:
            raise JaxVQAError(f"vision model type {found!r} is not supported; supported is {kind}")
        hf = _DEFAULTS | {k: v for k, v in hf.items() if v is not None}
        if hf["hidden_act"] not in ACTIVATIONS:
            raise JaxVQAError(
                f"vision hidden_act {hf['hidden_act']!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
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

    def to_hf(self, kind: str = "siglip_vision_model") -> dict[str, Any]:
        """HF's `vision_config`, without the pooling head; the inverse of `from_hf`."""
        return super().to_hf(kind) | {"vision_use_head": False}


@register_dataclass
@dataclass(frozen=True)
class Siglip:
    """Parameters of the tower. `post_norm` belongs to the checkpoint; hidden states do not pass it."""

    patch_embed: Float[Array, "C p p D"]
    patch_bias: Float[Array, "D"]
    position_embed: Float[Array, "P D"]
    layers: ClipLayer
    post_norm: LayerNorm


def specs(c: SiglipConfig) -> Siglip:
    """Declare every parameter: shape, logical axes, initialisation."""
    D, p, patches = c.width, c.patch_size, c.grid[0] * c.grid[1]
    return Siglip(
        patch_embed=ArraySpec((3, p, p, D), (None, None, None, "embed")),
        patch_bias=ArraySpec((D,), (None,), "zeros"),
        position_embed=ArraySpec((patches, D), (None, "embed")),
        layers=layer_specs(c),
        post_norm=norm_specs(D),
    )


def encode(
    params: Siglip,
    c: SiglipConfig,
    pixels: Float[Array, "M E E 3"],
    feature_layers: tuple[int, ...] = (-1,),
    *,
    backend: str = "auto",
) -> Float[Array, "M P D"]:
    """Hidden states of normalised pixels, row-major; several feature layers are concatenated along D.

    Runs only as many blocks as the highest feature layer needs.
    """
    if pixels.shape[1:] != (c.image_size, c.image_size, 3):
        raise JaxVQAError(f"pixels {pixels.shape}: expected [M, {c.image_size}, {c.image_size}, 3]")
    seen = c.grid[0] * c.patch_size
    x = embed_patches(params.patch_embed, replace(c, image_size=seen), pixels[:, :seen, :seen])
    x = x + params.patch_bias + constrain(params.position_embed, (None, None))

    wanted = [hidden_index(c, f) for f in feature_layers]
    states, done = {0: x}, 0
    for stop in sorted(set(wanted)):
        states[stop] = x = run_blocks(params.layers, c, x, done, stop, backend)
        done = stop
    return jnp.concatenate([states[i] for i in wanted], axis=-1)
