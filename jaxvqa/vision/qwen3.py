"""Qwen3-VL's vision tower: Qwen2-VL's blocks, learned positions beside the rotary ones, features of several depths.

The learned positions are those of a square, interpolated to the grid of an image: on the host, as indices and weights.
DeepStack (arXiv:2406.04334) gives the decoder the outputs of inner blocks too, each through a merger of its own.

Letters as in `vision.qwen`: P patches, C tokens after the merge, t frames of a patch, p its side.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass, register_static

from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import ACT_BTD, BATCH, ArraySpec, constrain, layout, stack, take
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision import qwen
from jaxvqa.vision.clip import ACTIVATIONS, LayerNorm, feed_forward, layer_norm, norm_specs
from jaxvqa.vision.qwen import Mlp, Patches, QwenVision, QwenVisionConfig


@register_static
@dataclass(frozen=True)
class Qwen3VisionConfig(QwenVisionConfig):
    """Sizes of the tower; its blocks are plain and attend to the whole image."""

    side: int
    """Rows and columns of the learned positions."""
    deepstack: tuple[int, ...]
    """Blocks (0-based, ascending) whose outputs are features, too."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any], kind: str = "qwen3_vl") -> "Qwen3VisionConfig":
        """Read HF's `vision_config`; raises `JaxVQAError` with all that is not supported."""
        hf = _DEFAULTS | {k: v for k, v in hf.items() if v is not None}
        rope, deepstack, depth = hf.get("rope_parameters") or {}, tuple(hf["deepstack_visual_indexes"]), hf["depth"]
        side = round(hf["num_position_embeddings"] ** 0.5)
        faults = []
        if hf["model_type"] not in (kind, f"{kind}_vision"):
            faults.append(f"model type {hf['model_type']!r} (supported: {kind}_vision)")
        if hf["hidden_act"] not in ACTIVATIONS:
            faults.append(f"hidden_act {hf['hidden_act']!r} (supported: {', '.join(ACTIVATIONS)})")
        if hf["in_channels"] != 3:
            faults.append(f"in_channels {hf['in_channels']} (supported: 3)")
        if not isinstance(hf["patch_size"], int) or not isinstance(hf["temporal_patch_size"], int):
            sizes = f"patch_size {hf['patch_size']}, temporal_patch_size {hf['temporal_patch_size']}"
            faults.append(f"{sizes} (supported: one number)")
        if side**2 != hf["num_position_embeddings"]:
            faults.append(f"num_position_embeddings {hf['num_position_embeddings']} (supported: squares)")
        if (turned := rope.get("rope_type", "axial")) not in ("axial", "default"):
            faults.append(f"rope type {turned!r} (supported: axial)")
        if list(deepstack) != sorted({i for i in deepstack if 0 <= i < depth}):
            faults.append(f"deepstack_visual_indexes {list(deepstack)} (supported: ascending, of {depth} blocks)")
        if faults:
            raise JaxVQAError(f"config.json, vision model: {'; '.join(faults)}")
        return cls(
            patch_size=hf["patch_size"],
            frames=hf["temporal_patch_size"],
            merge_size=hf["spatial_merge_size"],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            num_layers=depth,
            num_heads=hf["num_heads"],
            out_width=hf["out_hidden_size"],
            activation=hf["hidden_act"],
            gated=False,
            window=None,
            full_layers=tuple(range(depth)),
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            side=side,
            deepstack=deepstack,
        )

    def to_hf(self) -> dict[str, Any]:
        """HF's `vision_config`; the inverse of `from_hf`."""
        return {
            "model_type": "qwen3_vl_vision",
            "depth": self.num_layers,
            "num_heads": self.num_heads,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "out_hidden_size": self.out_width,
            "hidden_act": self.activation,
            "in_channels": 3,
            "patch_size": self.patch_size,
            "spatial_merge_size": self.merge_size,
            "temporal_patch_size": self.frames,
            "num_position_embeddings": self.side**2,
            "deepstack_visual_indexes": list(self.deepstack),
            "rope_parameters": {"rope_type": "axial", "rope_theta": self.rope_theta},
        }

    @property
    def image_size(self) -> int:
        """Side of the nominal square image: each of its patches has a learned position of its own."""
        return self.side * self.patch_size


# HF's defaults, left out of a config.json when equal.
_DEFAULTS = {
    "model_type": "qwen3_vl_vision",
    "depth": 27,
    "num_heads": 16,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "out_hidden_size": 3584,
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24),
}
_NORM_EPS = 1e-6


@register_dataclass
@dataclass(frozen=True)
class DeepMerger:
    """As `qwen.Merger`, but the norm is of a token's patches together."""

    norm: LayerNorm
    mlp: Mlp


@register_dataclass
@dataclass(frozen=True)
class Qwen3Vision:
    """Parameters of the tower."""

    tower: QwenVision
    patch_bias: Float[Array, "D"]
    position_embed: Float[Array, "E D"]
    """Row-major, E = side²."""
    deepstack: DeepMerger | None
    """Stacked by depth."""


