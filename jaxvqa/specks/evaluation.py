"""How answers, boxes and heat maps about Specks are judged.

A heat map is [h, w] over the whole image, whose cells are equal; `size` is the image's (width, height), boxes are xyxy,
half-open, in its pixels.
"""

from collections.abc import Sequence
from math import nan, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from jaxvqa.geometry import area, shared_area
from jaxvqa.requests import Answer, Reply, Sample
from jaxvqa.specks.strata import Samples
from jaxvqa.typing import Bool, Float

Box = Sequence[float] | np.ndarray


def reading_samples(seed: int, count: int) -> list[Sample]:
    """Samples of the stratum "small" in a world of its own."""
    return list(Samples("small", seed, range(count)))


# ---- answers ---------------------------------------------------------------------------------------------------------


def right(answer: Answer | Reply, sample: Sample) -> bool:
    """Whether the text is the sample's answer, whatever its case, a full stop, and the order of two characters."""
    return _said(answer.text) == _said(str(sample.answer))


def _said(text: str) -> list[str]:
    return sorted(text.strip().rstrip(".").upper().split(" AND "))


class Difference(NamedTuple):
    """How much larger one share is than another, with the interval that holds the truth at the asked level."""

    value: float
    low: float
    high: float


def difference(
    first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray, level: float = 0.95
) -> Difference:
    """Accuracy of `first` minus that of `second`, two methods' hits and misses on the same questions.

    The interval is Wald's for matched pairs with half a question added to each of the four outcomes (Agresti and Min,
    "Simple improved confidence intervals for comparing matched proportions", Statistics in Medicine 24, 2005).
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    gained, lost, n = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    middle = (gained - lost) / (n + 2)
    spread = NormalDist().inv_cdf((1 + level) / 2) * sqrt((gained + lost + 1) / (n + 2) - middle**2) / sqrt(n + 2)
    return Difference((gained - lost) / n, max(-1.0, middle - spread), min(1.0, middle + spread))


def wilson(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share of which `hits` of `count` were seen."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle, spread = hits + z**2 / 2, z * sqrt(hits * (count - hits) / count + z**2 / 4)
    return (middle - spread) / (count + z**2), (middle + spread) / (count + z**2)


def gap_closed(method: float, random_crop: float, truth_crop: float) -> float:
    """Share of the gap from a random crop's accuracy to the ground-truth crop's that a method closes.

    Below 0 it is worse than a random crop, above 1 better than the truth. NaN where the truth does not beat the random
    crop: then there is no gap to close, and the figure must not be given.
    """
    gap = truth_crop - random_crop
    return (method - random_crop) / gap if gap > 0 else nan


# ---- boxes -----------------------------------------------------------------------------------------------------------


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where neither has an area."""
    shared = shared_area(a, b)
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def area_share(boxes: Sequence[Box] | np.ndarray, size: tuple[int, int]) -> float:
    """Share of the image that lies in any of the boxes."""
    return float(covered(boxes, size, (1, 1))[0, 0])


# ---- heat maps -------------------------------------------------------------------------------------------------------


def covered(
    boxes: Sequence[Box] | np.ndarray, size: tuple[int, int], grid: tuple[int, int]
) -> Float[np.ndarray, "h w"]:
    """Share of each cell that lies in any of the boxes, float64."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    xs, ys = np.unique(boxes[:, ::2]), np.unique(boxes[:, 1::2])
    # The boxes' edges cut the plane into rectangles that lie in a box or outside of it.
    across = (boxes[:, 0, None] <= xs[:-1]) & (xs[1:] <= boxes[:, 2, None])
    down = (boxes[:, 1, None] <= ys[:-1]) & (ys[1:] <= boxes[:, 3, None])
    inside = (down[:, :, None] & across[:, None, :]).any(axis=0)
    return _shares(ys, size[1], grid[0]).T @ inside @ _shares(xs, size[0], grid[1])


def _shares(cuts: np.ndarray, length: int, cells: int) -> Float[np.ndarray, "cuts cells"]:
    """Share of each cell of an axis that lies between one cut and the next."""
    edges = np.linspace(0, length, cells + 1)
    overlap = np.minimum(cuts[1:, None], edges[1:]) - np.maximum(cuts[:-1, None], edges[:-1])
    return np.clip(overlap, 0, None) * cells / length


def near(
    boxes: Sequence[Box] | np.ndarray, size: tuple[int, int], grid: tuple[int, int], margin: int = 1
) -> Bool[np.ndarray, "h w"]:
    """The cells that touch a box or lie within `margin` cells of one that does, diagonally too."""
    wide = np.pad(covered(boxes, size, grid) > 0, margin)
    windows = np.lib.stride_tricks.sliding_window_view(wide, (2 * margin + 1,) * 2)
    return np.asarray(windows.any(axis=(-2, -1)))


def peak_in(
    heatmap: Float[np.ndarray, "h w"], boxes: Sequence[Box] | np.ndarray, size: tuple[int, int], margin: int = 1
) -> bool:
    """Whether the largest value (the first of equals) is in a box or within `margin` cells of it."""
    return bool(near(boxes, size, _grid(heatmap), margin).flat[np.argmax(heatmap)])


def mass_in(
    heatmap: Float[np.ndarray, "h w"], boxes: Sequence[Box] | np.ndarray, size: tuple[int, int]
) -> tuple[float, float]:
    """(share of a non-negative map's sum that lies in the boxes, share of the area that does).

    Equal for a map that does not look; the mass is NaN for a map of zeros.
    """
    cells, total = covered(boxes, size, _grid(heatmap)), heatmap.sum(dtype=np.float64)
    return float((heatmap * cells).sum() / total) if total > 0 else nan, float(cells.mean())


class MapQuality(NamedTuple):
    """How well maps find targets; each figure is a mean over the samples."""

    peak: float
    """Share of the maps that peak in a target or next to it."""
    chance: float
    """Share of the cells where a peak would count: what a random peak reaches."""
    rival: float
    """Share of the maps that peak in a rival or next to it, and not at a target."""
    mass: float
    """Share of the map inside the target, where the map is not zero."""
    area: float
    """Share of the image that the target is: what an even map's mass is."""


def map_quality(
    heatmaps: Float[np.ndarray, "n h w"], samples: Sequence[Sample], size: tuple[int, int], margin: int = 1
) -> MapQuality:
    """Quality of one map per sample."""
    rows = []
    for heatmap, sample in zip(heatmaps, samples, strict=True):
        hit, other = (near(boxes, size, _grid(heatmap), margin) for boxes in (sample.boxes, sample.rivals))
        at = np.argmax(heatmap)
        rows.append((hit.flat[at], hit.mean(), other.flat[at] & ~hit.flat[at], *mass_in(heatmap, sample.boxes, size)))
    return MapQuality(*np.nanmean(np.array(rows, np.float64), axis=0).tolist())


def _grid(heatmap: np.ndarray) -> tuple[int, int]:
    return heatmap.shape[0], heatmap.shape[1]
