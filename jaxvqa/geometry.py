"""Where each image token looks: exact maps between token cells, encoder pixels and pixels of the original image.

The encoder sees one rectangle of the image's plane, the *view*: larger than the image when it is padded to a square,
a part of it when it is centre-cropped, the image itself when it is squashed. The token grid divides the view into
h × w equal cells, and everything else follows. Letters: W, H image width and height; E encoder side; h, w grid.
All arithmetic is float64 NumPy; points and boxes are (x, y) and half-open xyxy in pixels of the original image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxvqa.errors import JaxVQAError

Box = Sequence | np.ndarray  # x1, y1, x2, y2
SIDES = tuple(sorted(side for n in range(2, 14) for side in (2**n, 3 * 2 ** (n - 1))))
"""Sides to which maps of any shape are padded, so that few programs are compiled: 4, 6, 8, 12, 16, 24, 32, 48, ..."""


def missing(size: int) -> tuple[int, int]:
    """How much to pad (before, behind) so that an axis has one of `SIDES`."""
    return 0, next((side for side in SIDES if side >= size), size) - size


@dataclass(frozen=True)
class Geometry:
    """One encoded image.

    mode: "pad" (square with the mean colour, LLaVA-1.5), "crop" (shorter side to E, centre crop, HF CLIP), "squash",
        "tiles" (a canvas of squares, each encoded alone) or "native" (about the image's own size and shape).
    image_size: (W, H) of the original image.
    encoder_size: what the encoder reads: the side E of a square, or (width, height).
    grid: (h, w) image tokens.
    origin, extent: upper left corner and size of the view, in image pixels; it may overhang the image.
    """

    mode: Literal["pad", "crop", "squash", "tiles", "native"]
    image_size: tuple[int, int]
    encoder_size: int | tuple[int, int]
    grid: tuple[int, int]
    origin: tuple[float, float]
    extent: tuple[float, float]
    capacity: int | None = None
    """Cells, padding included, for which a model's programs are compiled whose grids vary; None: those of the grid."""

    def on_grid(self, cells: np.ndarray) -> np.ndarray:
        """What a program says of each cell, [.., h, w] or [.., 1, capacity], on the grid: [.., h, w]."""
        h, w = self.grid
        return np.asarray(cells).reshape(*cells.shape[:-2], -1)[..., : h * w].reshape(*cells.shape[:-2], h, w)

    def for_program(self, maps: np.ndarray) -> np.ndarray:
        """The inverse of `on_grid`, padded with zeros: maps [.., h, w] as a program takes them."""
        if self.capacity is None:
            return maps
        flat = maps.reshape(*maps.shape[:-2], 1, -1)
        return np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, self.capacity - flat.shape[-1])])

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Cell boundaries in image pixels, not clamped: x [w + 1], y [h + 1]."""
        h, w = self.grid
        # Multiplying first keeps boundaries that are whole pixels exact, e.g. 3 * 1024 / 24 - 128 == 0.
        x = self.origin[0] + np.arange(w + 1) * self.extent[0] / w
        y = self.origin[1] + np.arange(h + 1) * self.extent[1] / h
        return x, y

    def _clamped_edges(self) -> tuple[np.ndarray, np.ndarray]:
        x, y = self.edges()
        return np.clip(x, 0, self.image_size[0]), np.clip(y, 0, self.image_size[1])

    def cell_boxes(self) -> np.ndarray:
        """The part of the image behind each cell: float64 [h, w, 4]; empty (x1 = x2 or y1 = y2) for pure padding."""
        x, y = self._clamped_edges()
        y1, x1 = np.meshgrid(y[:-1], x[:-1], indexing="ij")
        y2, x2 = np.meshgrid(y[1:], x[1:], indexing="ij")
        return np.stack([x1, y1, x2, y2], axis=-1)

    def valid_ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Half-open ranges of rows and of columns that see any of the image."""
        x, y = self._clamped_edges()
        rows, columns = np.flatnonzero(np.diff(y) > 0), np.flatnonzero(np.diff(x) > 0)
        return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)

    def valid(self) -> np.ndarray:
        """bool [h, w]; False where a cell lies completely in padding."""
        x, y = self._clamped_edges()
        return (np.diff(y) > 0)[:, None] & (np.diff(x) > 0)[None, :]

    def cells_at(self, points: np.ndarray) -> np.ndarray:
        """(row, column) of the cell that sees each point [..., 2]: int [..., 2], (-1, -1) outside the view."""
        x_edges, y_edges = self.edges()
        x, y = np.moveaxis(np.asarray(points, np.float64), -1, 0)
        column = np.searchsorted(x_edges, x, side="right") - 1
        row = np.searchsorted(y_edges, y, side="right") - 1
        inside = (0 <= row) & (row < self.grid[0]) & (0 <= column) & (column < self.grid[1])
        return np.where(inside[..., None], np.stack([row, column], axis=-1), -1)

    def cells_of_box(self, box: Box) -> np.ndarray:
        """Share of each cell's visible area that `box` covers: float64 [h, w] in 0..1; 0 for padding."""
        x, y = self._clamped_edges()
        return np.outer(_coverage(y, box[1], box[3]), _coverage(x, box[0], box[2]))

    def to_encoder(self, points: np.ndarray) -> np.ndarray:
        """Image pixels [..., 2] to encoder pixels [..., 2] (0..E inside the view)."""
        return (np.asarray(points, np.float64) - self.origin) * np.asarray(self.encoder_size) / np.asarray(self.extent)

    def from_encoder(self, points: np.ndarray) -> np.ndarray:
        """Encoder pixels [..., 2] to image pixels [..., 2], not clamped."""
        return np.asarray(points, np.float64) * self.extent / np.asarray(self.encoder_size) + self.origin

    def to_image(
        self,
        heatmap: np.ndarray,
        size: tuple[int, int] | None = None,
        *,
        method: Literal["cell", "bilinear"] = "cell",
        fill: float | int | None = None,
    ) -> np.ndarray:
        """A heat map on the token grid [h, w], resampled to image coordinates: float32 [H', W'].

        size: (W', H') of the result, which covers the whole image (default: the image's own size).
        method: "cell" (each pixel has its cell's value) or "bilinear" (between cell centres; padding never bleeds in).
        fill: value of pixels that the encoder did not see (default: the smallest value of a valid cell).
        """
        heatmap = np.asarray(heatmap, np.float32)
        if heatmap.shape != self.grid:
            raise JaxVQAError(f"heat map of shape {heatmap.shape} on a token grid of {self.grid}")
        (W, H), (h, w) = self.image_size, self.grid
        width, height = size or self.image_size
        columns = ((np.arange(width) + 0.5) * W / width - self.origin[0]) * w / self.extent[0]
        rows = ((np.arange(height) + 0.5) * H / height - self.origin[1]) * h / self.extent[1]
        row_range, column_range = self.valid_ranges()
        sample = _nearest if method == "cell" else _linear
        out = sample(sample(heatmap, rows, row_range).T, columns, column_range).T
        unseen = ~(((0 <= rows) & (rows < h))[:, None] & ((0 <= columns) & (columns < w))[None, :])
        out[unseen] = heatmap[self.valid()].min() if fill is None else fill
        return out


