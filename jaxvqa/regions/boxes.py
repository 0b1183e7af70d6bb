"""CoF's boxes: what a grounding reply says, as boxes, and as the image tokens that they select.

Boxes are xyxy, as fractions of what the encoder sees: for LLaVA-1.5 the padded square, in which it was trained to
answer. Other families say pixels or thousandths, which `parse` divides. `to_pixels` and `from_pixels` go through the
geometry of the encoded image. A few boxes: NumPy, float64.
"""

import json
import re
from typing import Literal, NamedTuple

import numpy as np

from jaxvqa.errors import UserError
from jaxvqa.geometry import Box, Geometry

PRESETS = {
    "default": {
        "parse": "tolerant", "multi_box": "union", "square": True, "clamp": "shift", "raster": "code", "fallback": "all"
    },
    "strict": {
        "parse": "strict", "multi_box": "first", "square": True, "clamp": "code", "raster": "code", "fallback": "all"
    },
}  # fmt: skip
"""The paper with the tolerant reading of replies, and the released code (CoF@7c07e4c) with its slips."""

# The release's expression: decimal points with digits on both sides, exactly comma and space between.
_STRICT = re.compile(r"\[(-?\d+\.\d+), (-?\d+\.\d+), (-?\d+\.\d+), (-?\d+\.\d+)\]", re.ASCII)
# A box is a list or an object without another in it, however deep it lies, and even if what is around it is cut off.
_INNERMOST = re.compile(r"\[[^][{}]*\]|\{[^][{}]*\}")
_CORNERS = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("left", "top", "right", "bottom"))


class Grounding(NamedTuple):
    """What a grounding reply says."""

    boxes: np.ndarray
    """float64 [n, 4], fractions of the view, finite."""
    status: Literal["ok", "no_box", "degenerate"]
    """"degenerate": boxes, but none with x1 < x2 and y1 < y2."""


def parse(reply: str, extent: float | tuple[float, float], how: str = "tolerant") -> Grounding:
    """The boxes in a reply to the grounding prompt.

    extent: width and height of the view in the units of a box with a number above 1.5: pixels, or 1000 for thousandths;
        one number stands for both.
    how: "strict" is the released expression; the first match is the only box, and stays as it is. "tolerant" reads
        JSON wherever it stands in the reply: every list of four numbers, and every object that names its corners, with
        corners sorted and clipped to 0..1.
    """
    if how == "strict":
        found = [list(map(float, match.groups())) for match in _STRICT.finditer(reply)][:1]
    elif how == "tolerant":
        found = _json_boxes(reply)
    else:
        raise UserError(f"grounding: parse={how!r}; expected tolerant or strict")
    boxes = np.array([box for box in found if np.isfinite(box).all()], np.float64).reshape(-1, 4)
    if how == "tolerant":
        unit = np.tile(np.broadcast_to(extent, 2), 2)
        boxes = np.where((boxes > 1.5).any(1, keepdims=True), boxes / unit, boxes).clip(0, 1)
        boxes = np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    if not len(boxes):
        return Grounding(boxes, "no_box")
    return Grounding(boxes, "ok" if (boxes[:, :2] < boxes[:, 2:]).all(1).any() else "degenerate")


def _json_boxes(text: str) -> list[list[float]]:
    """All boxes in the JSON of a text, in its order; what is not JSON is skipped."""
    boxes = []
    for innermost in _INNERMOST.findall(text):
        try:
            value = json.loads(innermost, parse_int=float)
        except ValueError:
            continue
        if isinstance(value, dict):
            value = {key.lower().replace("_", ""): number for key, number in value.items()}
            value = next(([value[name] for name in names] for names in _CORNERS if value.keys() >= set(names)), [])
        if len(value) == 4 and all(isinstance(number, float) for number in value):
            boxes.append(value)
    return boxes


