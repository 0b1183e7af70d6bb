"""LLaVA-OneVision: a SigLIP tower that sees an image whole and in tiles, a two-layer connector, a Qwen2 decoder.

The image is encoded whole (the *base view*, squashed to E × E) and, at a resolution of its own, on a *canvas* of a × b
tiles of E × E pixels: resized with its shape kept, centred, each tile encoded alone. The tiles' features are put
together to one grid of cells; the rows or columns that see padding only are taken off; a grid of more cells than
`max_tiles` tiles have is resized; a learned newline follows each row (Li et al., "LLaVA-OneVision: Easy Visual Task
Transfer", 2024; "anyres_max_9" of github.com/LLaVA-VL/LLaVA-NeXT). The decoder's tokens of an image are those of the
base view, then the grid's, row by row. Maps look at the grid.

Which features make which token is worked out on the host: one gather with weights, of a shape that depends on the
number of tiles alone. LLaVA-NeXT (`llava_next`) is the same with a CLIP tower and without resizing of grids.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass, register_static
from PIL import Image

from jaxvqa import decoder, geometry
from jaxvqa.decoder import Decoder, DecoderConfig
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.geometry import Geometry
from jaxvqa.images import pad_to_square
from jaxvqa.models.common import Projector, embed, extend, flops, prefill, project, projector_specs, resume
from jaxvqa.sharding import ACT_BTD, BATCH, ArraySpec, constrain, layout
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision import clip, siglip
from jaxvqa.vision.clip import Clip, ClipConfig
from jaxvqa.vision.inputs import ImageInput, bucket_of
from jaxvqa.vision.siglip import Siglip, SiglipConfig

SEVERAL = "pad"
"""How the images of a prompt that has several are made ready."""
SETUPS = {"hf": "qwen_1_5", "pad": "qwen_1_5"}
"""How images are made ready, and the prompt template with which the published results of that were made: "hf" (base
view and tiles) or "pad" (one view, padded to a square with the mean colour, and one newline: what transformers does
with the images of a prompt that has several)."""

_SIDES = range(384, 2305, 384)


@register_static
@dataclass(frozen=True)
class LlavaOnevisionConfig:
    """Configuration of a LLaVA-OneVision model."""

    vision: ClipConfig
    """Of a SigLIP tower (`SiglipConfig`) or of a CLIP, whose class token is dropped."""
    decoder: DecoderConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    projector_activation: str
    projector_bias: bool
    canvases: tuple[tuple[int, int], ...]
    """(height, width) in pixels, multiples of the tile's side; of equally good ones an image takes the first."""
    max_tiles: int | None
    """Tiles whose cells a grid may have before it is resized (to about as many); None: it never is."""

    HF_DEFAULTS: ClassVar[dict[str, Any]] = {
        "image_token_index": 151646,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[height, width] for height in _SIDES for width in _SIDES],
    }
    """What HF leaves out of a config.json when equal; without an aspect ratio grids are never resized."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlavaOnevisionConfig":
        """Read an HF config.json; raises `JaxVQAError` that names every option that is not supported."""
        if missing := [k for k in ("text_config", "vision_config") if k not in hf]:
            raise JaxVQAError(f"config.json of a {hf.get('model_type')} model lacks {', '.join(missing)}")
        hf = cls.HF_DEFAULTS | {k: v for k, v in hf.items() if v is not None}
        limit = re.fullmatch(r"anyres_max_([1-9]\d*)", hf.get("vision_aspect_ratio", ""))
        text = hf["text_config"]
        tied = hf.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        is_clip = hf["vision_config"].get("model_type") == "clip_vision_model"
        vision = (ClipConfig if is_clip else SiglipConfig).from_hf(hf["vision_config"])
        layers, E = hf["vision_feature_layer"], vision.image_size
        config = cls(
            vision=vision,
            decoder=DecoderConfig.from_hf(text, tied=bool(tied)),
            image_token_id=hf.get("image_token_id", hf["image_token_index"]),
            feature_layers=(layers,) if isinstance(layers, int) else tuple(layers),
            projector_activation=hf.get("projector_hidden_act", "gelu"),
            projector_bias=hf.get("multimodal_projector_bias", True),
            canvases=tuple((height, width) for height, width in hf["image_grid_pinpoints"]),
            max_tiles=int(limit[1]) if limit else None,
        )
        faults = []
        if limit is None and (aspect := hf.get("vision_aspect_ratio")):
            faults.append(f"vision_aspect_ratio {aspect!r} (supported: anyres_max_N)")
        if (select := hf["vision_feature_select_strategy"]) != config.select:
            faults.append(f"vision_feature_select_strategy {select!r} with this tower (supported: {config.select!r})")
        if config.projector_activation not in clip.ACTIVATIONS:
            known = ", ".join(clip.ACTIVATIONS)
            faults.append(f"projector_hidden_act {config.projector_activation!r} (supported: {known})")
        if wrong := [size for size in config.canvases if min(size) < E or size[0] % E or size[1] % E]:
            faults.append(f"image_grid_pinpoints {wrong} (supported: multiples of image_size, {E})")
        if faults:
            raise JaxVQAError(f"config.json: {'; '.join(faults)}")
        for layer in config.feature_layers:
            clip.hidden_index(vision, layer)
        return config

    @property
    def select(self) -> str:
        """HF's `vision_feature_select_strategy`: the tower's tokens but the class token, where there is one."""
        return "full" if isinstance(self.vision, SiglipConfig) else "default"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells of an image of E × E pixels."""
        return self._square.grid

    @property
    def image_tokens(self) -> int:
        """Decoder tokens of an image of E × E pixels."""
        return self._square.tokens

    @property
    def _square(self) -> "Plan":
        return plan(self, (self.vision.image_size, self.vision.image_size))