def _coverage(edges: np.ndarray, start: float | int, stop: float | int) -> np.ndarray:
    """Share of each interval between `edges` that lies in start..stop; 0 for empty intervals."""
    length = np.diff(edges)
    overlap = np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0, None)
    return np.divide(overlap, length, out=np.zeros_like(length), where=length > 0)


def _nearest(values: np.ndarray, at: np.ndarray, valid: tuple[int, int]) -> np.ndarray:
    """Rows of `values` at fractional cell positions `at`."""
    return values[np.clip(np.floor(at).astype(int), valid[0], valid[1] - 1)]


def _linear(values: np.ndarray, at: np.ndarray, valid: tuple[int, int]) -> np.ndarray:
    """Rows of `values` interpolated between cell centres (k + 0.5), constant beyond the outermost valid ones."""
    at = np.clip(at - 0.5, valid[0], valid[1] - 1)
    low = np.minimum(np.floor(at).astype(int), valid[1] - 1)
    high = np.minimum(low + 1, valid[1] - 1)
    share = (at - low).astype(np.float32)[:, None]
    return values[low] * (1 - share) + values[high] * share


def area(box: Box) -> float:
    """Area of a box; 0 for an inverted one."""
    return float(max(0, box[2] - box[0]) * max(0, box[3] - box[1]))


def shared_area(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def covers(box: Box, target: Box) -> bool:
    """Whether a box holds at least half of the target's area."""
    return 2 * shared_area(box, target) >= area(target)


def for_pad(width: int, height: int, encoder_size: int, grid: tuple[int, int]) -> Geometry:
    """Padded to a square of side max(W, H), then resized (original LLaVA-1.5)."""
    side = max(width, height)
    left, top = pad_offset((width, height))
    return Geometry("pad", (width, height), encoder_size, grid, (-float(left), -float(top)), (float(side), float(side)))


def for_crop(width: int, height: int, encoder_size: int, grid: tuple[int, int]) -> Geometry:
    """Shorter side resized to E, centre E × E cut out (the HF CLIP processor)."""
    new_width, new_height = resized_size(width, height, encoder_size)
    left, top = (new_width - encoder_size) // 2, (new_height - encoder_size) // 2
    return Geometry(
        "crop",
        (width, height),
        encoder_size,
        grid,
        (left * width / new_width, top * height / new_height),
        (encoder_size * width / new_width, encoder_size * height / new_height),
    )


def for_squash(width: int, height: int, encoder_size: int | tuple[int, int], grid: tuple[int, int]) -> Geometry:
    """Resized to the encoder's size, aspect ratio not kept (InstructBLIP, BLIP-ITM)."""
    return Geometry("squash", (width, height), encoder_size, grid, (0.0, 0.0), (float(width), float(height)))


def resized_size(width: int, height: int, shortest: int) -> tuple[int, int]:
    """(W', H') after HF's resize of the shorter side to `shortest`; the longer one is truncated, not rounded."""
    longest = int(shortest * max(width, height) / min(width, height))
    return (shortest, longest) if width <= height else (longest, shortest)


def pad_offset(image_size: tuple[int, int]) -> tuple[int, int]:
    """Where the image lies on its padded square: (left, top)."""
    side = max(image_size)
    return (side - image_size[0]) // 2, (side - image_size[1]) // 2


def to_padded(boxes: Box, image_size: tuple[int, int]) -> np.ndarray:
    """Pixel boxes [..., 4] to LLaVA's boxes, normalised to 0..1 in the padded square, float64 [..., 4]."""
    return (np.asarray(boxes, np.float64) + np.tile(pad_offset(image_size), 2)) / max(image_size)


def from_padded(boxes: Box, image_size: tuple[int, int]) -> np.ndarray:
    """LLaVA's normalised boxes [..., 4] to pixel boxes, clamped to the image, float64 [..., 4]."""
    pixels = np.asarray(boxes, np.float64) * max(image_size) - np.tile(pad_offset(image_size), 2)
    return np.clip(pixels, 0, np.tile(image_size, 2))
