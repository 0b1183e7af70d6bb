"""BLIP's vision tower: CLIP's blocks without a norm before them, and one after them that every token passes."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.tree_util import register_dataclass

from jaxvqa.sharding import ACT_BTD, ArraySpec, constrain, layout
from jaxvqa.typing import Array, Float
from jaxvqa.vision.clip import (
    ClipConfig,
    ClipLayer,
    LayerNorm,
    embed_patches,
    layer_norm,
    layer_specs,
    norm_specs,
    run_blocks,
)


@register_dataclass
@dataclass(frozen=True)
class BlipVision:
    """Parameters of the tower; the axes of length 1 are the checkpoint's."""

    patch_embed: Float[Array, "C p p D"]
    patch_bias: Float[Array, "D"]
    class_embed: Float[Array, "1 1 D"]
    position_embed: Float[Array, "1 P D"]
    layers: ClipLayer
    post_norm: LayerNorm


def specs(c: ClipConfig) -> BlipVision:
    """Declare every parameter: shape, logical axes, initialisation."""
    D, p, patches = c.width, c.patch_size, c.grid[0] * c.grid[1]
    return BlipVision(
        patch_embed=ArraySpec((3, p, p, D), (None, None, None, "embed")),
        patch_bias=ArraySpec((D,), (None,), "zeros"),
        class_embed=ArraySpec((1, 1, D), (None, None, None)),
        position_embed=ArraySpec((1, patches + 1, D), (None, None, "embed")),
        layers=layer_specs(c),
        post_norm=norm_specs(D),
    )


def encode(
    params: BlipVision,
    c: ClipConfig,
    pixels: Float[Array, "M E E 3"],
    *,
    stop: int | None = None,
    backend: str = "auto",
) -> Float[Array, "M P D"]:
    """Hidden states of normalised pixels, the class token first, after `post_norm`.

    stop: the hidden state after that many blocks instead, without the norm (HF's `hidden_states[stop]`).
    """
    x = embed_patches(params.patch_embed, c, pixels) + params.patch_bias
    first = jnp.broadcast_to(params.class_embed, (len(x), 1, c.width), out_sharding=layout(ACT_BTD))
    x = jnp.concatenate([first, x], axis=1) + constrain(params.position_embed, (None, None, None))
    if stop is not None:
        return run_blocks(params.layers, c, x, 0, stop, backend)
    return layer_norm(run_blocks(params.layers, c, x, 0, c.num_layers, backend), params.post_norm, c.norm_eps)
