"""ViCrop's window search: the crop, of several sizes, that stands out most from its surroundings in a heat map.

For each ratio r a window of base · r image pixels slides over the map, one cell at a time. Its peak is compared with
the mean of the positions next to it, per cell of the window; the ratio with the largest difference wins, and the crop
is the square of side base · r around that window's centre (mllms_know@a64c5d5, also HiPerson Eq. 6-10).

What depends on the image's size is small: window sizes in cells, and the crop for each window position. `plan` computes
these on the host in float64, with the roundings of the release, as arrays of one shape per grid. `find` is one program
for all image sizes, all ratios at once, exact in its boxes although it runs in float32; `jax.vmap` batches it.

Letters: C ratios, h × w the map's cells, x and y a window's left column and upper row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry, for_squash, missing
from jaxvqa.typing import Array, Bool, Float, Int

RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)

_NEIGHBOURS = {
    4: ((-1, 0), (1, 0), (0, -1), (0, 1)),
    8: tuple((dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy),
}


@register_dataclass
@dataclass(frozen=True)
class Windows:
    """The candidates for one image: arrays only, so that every image of a grid shares one program."""

    columns: Int[Array | np.ndarray, "C"]
    """Width of the window in cells, for each ratio."""
    rows: Int[Array | np.ndarray, "C"]
    """Height of the window in cells."""
    usable: Bool[Array | np.ndarray, "C"]
    """False for windows that cover the whole map."""
    x_range: Int[Array | np.ndarray, "2"]
    """Half-open range of the columns that see the image; windows stay inside."""
    y_range: Int[Array | np.ndarray, "2"]
    """The same for rows."""
    x_spans: Float[Array | np.ndarray, "C w 2"]
    """Crop (x1, x2) of the window whose left column is x."""
    y_spans: Float[Array | np.ndarray, "C h 2"]
    """Crop (y1, y2) of the window whose upper row is y."""
    whole: Bool[Array | np.ndarray, ""]
    """The answer is the whole image, whatever the map."""
    image: Float[Array | np.ndarray, "4"]
    """Box of the whole image."""


class Found(NamedTuple):
    box: Float[Array, "4"]
    """xyxy in pixels of the original image, half-open; whole numbers."""
    score: Float[Array, ""]
    """How far the window stands out, in units of the map; -inf for the whole image."""
    ratio: Int[Array, ""]
    """Which ratio won (index)."""
    window: Int[Array, "4"]
    """The window on the map, xyxy in cells, half-open."""


def plan(geometry: Geometry, base: float | int, ratios: Sequence[float | int] = RATIOS) -> Windows:
    """The windows of `base · ratio` image pixels over the cells of `geometry` (host, float64).

    Windows keep to the cells that see the image, and crops to the image. If the window of ratio 1 (or that of every
    ratio) covers all cells there is nothing to choose, and the answer is the whole image.
    """
    sides = float(base) * np.asarray(ratios, np.float64)
    if not len(sides) or not (sides > 0).all():
        raise UserError(f"window search: base={base}, ratios={tuple(ratios)}; expected positive numbers")
    (W, H), (h, w) = geometry.image_size, geometry.grid
    y_range, x_range = geometry.valid_ranges()
    columns, x_spans = _axis(sides, W, w, geometry.origin[0], geometry.extent[0], x_range)
    rows, y_spans = _axis(sides, H, h, geometry.origin[1], geometry.extent[1], y_range)
    full = (columns == x_range[1] - x_range[0]) & (rows == y_range[1] - y_range[0])
    return Windows(
        columns=columns,
        rows=rows,
        usable=~full,
        x_range=np.array(x_range, np.int32),
        y_range=np.array(y_range, np.int32),
        x_spans=x_spans,
        y_spans=y_spans,
        whole=np.array(full.all() or (full & (np.asarray(ratios) == 1)).any()),
        image=np.array([0, 0, W, H], np.float32),
    )


def _axis(sides: np.ndarray, size: int, cells: int, origin: float, extent: float, valid: tuple[int, int]):
    """Window lengths in cells, int32 [C], and crops (start, stop) per window position, float32 [C, cells, 2]."""
    cell = extent / cells
    # At least one cell: a cell of a huge image may be larger than the window.
    lengths = np.clip(np.floor(sides / cell), 1, valid[1] - valid[0])[:, None]
    centres = np.trunc(origin + (np.arange(cells) * cell + cell * lengths / 2))
    half = (sides // 2)[:, None]
    # First the lower clamp, then the upper: an image narrower than the crop ends with its whole axis.
    centres = np.minimum(np.maximum(centres, half), size - half)
    spans = np.stack([np.maximum(0, centres - half), np.minimum(size, centres + half)], axis=-1)
    return lengths[:, 0].astype(np.int32), spans.astype(np.float32)


@partial(jax.jit, static_argnames=("neighbours", "area_norm"))
def find(
    heatmap: Float[Array | np.ndarray, "h w"], windows: Windows, *, neighbours: int = 4, area_norm: bool = True
) -> Found:
    """The window of `plan` that stands out most; ties go to the smallest x, then y, then the first ratio.

    heatmap: finite, any sign; values of cells that do not see the image are ignored.
    neighbours: 4 along the axes, or 8; positions outside the map do not count.
    area_norm: divide by the window's cells, so that scales are comparable (HiPerson's Eq. 9 does not).
    """
    h, w = heatmap.shape
    row_valid, column_valid = _within(np.arange(h), windows.y_range), _within(np.arange(w), windows.x_range)
    valid = row_valid[:, None] & column_valid
    # The choice is the same for a·M + b. Without the offset a constant map gives exact ties; the power of two is exact
    # and keeps sums away from overflow.
    heatmap = heatmap.astype(jnp.float32)
    low = jnp.min(heatmap, initial=jnp.inf, where=valid)
    heatmap = jnp.where(valid, heatmap - low, 0.0)
    _, exponent = jnp.frexp(heatmap.max())
    heatmap = jnp.ldexp(heatmap, -exponent)

    # Window sums as products with bands of ones; differences of a summed-area table would lose half the digits.
    x_band, x_exists = _bands(windows.columns, windows.x_range, w)
    y_band, y_exists = _bands(windows.rows, windows.y_range, h)
    sums = jnp.einsum("Cxc,rc->Cxr", x_band, heatmap, precision="highest")
    sums = jnp.einsum("Cxr,Cyr->Cxy", sums, y_band, precision="highest")
    exists = x_exists[:, :, None] & y_exists[:, None, :]

    peaks = jnp.argmax(jnp.where(exists, sums, -jnp.inf).reshape(-1, w * h), axis=1)
    peak_x, peak_y = jnp.divmod(peaks, h)
    # A border of absent positions, so that a neighbour beyond the edge reads zero.
    sums = jnp.pad(jnp.where(exists, sums, 0.0), ((0, 0), (1, 1), (1, 1)))
    exists = jnp.pad(exists, ((0, 0), (1, 1), (1, 1)))
    ratio = jnp.arange(len(peaks))
    around = [(ratio, peak_x + 1 + dx, peak_y + 1 + dy) for dx, dy in _NEIGHBOURS[neighbours]]
    total = sum(sums[at] for at in around)
    count = sum(exists[at] for at in around)
    scores = sums[ratio, peak_x + 1, peak_y + 1] - total / jnp.maximum(count, 1)
    if area_norm:
        scores = scores / (windows.columns * windows.rows)
    scores = jnp.where(windows.usable, scores, -jnp.inf)

    best = jnp.argmax(scores)
    x, y = peak_x[best], peak_y[best]
    x1, x2 = jnp.asarray(windows.x_spans)[best, x]
    y1, y2 = jnp.asarray(windows.y_spans)[best, y]
    window = jnp.stack([x, y, x + jnp.asarray(windows.columns)[best], y + jnp.asarray(windows.rows)[best]])
    everywhere = jnp.stack([windows.x_range, windows.y_range], axis=1).ravel()
    return Found(
        box=jnp.where(windows.whole, windows.image, jnp.stack([x1, y1, x2, y2])),
        score=jnp.where(windows.whole, -jnp.inf, jnp.ldexp(scores[best], exponent)),
        ratio=jnp.where(windows.whole, 0, best),
        window=jnp.where(windows.whole, everywhere, window),
    )


def _within(index: np.ndarray, span: Array | np.ndarray) -> Array | np.ndarray:
    return (span[0] <= index) & (index < span[1])


def _bands(lengths: Array | np.ndarray, span: Array | np.ndarray, cells: int) -> tuple[Array, Array]:
    """Which cells each window position covers, float32 [C, positions, cells], and which positions exist."""
    position, stop = jnp.arange(cells), jnp.arange(cells) + lengths[:, None]
    band = (position[:, None] <= position) & (position < stop[:, :, None])
    return band.astype(jnp.float32), (span[0] <= position) & (stop <= span[1])


def search(
    heatmap: Float[Array | np.ndarray, "h w"],
    image_size: tuple[int, int],
    base: float | int,
    ratios: Sequence[float | int] = RATIOS,
    *,
    alignment: str = "corrected",
    geometry: Geometry | None = None,
    neighbours: int = 4,
    area_norm: bool = True,
) -> tuple[float, float, float, float]:
    """The crop that a heat map [h, w] on the token grid suggests: xyxy in pixels of the original image, half-open.

    image_size: (W, H) of the original image.
    base: side of the smallest crop in pixels of the original image (ViCrop: the encoder's side).
    alignment: "corrected" places the cells by `geometry`, which it needs, and never chooses padding; "official" lays
        the map over the whole image, wherever the encoder really looked, as the release does.

    The map is padded to one of few squares, for which programs are compiled.
    Raises UserError for a map that is not finite, an unknown alignment, or a geometry of another image or grid.
    """
    heatmap = np.asarray(heatmap, np.float32)
    if heatmap.ndim != 2 or not heatmap.size or not np.isfinite(heatmap).all():
        raise UserError(f"window search needs a finite heat map [h, w]; got shape {heatmap.shape}")
    if neighbours not in _NEIGHBOURS:
        raise UserError(f"window search: neighbours={neighbours}; expected 4 or 8")
    if alignment == "official":
        geometry = for_squash(*image_size, 1, heatmap.shape)
    elif alignment != "corrected":
        raise UserError(f"window search: alignment={alignment!r}; expected corrected or official")
    if geometry is None:
        raise UserError("window search: alignment='corrected' needs the geometry of the encoded image")
    if geometry.image_size != tuple(image_size) or geometry.grid != heatmap.shape:
        raise UserError(
            f"window search: the geometry is of a {geometry.image_size} image on a grid {geometry.grid}, "
            f"the map of a {tuple(image_size)} image on {heatmap.shape}"
        )
    side = sum(missing(max(heatmap.shape))) + max(heatmap.shape)
    rows, columns = ((0, side - size) for size in heatmap.shape)
    windows = plan(geometry, base, ratios)
    windows = replace(
        windows,
        x_spans=np.pad(windows.x_spans, ((0, 0), columns, (0, 0))),
        y_spans=np.pad(windows.y_spans, ((0, 0), rows, (0, 0))),
    )
    found = find(np.pad(heatmap, (rows, columns)), windows, neighbours=neighbours, area_norm=area_norm)
    return tuple(np.asarray(found.box).tolist())


class Tiles(NamedTuple):
    """A grid of tiles that covers an image; the last ones may overhang it."""

    rows: int
    columns: int
    size: tuple[int, int]
    """(width, height) of each tile in pixels."""


def high_res_split(image_size: tuple[int, int], longest: int = 1024) -> Tiles:
    """The tiles in which ViCrop's `_high` variants map a large image (W, H), row by row.

    The release fails on images narrower than high and at most `longest` high; here they have one column.
    """
    W, H = image_size
    rows = math.ceil(H / longest)
    columns = max(1, int(rows * W / H))
    return Tiles(rows, columns, (math.ceil(W / columns), math.ceil(H / rows)))
