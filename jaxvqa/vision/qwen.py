"""The vision towers of Qwen2-VL and Qwen2.5-VL, and the patch layout that the Qwen-VL families share.

An image keeps its aspect ratio: it is resized to whole tokens of m × m patches, and the tower sees a list of patches,
the m² of a token side by side. Qwen2.5-VL orders the tokens by windows and lets most blocks attend within a window only
(arXiv:2502.13923, §2.1.1). All of this is arithmetic on the host; the tower takes arrays, padded to a bucket.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass, register_static

from jaxvqa.attention import MASKED, Mask, attend
from jaxvqa.decoder import rms_norm
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.sharding import ACT_BTD, ACT_BTF, ACT_BTNH, BATCH, ArraySpec, constrain, einsum, layout, stack
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision.clip import ACTIVATIONS, LayerNorm, feed_forward, heads, layer_norm, norm_specs

BASE_SIDE = 224
"""Side in pixels of the nominal square image: the base window with which ViCrop was published for Qwen2.5-VL."""
MAX_ASPECT = 200
"""Longest side over shortest that the image processor takes."""
FEWEST = 16
"""Tokens below which a smaller default bucket saves nothing."""


# --- patch layout on the host, for all Qwen-VL families ---------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True, eq=False)
class Patches:
    """Images as lists of P patches in a tower's order, padded to C = P/m² tokens."""

    pixels: Float[Array, "*M P 3 p p"]
    """Normalised; 0 for padding."""
    positions: Int[Array, "*M P 2"]
    """Row and column of each patch."""
    window: Int[Array, "*M P"]
    """Window of each patch, from 1, in ascending order; -1 for padding."""
    places: Int[Array, "*M C"]
    """Where each token, in raster order, stands in the tower's order."""


def pixel_limits(processor: Any) -> tuple[int, int]:
    """The fewest and the most pixels to which a Qwen-VL image processor resizes.

    transformers reads them from `size` or from the older `min_pixels` and `max_pixels`, and keeps them in `size`.
    Raises JaxVQAError where they are missing.
    """
    low, high = (processor.size.get(edge) for edge in ("shortest_edge", "longest_edge"))
    if low is None or high is None or not 0 < low <= high:
        raise JaxVQAError(
            f"preprocessor_config.json: size {dict(processor.size)}; expected 0 < shortest_edge <= longest_edge (or "
            f"min_pixels and max_pixels), in pixels of an image's area"
        )
    return low, high