def expand(boxes: Box, alpha: float | int = 1.0, *, square: bool = True, clamp: str = "shift") -> np.ndarray:
    """Boxes [.., 4] enlarged about their centre by the paper's α, inside 0..1: float64 [.., 4].

    square: both sides become the longer one (in the release, and not in the paper).
    clamp: "shift" moves a box that overhangs the border inside, then cuts it (paper). "code" is the release: a side
        less than a whole width away from the centre of the box ends at the border.
    """
    boxes = np.asarray(boxes, np.float64)
    # A strict reading lets any number through; what overflows fails the tests below, as it would in the release.
    with np.errstate(over="ignore", invalid="ignore"):
        centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * alpha
        if square:
            size = np.broadcast_to(size.max(-1, keepdims=True), size.shape)
        low, high = centre - size / 2, centre + size / 2
        if clamp == "code":
            low, high = np.where(centre - size > 0, low, 0), np.where(centre + size < 1, high, 1)
        elif clamp == "shift":
            move = np.maximum(-low, 0)
            low, high = low + move, high + move
            move = np.maximum(high - 1, 0)
            low, high = (low - move).clip(0, 1), (high - move).clip(0, 1)
        else:
            raise UserError(f"box expansion: clamp={clamp!r}; expected shift or code")
    return np.concatenate([low, high], axis=-1)


def rasterise(boxes: Box, grid: tuple[int, int], raster: str = "code") -> np.ndarray:
    """The cells [h, w] that boxes [n, 4] select together, bool.

    raster: "code" takes the cells from int(x1·(w-1)) to int(x2·(w-1)), both included, as the release does; "cover"
        every cell that a box touches, and the one that holds it where it has no area.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 2, 2)
    rows, columns = (_span(boxes[:, :, axis], grid[1 - axis], raster) for axis in (1, 0))
    return np.any(rows[:, :, None] & columns[:, None, :], axis=0)


def _span(ends: np.ndarray, length: int, raster: str) -> np.ndarray:
    """bool [n, length]: the cells of one axis between each pair of ends [n, 2]."""
    # Compared as floats: an integer could not hold what a strict reply may say.
    if raster == "code":
        first, last = np.trunc(ends * (length - 1)).T
    elif raster == "cover":
        low, high = (ends * length).T
        first = np.floor(low) - (low == length)  # a box without area on the very border
        last = np.where(high >= low, np.maximum(np.ceil(high) - 1, first), -1)
    else:
        raise UserError(f"box raster: raster={raster!r}; expected code or cover")
    at = np.arange(length)
    return (first[:, None] <= at) & (at <= last[:, None])


def select(
    boxes: Box,
    grid: tuple[int, int],
    alpha: float | int = 1.0,
    *,
    square: bool = True,
    clamp: str = "shift",
    raster: str = "code",
    multi_box: str = "union",
    fallback: str = "all",
) -> np.ndarray:
    """CoF's mask M: the image tokens [h, w] that grounded boxes [n, 4] select, bool.

    multi_box: all boxes, or only the first. fallback: the tokens selected where there is no box; "all" is the paper's
    reweighting without grounding, and changes the answer too. See `expand` and `rasterise` for the others.
    """
    if multi_box not in ("union", "first") or fallback not in ("all", "none"):
        raise UserError(f"mask: multi_box={multi_box!r}, fallback={fallback!r}; expected union or first, all or none")
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if not len(boxes):
        return np.full(grid, fallback == "all")
    chosen = boxes if multi_box == "union" else boxes[:1]
    return rasterise(expand(chosen, alpha, square=square, clamp=clamp), grid, raster)


def to_pixels(boxes: Box, geometry: Geometry) -> np.ndarray:
    """Fractions of the view [.., 4] to boxes in pixels of the image, clamped to it: float64 [.., 4]."""
    pixels = np.asarray(boxes, np.float64) * np.tile(geometry.extent, 2) + np.tile(geometry.origin, 2)
    return np.clip(pixels, 0, np.tile(geometry.image_size, 2))


def from_pixels(boxes: Box, geometry: Geometry) -> np.ndarray:
    """Boxes in pixels of the image [.., 4] to fractions of the view: float64 [.., 4], beyond 0..1 where it is cut."""
    return (np.asarray(boxes, np.float64) - np.tile(geometry.origin, 2)) / np.tile(geometry.extent, 2)
