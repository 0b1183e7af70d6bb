"""The SigLIP vision tower (LLaVA-OneVision's image encoder): CLIP's blocks, no class token, no norm before them."""

from dataclasses import dataclass, replace
from typing import Any

from jax.tree_util import register_dataclass, register_static

from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import ArraySpec, constrain
from jaxvqa.typing import Array, Float
from jaxvqa.vision.clip import ClipConfig, ClipLayer, LayerNorm, embed_patches, layer_specs, norm_specs, run_to


@register_static
@dataclass(frozen=True)
class SiglipConfig(ClipConfig):
    """Sizes of a SigLIP vision tower. Where `patch_size` does not divide `image_size`, the last pixels are not seen."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any], kind: str = "siglip_vision_model") -> "ClipConfig":
        """Read HF's `vision_config`; raises `JaxVQAError` for another model type or activation."""
        return super().from_hf(hf, kind)

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
    return run_to(params.layers, c, x, feature_layers, backend)
