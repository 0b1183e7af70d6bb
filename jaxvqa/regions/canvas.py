"""One image of several regions, for models that look at one: the box around them all, or each pasted on a canvas."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, hypot, sqrt

import numpy as np
from PIL import Image, ImageDraw

from jaxvqa.errors import UserError
from jaxvqa.geometry import Box, pad_offset
from jaxvqa.images import CLIP_MEAN_COLOUR, crop, pad_to_square, pixel_box
from jaxvqa.regions.proposals import union

FAR = 1200  # FOCUS's t_obj_dist, in pixels of the image

PixelBox = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class View:
    """An image made of parts of another one."""

    image: Image.Image
    sources: np.ndarray
    """int [n, 4]: the parts, in pixels of the original image; best first."""
    places: np.ndarray
    """int [n, 4]: where each lies in `image`; a part covers those behind it in this order."""

    def to_original(self, points: np.ndarray) -> np.ndarray:
        """Pixels of `image` [.., 2] to pixels of the original image, float64 [.., 2]; NaN where no part lies."""
        points = np.asarray(points, np.float64)
        out = np.full(points.shape, np.nan)
        for source, place in reversed([*zip(self.sources, self.places, strict=True)]):
            inside = ((place[:2] <= points) & (points < place[2:])).all(-1, keepdims=True)
            scale = (source[2:] - source[:2]) / (place[2:] - place[:2])
            out = np.where(inside, source[:2] + (points - place[:2]) * scale, out)
        return out


def compose(
    image: Image.Image,
    boxes: Sequence | np.ndarray,
    *,
    far: float | int = FAR,
    side: int = 336,
    layout: str = "relative",
) -> View:
    """The view on which FOCUS answers: the crop around all boxes or, if two of them are far apart, a canvas of them.

    boxes: [n, 4] xyxy in pixels of `image`, best first. Without any the view is the whole image.
    far: largest distance of two centres, in pixels of `image`, at which one crop still holds the boxes.
    side, layout: see `paste`.

    Raises ImageError for a box that holds no pixel of the image.
    """
    rounded = [pixel_box(box, image.size) for box in boxes] or [(0, 0, *image.size)]
    if any(hypot(a[0] - b[0], a[1] - b[1]) > far for a, b in combinations(map(_centre, rounded), 2)):
        return paste(image, rounded, side=side, layout=layout)
    source = union(rounded).astype(int)
    part = image.crop(tuple(source.tolist()))
    return View(part, source[None], np.array([[0, 0, *part.size]]))


def paste(
    image: Image.Image,
    boxes: Sequence | np.ndarray,
    *,
    side: int = 336,
    layout: str = "relative",
) -> View:
    """Each box, resized to a square block, on a canvas of 2·side × 2·side in the mean colour.

    boxes: at least one, [n, 4] xyxy in pixels of `image`, best first: a better one covers a worse one.
    side: of the encoder's input.
    layout: two boxes always lie side by side, each as far above or below the middle as its centre lies above or below
        that of both, at the image's scale (ZoomEye). More lie in "columns" by the same rule, or, "relative", with
        their centres where they are in the box around all of them, moved inside the canvas.
    """
    if layout not in ("relative", "columns"):
        raise UserError(f"canvas: layout={layout!r}; expected relative or columns")
    if not len(boxes):
        raise UserError("canvas: no box to paste; expected at least one")
    sources = [pixel_box(box, image.size) for box in boxes]
    if len(sources) == 2:
        corners, block = _side_by_side(sources, side), side
    elif layout == "columns":
        corners, block = _columns(sources, 2 * side)
    else:
        corners, block = _relative(sources, side)
    canvas = Image.new("RGB", (2 * side, 2 * side), CLIP_MEAN_COLOUR)
    for source, corner in reversed([*zip(sources, corners, strict=True)]):
        canvas.paste(image.crop(source).resize((block, block), Image.Resampling.BICUBIC), corner)
    places = np.array([(x, y, x + block, y + block) for x, y in corners])
    return View(canvas, np.array(sources), places)


def close_up(image: Image.Image, box: Box, side: int, scale: float | int = 1) -> Image.Image:
    """The crop of a box enlarged to the encoder's side, cut from the padded square (ZoomEye; FOCUS's `min_crop`).

    box: xyxy in pixels of `image`. side: of the encoder's input, at least so much is shown; times `scale` (1.2 in
    models that tile their input). At the right and at the lower border of the square less is shown, as in the release.
    """
    square = pad_to_square(image)
    left, top = pad_offset(image.size)
    spans = []
    for start, stop, offset in ((box[0], box[2], left), (box[1], box[3], top)):
        size = int(max(ceil(stop - start), side) * scale)
        low = max(0, int(start + offset + (stop - start) / 2) - size // 2)
        spans.append((low, min(low + size, square.width)))
    (x1, x2), (y1, y2) = spans
    return crop(square, (x1, y1, x2, y2))


def highlight(image: Image.Image, boxes: Sequence | np.ndarray, colour: str = "red") -> Image.Image:
    """A copy of `image` with a rectangle around each box, as ZoomEye shows a model where its other view lies.

    boxes: [n, 4] xyxy in pixels of `image`. The line, 1/120 of the image's longer side wide, lies outside the box where
    the image leaves room for it.
    """
    out, width = image.convert("RGB"), max(1, max(image.size) // 120)
    draw = ImageDraw.Draw(out)
    for box in boxes:
        x1, y1, x2, y2 = pixel_box(box, image.size)
        x1, y1, x2, y2 = pixel_box((x1 - width, y1 - width, x2 + width, y2 + width), image.size)
        # Pillow's corners are inclusive, and its lines go inwards.
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colour, width=width)
    return out


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _side_by_side(boxes: list[PixelBox], side: int) -> list[tuple[int, int]]:
    """Corners of two blocks, by ZoomEye's integer arithmetic."""
    left, right = sorted((0, 1), key=lambda i: boxes[i][0])
    lower = (boxes[right][1] + boxes[right][3]) // 2 - (boxes[left][1] + boxes[left][3]) // 2
    offset = min(max(lower, -side), side) // 2
    corners = {left: (0, side // 2 - offset), right: (side, side // 2 + offset)}
    return [corners[0], corners[1]]


def _columns(boxes: list[PixelBox], canvas: int) -> tuple[list[tuple[int, int]], int]:
    """Corners and side of blocks from left to right, high or low by their centres about the middle of the extremes."""
    block = canvas // len(boxes)
    slack = (canvas - block) // 2
    centres = np.array([y1 + y2 for _, y1, _, y2 in boxes]) // 2
    lower = centres - (centres.min() + centres.max()) // 2
    order = np.argsort([box[0] for box in boxes], kind="stable")
    column = np.argsort(order)
    return [(int(c) * block, slack + int(d)) for c, d in zip(column, lower.clip(-slack, slack), strict=True)], block


def _relative(boxes: list[PixelBox], side: int) -> tuple[list[tuple[int, int]], int]:
    """Corners and side of blocks whose centres lie in the canvas as they do in the union of the boxes."""
    block = side // ceil(sqrt(len(boxes)))
    x1, y1, x2, y2 = union(boxes)
    where = (np.array([_centre(box) for box in boxes]) - (x1, y1)) / (x2 - x1, y2 - y1)
    corners = np.floor(where * 2 * side - block / 2).clip(0, 2 * side - block).astype(int)
    return [(x, y) for x, y in corners.tolist()], block