@register_dataclass
@dataclass(frozen=True, eq=False)
class PlacedPatches:
    """Images as lists of patches, and where these lie among the learned positions."""

    patches: Patches
    corners: Int[Array, "*M P 4"]
    """The learned positions around each patch."""
    weights: Float[Array, "*M P 4"]
    """Their shares in its own."""


def specs(c: Qwen3VisionConfig) -> Qwen3Vision:
    """Declare every parameter: shape, logical axes, initialisation."""
    tower = qwen.specs(c)
    deep = DeepMerger(norm_specs(c.width * c.merge_size**2), tower.merger.mlp)
    return Qwen3Vision(
        tower,
        patch_bias=ArraySpec((c.width,), (None,), "zeros"),
        position_embed=ArraySpec((c.side**2, c.width), (None, "embed")),
        deepstack=stack(deep, len(c.deepstack)) if c.deepstack else None,
    )


def lay_out(
    c: Qwen3VisionConfig, pixel_values: Float[np.ndarray, "P _"], grid: tuple[int, int], capacity: int
) -> PlacedPatches:
    """One image of h × w tokens, padded to `capacity` of them; see `qwen.lay_out`."""
    m = c.merge_size
    patches = qwen.lay_out(pixel_values, grid, capacity, patch_size=c.patch_size, merge_size=m)
    return PlacedPatches(patches, *interpolation(patches.positions, (grid[0] * m, grid[1] * m), c.side))


def interpolation(
    positions: Int[np.ndarray, "P 2"], grid: tuple[int, int], side: int
) -> tuple[Int[np.ndarray, "P 4"], Float[np.ndarray, "P 4"]]:
    """The four of side × side learned positions around each patch of a grid, and their bilinear weights, f32.

    The corners of the grid lie on those of the square.
    """
    at = positions.astype(np.float32) * np.float32(side - 1) / np.maximum(np.array(grid, np.float32) - 1, 1)
    low = np.floor(at)
    ends = np.stack([low, np.minimum(low + 1, side - 1)], axis=1).astype(np.int32)  # [P, end, axis]
    shares = np.stack([1 - (at - low), at - low], axis=1)
    corners = ends[:, :, None, 0] * side + ends[:, None, :, 1]
    weights = shares[:, :, None, 0] * shares[:, None, :, 1]
    return corners.reshape(-1, 4), weights.reshape(-1, 4)


def encode(
    params: Qwen3Vision, c: Qwen3VisionConfig, x: PlacedPatches, *, backend: str = "auto"
) -> Float[Array, "M C W"]:
    """Image tokens in the decoder's space, in raster order; those behind an image's own mean nothing.

    Features of width D stand side by side, W = (1 + n)·D: the last block's first, then those of `c.deepstack`.
    """
    x = jax.tree.map(lambda array: constrain(array, BATCH), x)
    h, done, deep = embed_patches(params, x), 0, []
    for number, block in enumerate(c.deepstack):
        h = qwen.run_blocks(params.tower.blocks, c, h, x.patches, done, block + 1, backend)
        merger = jax.tree.map(lambda w, number=number: w[number], params.deepstack)
        deep.append(merge_deep(merger, c, h))
        done = block + 1
    if done < c.num_layers:
        h = qwen.run_blocks(params.tower.blocks, c, h, x.patches, done, c.num_layers, backend)
    return jnp.concatenate([qwen.merge(params.tower.merger, c, h), *deep], axis=-1)


def embed_patches(params: Qwen3Vision, x: PlacedPatches) -> Float[Array, "M P D"]:
    """The patches' embeddings, plus their interpolated positions."""
    h = qwen.embed_patches(params.tower.patch_embed, x.patches) + params.patch_bias
    # One corner after the other: all four at once are four times the size of `h`.
    a, b, c, d = (take(params.position_embed, x.corners[..., i], ACT_BTD) * x.weights[..., i, None] for i in range(4))
    return h + (a + b + c + d).astype(h.dtype)


def merge_deep(w: DeepMerger, c: Qwen3VisionConfig, x: Float[Array, "M P D"]) -> Float[Array, "M C W"]:
    """DeepStack's merger: as `qwen.merge`, but for the norm."""
    x = jnp.reshape(x, (len(x), -1, c.width * c.merge_size**2), out_sharding=layout(ACT_BTD))
    return feed_forward(w.mlp, layer_norm(x, w.norm, _NORM_EPS), "gelu", ACT_BTD)


def flops(c: Qwen3VisionConfig, patches: int) -> int:
    """Analytic FLOPs of one image of `patches` patches, padding and mergers included."""
    joined = c.width * c.merge_size**2
    merger = patches // c.merge_size**2 * joined * (joined + c.out_width)
    return qwen.flops(c, patches) + 2 * len(c.deepstack) * merger