@register_dataclass
@dataclass(frozen=True)
class LlavaOnevision:
    """All parameters."""

    vision: Siglip | Clip
    projector: Projector
    newline: Float[Array, "D"]
    decoder: Decoder


def specs(c: LlavaOnevisionConfig) -> LlavaOnevision:
    """Declare every parameter: shape, logical axes, initialisation."""
    width_in, D = c.vision.width * len(c.feature_layers), c.decoder.width
    return LlavaOnevision(
        vision=_tower(c).specs(c.vision),
        projector=projector_specs(width_in, D, bias=c.projector_bias),
        newline=ArraySpec((D,), (None,), scale=D**-0.5),
        decoder=decoder.specs(c.decoder),
    )


def _tower(c: LlavaOnevisionConfig) -> Any:
    return siglip if isinstance(c.vision, SiglipConfig) else clip


@dataclass(frozen=True)
class Plan:
    """How an image of some size is laid out. P is the number of cells of one tile.

    tiles: (rows, columns) of the canvas; (0, 0) where the padded image is the only view.
    first: upper left one of the canvas's cells that un-padding leaves.
    kept: (rows, columns) that it leaves. Where it leaves none, of images very long and narrow, the base view is the
        grid, and newlines follow it; so too with a padded image.
    grid: (h, w) after resizing: `kept` but for large grids.
    base: tokens before the grid's first one.
    tokens: all of the image.
    """

    tiles: tuple[int, int]
    first: tuple[int, int]
    kept: tuple[int, int]
    grid: tuple[int, int]
    base: int
    tokens: int