def patch_grid(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches to which a Qwen-VL image processor resizes an image of `size` (W, H).

    Both are multiples of its merge size. Sides are rounded to whole tokens; an area outside the processor's limits is
    scaled into them first, down by rounding off, up by rounding up, and a side stays at least one token.
    Raises UserError for an aspect ratio above 200.
    """
    W, H = size
    if max(W, H) > MAX_ASPECT * min(W, H):
        raise UserError(
            f"an image of {W} x {H} pixels is more than {MAX_ASPECT} times as long as wide, which this model cannot "
            f"encode: crop it or cut it into parts"
        )
    low, high = pixel_limits(processor)
    unit = processor.patch_size * processor.merge_size
    tokens = [round(side / unit) for side in (H, W)]
    if math.prod(tokens) * unit**2 > high:
        shrink = math.sqrt(H * W / high)
        tokens = [max(1, math.floor(side / shrink / unit)) for side in (H, W)]
    elif math.prod(tokens) * unit**2 < low:
        grow = math.sqrt(low / (H * W))
        tokens = [math.ceil(side * grow / unit) for side in (H, W)]
    rows, columns = (n * processor.merge_size for n in tokens)
    return rows, columns


def token_buckets(processor: Any) -> tuple[int, ...]:
    """Default buckets: image tokens after the merge, halved up to seven times from the most that an image can have."""
    unit = (processor.patch_size * processor.merge_size) ** 2
    low, high = (limit / unit for limit in pixel_limits(processor))
    # A thin image has one row of tokens at least, and rounding up adds a row and a column to the smallest area.
    thin = math.sqrt(MAX_ASPECT * high)
    grown = low + math.sqrt(MAX_ASPECT * low) + math.sqrt(low / MAX_ASPECT) + 1
    most = math.floor(max(high, thin, grown))
    return tuple(sorted({size for n in range(8) if (size := math.ceil(most / 2**n)) >= FEWEST} | {most}))


def lay_out(
    pixel_values: Float[np.ndarray, "P _"],
    grid: tuple[int, int],
    capacity: int,
    *,
    patch_size: int,
    merge_size: int,
    window: int | None = None,
) -> Patches:
    """One image's patches in the tower's order, padded to `capacity` tokens.

    pixel_values: as the image processor gives them, a token's patches side by side, tokens in raster order, each patch
        (channel, frame, row, column). A still image fills all frames alike; one is kept.
    grid: (h, w) tokens.
    window: tokens per side of an attention window, which orders the tokens; None is one window in raster order.
    """
    (h, w), m, p = grid, merge_size, patch_size
    row, column = np.divmod(np.arange(h * w), w)
    windows = np.zeros(h * w, np.int32) if window is None else row // window * -(-w // window) + column // window
    order = np.argsort(windows, kind="stable")
    i, j = np.divmod(np.arange(m * m), m)
    positions = np.stack([row[order, None] * m + i, column[order, None] * m + j], axis=-1)
    pixels = pixel_values.reshape(h * w, m * m, 3, -1, p, p)[order, :, :, 0]
    missing = capacity - h * w

    def padded(x, fill=0):
        """[h * w, m * m, ...] -> [capacity * m * m, ...]"""
        x = np.concatenate([x, np.full((missing, *x.shape[1:]), fill, x.dtype)])
        return x.reshape(capacity * m * m, *x.shape[2:])

    return Patches(
        pixels=padded(pixels.astype(np.float32, copy=False)),
        positions=padded(positions.astype(np.int32)),
        window=padded(np.repeat(windows[order, None] + 1, m * m, axis=1).astype(np.int32), -1),
        places=np.concatenate([np.argsort(order), np.arange(h * w, capacity)]).astype(np.int32),
    )


def rotary(positions: Int[Array, "M P 2"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine [M, P, 1, H/2] in f32: a quarter of a head's dimensions turns by the row, one by the column, and
    the second half of the head pairs with the first."""
    frequency = theta ** (-jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
    by_row, by_column = (positions[..., i, None].astype(jnp.float32) * frequency for i in (0, 1))
    angles = jnp.concatenate([by_row, by_column], axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "M P N H"], cos: Array, sin: Array) -> Float[Array, "M P N H"]:
    """Rotate the two halves of each head."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# --- the towers -------------------------------------------------------------------------------------------------------


@register_static
@dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes and options of a tower.

    `gated` blocks have RMSNorm and a gated MLP (Qwen2.5-VL), others LayerNorm and a plain MLP (Qwen2-VL).
    """

    patch_size: int
    frames: int
    """Frames that a patch spans; a still image fills them alike."""
    merge_size: int
    """Patches per side of a token."""
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    out_width: int
    activation: str
    gated: bool
    window: int | None
    """Tokens per side of an attention window; None is none."""
    full_layers: tuple[int, ...]
    """The blocks that attend to the whole image."""
    rope_theta: float

    @classmethod
    def from_hf(cls, hf: dict[str, Any], kind: str) -> "QwenVisionConfig":
        """Read the `vision_config` of a model of type `kind`; raises `JaxVQAError` with all that is not supported."""
        hf = _DEFAULTS[kind] | {k: v for k, v in hf.items() if v is not None}
        gated, rope, faults = kind == "qwen2_5_vl", hf.get("rope_parameters") or {}, []
        activations = ("silu",) if gated else tuple(ACTIVATIONS)
        if (found := hf.get("model_type", kind)) not in (kind, f"{kind}_vision"):
            faults.append(f"model type {found!r} (supported: {kind}_vision)")
        if hf["hidden_act"] not in activations:
            faults.append(f"hidden_act {hf['hidden_act']!r} (supported: {', '.join(activations)})")
        if (channels := hf.get("in_channels", hf.get("in_chans", 3))) != 3:
            faults.append(f"in_channels {channels} (supported: 3)")
        if (turned := rope.get("rope_type", "axial")) != "axial":
            faults.append(f"rope type {turned!r} (supported: axial)")
        patch, frames, merge, depth = (
            hf[k] for k in ("patch_size", "temporal_patch_size", "spatial_merge_size", "depth")
        )
        if not isinstance(patch, int) or not isinstance(frames, int):
            faults.append(f"patch_size {patch}, temporal_patch_size {frames} (supported: one number)")
        elif gated and hf["window_size"] < patch * merge:
            faults.append(f"window_size {hf['window_size']} (supported: {patch * merge}, a token's side, and more)")
        if faults:
            raise JaxVQAError(f"config.json, vision model: {'; '.join(faults)}")
        width, full = (hf["hidden_size"], hf["fullatt_block_indexes"]) if gated else (hf["embed_dim"], range(depth))
        return cls(
            patch_size=patch,
            frames=frames,
            merge_size=merge,
            width=width,
            mlp_width=hf["intermediate_size"] if gated else int(width * hf["mlp_ratio"]),
            num_layers=depth,
            num_heads=hf["num_heads"],
            out_width=hf["out_hidden_size"] if gated else hf["hidden_size"],
            activation=hf["hidden_act"],
            gated=gated,
            window=hf["window_size"] // merge // patch if gated else None,
            full_layers=tuple(i for i in range(depth) if i in full),
            rope_theta=float(rope.get("rope_theta", 10000.0)),
        )

    def to_hf(self) -> dict[str, Any]:
        """HF's `vision_config`; the inverse of `from_hf`."""
        hf = {
            "model_type": "qwen2_5_vl_vision" if self.gated else "qwen2_vl_vision",
            "depth": self.num_layers,
            "num_heads": self.num_heads,
            "hidden_act": self.activation,
            "in_channels": 3,
            "patch_size": self.patch_size,
            "spatial_merge_size": self.merge_size,
            "temporal_patch_size": self.frames,
            "rope_parameters": {"rope_type": "axial", "rope_theta": self.rope_theta},
        }
        if self.window is None:
            ratio = self.mlp_width // self.width
            return hf | {"embed_dim": self.width, "hidden_size": self.out_width, "mlp_ratio": ratio}
        return hf | {
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "out_hidden_size": self.out_width,
            "window_size": self.window * self.patch_size * self.merge_size,
            "fullatt_block_indexes": list(self.full_layers),
        }

    @property
    def image_size(self) -> int:
        """Side of the nominal square image."""
        return BASE_SIDE

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def window_patches(self) -> int:
        """The most patches in a window; 0 without windows."""
        return ((self.window or 0) * self.merge_size) ** 2


# HF's defaults, left out of a config.json when equal.
_BASE = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_DEFAULTS = {
    "qwen2_vl": _BASE | {"embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4},
    "qwen2_5_vl": _BASE
    | {
        "hidden_size": 3584,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
    },
}
_NORM_EPS = 1e-6


@register_dataclass
@dataclass(frozen=True)
class RmsNorm:
    scale: Float[Array, "D"]


@register_dataclass
@dataclass(frozen=True)
class Mlp:
    fc1: Float[Array, "D F"]
    fc1_bias: Float[Array, "F"]
    fc2: Float[Array, "F D"]
    fc2_bias: Float[Array, "D"]


@register_dataclass
@dataclass(frozen=True)
class GatedMlp:
    gate_proj: Float[Array, "D F"]
    gate_bias: Float[Array, "F"]
    up_proj: Float[Array, "D F"]
    up_bias: Float[Array, "F"]
    down_proj: Float[Array, "F D"]
    down_bias: Float[Array, "D"]


@register_dataclass
@dataclass(frozen=True)
class QwenBlock:
    """One block; in a `QwenVision` every leaf has a leading layer axis L."""

    norm1: RmsNorm | LayerNorm
    q_proj: Float[Array, "D N H"]
    q_bias: Float[Array, "N H"]
    k_proj: Float[Array, "D N H"]
    k_bias: Float[Array, "N H"]
    v_proj: Float[Array, "D N H"]
    v_bias: Float[Array, "N H"]
    o_proj: Float[Array, "N H D"]
    o_bias: Float[Array, "D"]
    norm2: RmsNorm | LayerNorm
    mlp: GatedMlp | Mlp


@register_dataclass
@dataclass(frozen=True)
class Merger:
    """Joins the patches of a token and maps them to the decoder's width; the norm is of single patches."""

    norm: RmsNorm | LayerNorm
    mlp: Mlp


@register_dataclass
@dataclass(frozen=True)
class QwenVision:
    patch_embed: Float[Array, "3 t p p D"]
    blocks: QwenBlock
    merger: Merger


def specs(c: QwenVisionConfig) -> QwenVision:
    """Declare every parameter: shape, logical axes, initialisation."""
    D, F, N, H, p = c.width, c.mlp_width, c.num_heads, c.head_dim, c.patch_size
    out_scale = 0.02 / (2 * c.num_layers) ** 0.5
    norm = RmsNorm(ArraySpec((D,), (None,), "ones")) if c.gated else norm_specs(D)
    heads = ArraySpec((D, N, H), ("embed", "heads", None))
    head_bias = ArraySpec((N, H), ("heads", None), "zeros")
    into, out = ArraySpec((D, F), ("embed", "mlp")), ArraySpec((F, D), ("mlp", "embed"), scale=out_scale)
    wide, narrow = ArraySpec((F,), ("mlp",), "zeros"), ArraySpec((D,), (None,), "zeros")
    block = QwenBlock(
        norm1=norm,
        q_proj=heads,
        q_bias=head_bias,
        k_proj=heads,
        k_bias=head_bias,
        v_proj=heads,
        v_bias=head_bias,
        o_proj=ArraySpec((N, H, D), ("heads", None, "embed"), scale=out_scale),
        o_bias=narrow,
        norm2=norm,
        mlp=GatedMlp(into, wide, into, wide, out, narrow) if c.gated else Mlp(into, wide, out, narrow),
    )
    joined = D * c.merge_size**2
    merger = Mlp(
        ArraySpec((joined, joined), (None, "embed")),
        ArraySpec((joined,), (None,), "zeros"),
        ArraySpec((joined, c.out_width), (None, "embed")),
        ArraySpec((c.out_width,), (None,), "zeros"),
    )
    kernel = ArraySpec((3, c.frames, p, p, D), (None, None, None, None, "embed"))
    return QwenVision(kernel, stack(block, c.num_layers), Merger(norm, merger))


def encode(
    params: QwenVision, c: QwenVisionConfig, patches: Patches, *, backend: str = "auto"
) -> Float[Array, "M C D"]:
    """Image tokens in the decoder's space, in raster order; those behind an image's own mean nothing."""
    patches = jax.tree.map(lambda x: constrain(x, BATCH), patches)
    x = embed_patches(params.patch_embed, patches)
    x = run_blocks(params.blocks, c, x, patches, 0, c.num_layers, backend)
    x = merge(params.merger, c, x)
    return jnp.take_along_axis(x, patches.places[:, :, None], axis=1)


def embed_patches(kernel: Float[Array, "3 t p p D"], patches: Patches) -> Float[Array, "M P D"]:
    """The convolution of non-overlapping patches; all frames show the same."""
    return einsum("BPcpq,ctpqD->BPD", patches.pixels.astype(kernel.dtype), kernel, out=ACT_BTD)


def run_blocks(
    blocks: QwenBlock,
    c: QwenVisionConfig,
    x: Float[Array, "M P D"],
    patches: Patches,
    start: int,
    stop: int,
    backend: str,
) -> Float[Array, "M P D"]:
    """The blocks start..stop-1, over patches in the tower's order."""
    rope = rotary(patches.positions, c.head_dim, c.rope_theta)
    options: dict[str, Any] = dict(scale=c.head_dim**-0.5, backend=backend)
    # Padding is hidden by a bias: a mask of segments would keep flash kernels away, or be an array of P x P.
    padding = jnp.where(patches.window < 0, jnp.float32(MASKED), 0)[:, None]
    is_full = jnp.isin(jnp.arange(c.num_layers), jnp.array(c.full_layers, int))

    def full(q, k, v):
        return attend(q, k, v, None, key_bias=padding, **options)

    def windows(q, k, v):
        return attend_windows(q, k, v, patches.window, c.window_patches, **options)

    def step(x, i):
        with jax.named_scope("vision/layer"):
            block = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), blocks)
            attention = full if c.window is None else functools.partial(jax.lax.cond, is_full[i], full, windows)
            return _block(block, c, x, rope, attention), None

    return jax.lax.scan(step, x, jnp.arange(start, stop))[0]