def plan(c: LlavaOnevisionConfig, size: tuple[int, int], setup: str = "hf") -> Plan:
    """The layout of an image of `size` (W, H). Raises UserError where resizing its grid leaves no row or no column."""
    (W, H), E, tile = size, c.vision.image_size, c.vision.grid
    P = tile[0] * tile[1]
    if setup == "pad":
        return Plan((0, 0), (0, 0), tile, tile, 0, P + 1)
    height, width = canvas_of(c.canvases, size)
    a, b = height // E, width // E
    rows, columns = a * tile[0], b * tile[1]
    top = left = 0
    # Rounded to 7 digits before it is cut, as transformers does: a whole number of rows may come out just below.
    if W / H > columns / rows:
        top = (rows - int(round(H * (columns / W), 7))) // 2
    else:
        left = (columns - int(round(W * (rows / H), 7))) // 2
    kept = h, w = rows - 2 * top, columns - 2 * left
    if 0 in kept:
        return Plan((a, b), (0, 0), tile, tile, 0, P + h)
    ratio = math.sqrt(h * w / (c.max_tiles * P)) if c.max_tiles else 0.0
    if ratio > 1.1:
        h, w = int(h // ratio), int(w // ratio)
    if 0 in (h, w):
        raise UserError(f"an image of {W}x{H} pixels is too long and narrow for this model: give it a part, or pad it")
    return Plan((a, b), (top, left), kept, (h, w), P, P + h * (w + 1))


def canvas_of(canvases: Sequence[tuple[int, int]], size: tuple[int, int]) -> tuple[int, int]:
    """The canvas (height, width) on which most pixels of an image of `size` (W, H) are shown, then the smallest."""
    W, H = size

    def merit(canvas):
        scale = min(canvas[1] / W, canvas[0] / H)
        shown = min(int(W * scale) * int(H * scale), W * H)
        return shown, shown - canvas[0] * canvas[1]

    return max(canvases, key=merit)  # the first of equals


def check_processor(c: LlavaOnevisionConfig, processor: Any) -> None:
    """`JaxVQAError` unless the processor cuts the tiles that the model puts together."""
    E, size = c.vision.image_size, dict(processor.size)
    found = {size.get(name, size.get("shortest_edge")) for name in ("height", "width")}
    if processor.do_center_crop:
        found |= set(dict(processor.crop_size).values())
    if found != {E}:
        raise JaxVQAError(f"preprocessor_config.json makes tiles of {size}; the vision tower needs {E}x{E}")
    if (canvases := tuple(map(tuple, processor.image_grid_pinpoints))) != c.canvases:
        raise JaxVQAError(
            f"preprocessor_config.json: image_grid_pinpoints {canvases} differ from those of config.json, {c.canvases}"
        )


def default_buckets(c: LlavaOnevisionConfig, processor: Any) -> tuple[int, ...]:
    """Tiles of an image, the base view included: 1, and each at least half as many again as the one before."""
    E = c.vision.image_size
    buckets: list[int] = []
    for tiles in sorted({1 + height * width // E**2 for height, width in c.canvases}, reverse=True):
        if not buckets or 3 * tiles <= 2 * buckets[0]:
            buckets.insert(0, tiles)
    return (1, *buckets)


def _room(c: LlavaOnevisionConfig, tiles: int) -> tuple[int, int]:
    """The most cells and the most tokens that an image of `tiles` tiles, the base view included, can have."""
    E, (gh, gw) = c.vision.image_size, c.vision.grid
    P = gh * gw
    limit = math.inf if c.max_tiles is None else int(1.21 * c.max_tiles * P) + 1
    cells, tokens = P, P + 1
    for height, width in c.canvases:
        a, b = height // E, width // E
        if a * b < tiles:
            most = min(a * b * P, limit)
            cells, tokens = max(cells, int(most)), max(tokens, int(P + most + a * gh))
    return cells, tokens


def geometry_of(
    c: LlavaOnevisionConfig, processor: Any, size: tuple[int, int], buckets: tuple[int, ...], setup: str = "hf"
) -> Geometry:
    """Where each cell of the grid looks, for an image of `size` (W, H).

    The cells of a tile are taken to divide it evenly, as un-padding does. (27 patches of 14 pixels leave the last 6 of
    a tile's 384 unseen, so SigLIP's own cells lie up to 6 pixels of the canvas further up and left.)
    """
    made = plan(c, size, setup)
    return _geometry(c, size, made, _room(c, _bucket(made, buckets))[0])


def _bucket(made: Plan, buckets: tuple[int, ...]) -> int:
    return bucket_of(1 + made.tiles[0] * made.tiles[1], buckets, "the number of tiles of an image")


def _geometry(c: LlavaOnevisionConfig, size: tuple[int, int], made: Plan, capacity: int) -> Geometry:
    (W, H), E, tile = size, c.vision.image_size, c.vision.grid
    if made.base == 0:
        place = geometry.for_pad if made.tiles == (0, 0) else geometry.for_squash
        found = place(W, H, E, tile)
        return Geometry(found.mode, size, E, tile, found.origin, found.extent, capacity)
    height, width = made.tiles[0] * E, made.tiles[1] * E
    # The image's size on the canvas: one side fits, the other is rounded up.
    if width / W < height / H:
        shown = width, min(math.ceil(H * (width / W)), height)
    else:
        shown = min(math.ceil(W * (height / H)), width), height
    (top, left), (h, w) = made.first, made.kept
    x, y = left * E / tile[1] - (width - shown[0]) // 2, top * E / tile[0] - (height - shown[1]) // 2
    p = c.vision.patch_size
    return Geometry(
        "tiles",
        size,
        (w * p, h * p),
        made.grid,
        (x * W / shown[0], y * H / shown[1]),
        (w * E / tile[1] * W / shown[0], h * E / tile[0] * H / shown[1]),
        capacity,
    )


@register_dataclass
@dataclass(frozen=True, eq=False)
class Tiles:
    """One image for `encode_images`, which takes M of them: every leaf with a leading axis.

    Its token s is Σ_k weights[s, k] · f[index[s, k]], f being the features of all n tiles, P of each, and the newline.
    """

    pixels: Float[np.ndarray | Array, "*M n E E 3"]
    """Normalised; the base view, the canvas's tiles row by row, zeros."""
    index: Int[np.ndarray | Array, "*M S 4"]
    weights: Float[np.ndarray | Array, "*M S 4"]


def process(
    c: LlavaOnevisionConfig, processor: Any, image: Image.Image, buckets: tuple[int, ...], setup: str = "hf"
) -> ImageInput:
    """An image for the encoder: pixels by the checkpoint's processor, and how features become tokens."""
    made, E = plan(c, image.size, setup), c.vision.image_size
    if setup == "pad":
        red, green, blue = (int(255 * mean) for mean in processor.image_mean)
        shown, canvases, count = pad_to_square(image, (red, green, blue)), [[E, E]], 1
    else:
        shown, canvases, count = image, [list(size) for size in c.canvases], 1 + made.tiles[0] * made.tiles[1]
    pixels = processor(images=[shown], image_grid_pinpoints=canvases, return_tensors="np")["pixel_values"][0][:count]
    n = _bucket(made, buckets)
    cells, capacity = _room(c, n)
    padded = np.zeros((n, E, E, 3), np.float32)
    padded[:count] = pixels.transpose(0, 2, 3, 1)
    index, weights = _assembly(c, made, n)
    missing = ((0, capacity - made.tokens), (0, 0))
    (h, w), step = made.grid, made.grid[1] + (made.base > 0)
    return ImageInput(
        Tiles(padded, np.pad(index, missing), np.pad(weights, missing)),
        _geometry(c, image.size, made, cells),
        (made.base + step * np.arange(h)[:, None] + np.arange(w)).ravel().astype(np.int32),
        made.tokens,
        capacity,
    )


def _assembly(c: LlavaOnevisionConfig, made: Plan, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`Tiles.index` and `Tiles.weights` of an image's tokens: the newline lies behind the features of n tiles."""
    gh, gw = c.vision.grid
    P = gh * gw
    newline = n * P
    base = np.arange(P)
    if made.base == 0:
        index = np.append(base, np.full(made.tokens - P, newline))[:, None].astype(np.int32)
        return np.pad(index, ((0, 0), (0, 3))), np.eye(1, 4, dtype=np.float32).repeat(len(index), 0)
    rows, down = _interpolation(made.first[0], made.kept[0], made.grid[0])
    columns, right = _interpolation(made.first[1], made.kept[1], made.grid[1])
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]  # [h, 1, 2, 1] and [1, w, 1, 2]
    tile = 1 + rows // gh * made.tiles[1] + columns // gw
    (h, w), neighbours = made.grid, tile * P + rows % gh * gw + columns % gw
    weights = down[:, None, :, None] * right[None, :, None, :]
    tokens = np.full((P + h * (w + 1), 4), newline)
    share = np.eye(1, 4).repeat(len(tokens), 0)
    tokens[:P, 0] = base
    tokens[P:].reshape(h, w + 1, 4)[:, :w] = neighbours.reshape(h, w, 4)
    share[P:].reshape(h, w + 1, 4)[:, :w] = weights.reshape(h, w, 4)
    return tokens.astype(np.int32), share.astype(np.float32)


def _interpolation(first: int, size: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resizing of `size` cells from `first` on: int [target, 2] neighbours, float64 [target, 2] weights.

    Centres map to centres, no smoothing (torch's `interpolate(align_corners=False)`).
    """
    at = np.maximum((np.arange(target) + 0.5) * size / target - 0.5, 0)
    low = at.astype(int)
    high = np.minimum(low + 1, size - 1)
    return first + np.stack([low, high], axis=1), np.stack([1 - (at - low), at - low], axis=1)


def encode_images(
    params: LlavaOnevision, c: LlavaOnevisionConfig, tiles: Tiles, *, backend: str = "auto"
) -> Float[Array, "M S D"]:
    """Image tokens in the decoder's space: base view, then the grid with a newline after each row; zeros as padding."""
    M, n, E = tiles.pixels.shape[:3]
    pixels = jnp.reshape(constrain(tiles.pixels, BATCH), (M * n, E, E, 3), out_sharding=layout(BATCH))
    x = _tower(c).encode(params.vision, c.vision, pixels, c.feature_layers, backend=backend)
    x = project(params.projector, x if c.select == "full" else x[:, 1:], c.projector_activation)
    x = jnp.reshape(x, (M, -1, c.decoder.width), out_sharding=layout(BATCH))
    newline = jnp.broadcast_to(params.newline, (M, 1, c.decoder.width), out_sharding=layout(ACT_BTD))
    return assemble(
        jnp.concatenate([x, newline], axis=1), constrain(tiles.index, BATCH), constrain(tiles.weights, BATCH)
    )


def assemble(
    features: Float[Array, "M F D"], index: Int[Array, "M S 4"], weights: Float[Array, "M S 4"]
) -> Float[Array, "M S D"]:
    """Tokens from features, weighted in f32; one neighbour at a time, or it would take four times the memory."""
    total = jnp.zeros((), jnp.float32)
    for k in range(4):
        picked = jnp.take_along_axis(features, index[:, :, k, None], axis=1)
        total = total + weights[:, :, k, None] * picked.astype(jnp.float32)
    return total.astype(features.dtype)


def image_flops(c: LlavaOnevisionConfig, arrays: Tiles) -> int:
    """Analytic FLOPs of encoding one image of that many tiles, connector included, padding too."""
    v, D, n = c.vision, c.decoder.width, arrays.pixels.shape[-4]
    P = v.grid[0] * v.grid[1]
    T = P + (c.select == "default")
    layers = max(clip.hidden_index(v, f) for f in c.feature_layers)
    block = T * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 2 * T * T * v.width
    connector = P * (v.width * len(c.feature_layers) * D + D * D)
    return 2 * n * (P * 3 * v.patch_size**2 * v.width + layers * block + connector)


__all__ = [
    "SETUPS",
    "LlavaOnevision",
    "LlavaOnevisionConfig",
    "Plan",
    "Tiles",
    "assemble",
    "canvas_of",
    "check_processor",
    "default_buckets",
    "embed",
    "encode_images",
    "extend",
    "flops",
    "geometry_of",
    "image_flops",
    "plan",
    "prefill",
    "process",
    "resume",
    "specs",
]