def attend_windows(
    q: Float[Array, "M P N H"],
    k: Float[Array, "M P N H"],
    v: Float[Array, "M P N H"],
    window: Int[Array, "M P"],
    most: int,
    **options: Any,
) -> Float[Array, "M P N H"]:
    """Attention within windows that lie one behind the other, of `most` patches or fewer: linear in P.

    A block of 2·`most` queries sees its own keys and `most` on either side, for no window reaches farther.
    options: of `attend`.
    """
    M, P, N, H = q.shape
    most = min(most, P)
    size = 2 * most
    blocks = -(-P // size)

    def cut(x, start, fill=0):
        """[M, P, ...] -> [M * blocks, size, ...], the blocks from `start` on, with `fill` for what x does not have."""
        ends = [(0, 0, 0), (-start, blocks * size + start - P, 0), *[(0, 0, 0)] * (x.ndim - 2)]
        x = jax.lax.pad(x, jnp.array(fill, x.dtype), ends)
        return jnp.reshape(x, (M * blocks, size, *x.shape[2:]), out_sharding=layout(ACT_BTNH[: x.ndim]))

    def around(x, fill=0):
        return jnp.concatenate([cut(x, -most, fill), cut(x, most, fill)], axis=1)

    # Segment 0 would be seen by all.
    own, seen = cut(window, 0, -1), around(window, -1)
    mask = Mask(jnp.zeros_like(own), jnp.zeros_like(seen), own, seen)
    out = attend(cut(q, 0), around(k), around(v), mask, **options)
    return jnp.reshape(out, (M, blocks * size, N, H), out_sharding=layout(ACT_BTNH))[:, :P]


def _block(w: QwenBlock, c: QwenVisionConfig, x, rope, attention: Callable):
    h = _norm(x, w.norm1)
    q, k, v = heads(w, h, h)
    out = attention(rotate(q, *rope), rotate(k, *rope), v)
    x = x + einsum("BTNH,NHD->BTD", out, w.o_proj, out=ACT_BTD) + w.o_bias
    h = _norm(x, w.norm2)
    if isinstance(w.mlp, GatedMlp):
        gate = jax.nn.silu(einsum("BTD,DF->BTF", h, w.mlp.gate_proj, out=ACT_BTF) + w.mlp.gate_bias)
        h = gate * (einsum("BTD,DF->BTF", h, w.mlp.up_proj, out=ACT_BTF) + w.mlp.up_bias)
        return x + einsum("BTF,FD->BTD", h, w.mlp.down_proj, out=ACT_BTD) + w.mlp.down_bias
    return x + feed_forward(w.mlp, h, c.activation)


def merge(w: Merger, c: QwenVisionConfig, x: Float[Array, "M P D"]) -> Float[Array, "M C W"]:
    """Patches to tokens, in the tower's order."""
    x = _norm(x, w.norm)
    x = jnp.reshape(x, (len(x), -1, c.width * c.merge_size**2), out_sharding=layout(ACT_BTD))
    return feed_forward(w.mlp, x, "gelu", ACT_BTD)


def _norm(x, w: RmsNorm | LayerNorm):
    return rms_norm(x, w.scale, _NORM_EPS) if isinstance(w, RmsNorm) else layer_norm(x, w, _NORM_EPS)


def flops(c: QwenVisionConfig, patches: int) -> int:
    """Analytic FLOPs of one image of `patches` patches, padding included, merger included."""
    D, joined = c.width, c.width * c.merge_size**2
    block = 4 * D**2 + (3 if c.gated else 2) * D * c.mlp_width
    full = c.num_layers if c.window is None else len(c.full_layers)
    keys = full * patches + (c.num_layers - full) * 4 * c.window_patches
    merger = patches // c.merge_size**2 * joined * (joined + c.out_width)
    return 2 * (patches * (3 * c.patch_size**2 * D + c.num_layers * block + 2 * keys * D) + merger)
