"""FOCUS's regions of interest: the highest cells of a relevance map, each grown into a box, then thinned out.

`propose` is one program for all maps of a grid, with one slot per anchor and a mask of the slots that are in use;
`jax.vmap` batches it. `to_pixels` and `merge` turn what is left into boxes on the image, on the host.

Letters: h × w the map's cells, n slots, in order of relevance, s sizes of a region. Boxes of cells are xyxy, half-open.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry
from jaxvqa.typing import Array, Bool, Float, Int


class Anchors(NamedTuple):
    cells: Int[Array, "n 2"]
    """(row, column)."""
    scores: Float[Array, "n"]
    """Value of the map there, float32, descending; 0 where not valid."""
    valid: Bool[Array, "n"]
    """The slots in use, not always the first ones."""


class Proposals(NamedTuple):
    cells: Int[Array, "n 4"]
    """Boxes in cells, xyxy, half-open, inside the grid; zeros where not valid."""
    anchors: Int[Array, "n 2"]
    """(row, column) of the cell that each grew from."""
    relevance: Float[Array, "n"]
    """Value of the map at the anchor, by which the slots are ordered."""
    valid: Bool[Array, "n"]
    """Regions that survive; the other slots are empty or were suppressed."""
    uniform: Bool[Array, ""]
    """The map was zero everywhere or not finite, and a uniform one took its place."""


@partial(jax.jit, static_argnames=("num_anchors", "smallest", "largest", "anchor_choice", "threshold_ref"))
def propose(
    heatmap: Float[Array | np.ndarray, "h w"],
    visible: Bool[Array | np.ndarray, "h w"] | None = None,
    border: Int[Array | np.ndarray, "2"] | None = None,
    *,
    num_anchors: int = 30,
    smallest: int = 3,
    largest: int = 5,
    distance: float | int | Array = 2,
    threshold: float | int | Array = 0.5,
    nms_iou: float | int | Array = 0.3,
    anchor_choice: str = "greedy",
    threshold_ref: str = "anchor",
) -> Proposals:
    """Regions of a relevance map that may hold the target, best first (FOCUS §3.3, Algorithm 1).

    heatmap: relevance, not negative.
    visible: cells outside it are treated like cells outside the map; None is all (the paper's reading of padding).
    border: rows and columns of the map, where what lies behind them is padding (not `visible`); None is all.
    num_anchors, smallest, largest, distance: the paper's k, s_min, s_max and s_dist, in cells. Sizes grow by one cell
        on each side, so a largest size of another parity than the smallest is not reached.
    threshold: a region grows while the mean of the grown region is at least `threshold` times the value at its anchor
        ("anchor") or the map's largest ("max"), or `threshold` itself ("absolute").
    nms_iou: a region whose intersection over union with a better one is larger than this is suppressed.
    anchor_choice: see `find_anchors`.
    """
    heatmap = jnp.asarray(heatmap, jnp.float32)
    seen = jnp.ones(heatmap.shape, bool) if visible is None else jnp.asarray(visible)
    heatmap = jnp.where(seen, heatmap, 0.0)
    uniform = ~jnp.isfinite(heatmap).all() | (heatmap == 0).all()
    heatmap = jnp.where(uniform, seen / heatmap.size, heatmap)
    anchors = find_anchors(heatmap, seen, count=num_anchors, distance=distance, choice=anchor_choice)
    references = {"anchor": anchors.scores, "max": heatmap.max(), "absolute": 1.0}
    if threshold_ref not in references:
        raise UserError(f"regions: threshold_ref={threshold_ref!r}; expected one of {', '.join(references)}")
    mean = threshold * references[threshold_ref]
    limit = jnp.array(heatmap.shape) if border is None else jnp.asarray(border)
    cells = grow(heatmap, seen, anchors.cells, mean, limit, smallest=smallest, largest=largest)
    valid = suppress(cells, anchors.valid, nms_iou)
    return Proposals(jnp.where(valid[:, None], cells, 0), anchors.cells, anchors.scores, valid, uniform)


def find_anchors(
    heatmap: Float[Array, "h w"],
    visible: Bool[Array, "h w"],
    *,
    count: int,
    distance: float | int | Array,
    choice: str = "greedy",
) -> Anchors:
    """The highest visible cells that are at least `distance` (Euclidean, in cells) apart, at most `count`.

    Equal values go in row-major order. "greedy" goes down the whole map until it has `count`; "topk_filter" takes the
    `count` highest cells and discards those too close to a better one, so that fewer may be left.
    """
    h, w = heatmap.shape
    row, column = jnp.divmod(jnp.arange(h * w), w)
    values, seen = heatmap.ravel(), visible.ravel()

    def near(a, b):
        """Whether two cells may not both be anchors."""
        return (a == b) | ((row[a] - row[b]) ** 2 + (column[a] - column[b]) ** 2 < distance**2)

    if choice == "greedy":

        def take(free, _):
            best = jnp.argmax(jnp.where(free, values, -jnp.inf))
            return free & ~near(best, jnp.arange(h * w)), (best, free[best])

        _, (cells, valid) = jax.lax.scan(take, seen, length=count)
    elif choice == "topk_filter":
        order = jnp.argsort(-jnp.where(seen, values, -jnp.inf))
        cells = jnp.pad(order, (0, max(0, count - h * w)))[:count]
        valid = seen[cells] & (jnp.arange(count) < h * w)
        valid = _keep_unless_better(valid, near(cells[:, None], cells))
    else:
        raise UserError(f"anchors: choice={choice!r}; expected greedy or topk_filter")
    return Anchors(jnp.stack([row[cells], column[cells]], -1), jnp.where(valid, values[cells], 0.0), valid)


def grow(
    heatmap: Float[Array, "h w"],
    visible: Bool[Array, "h w"],
    anchors: Int[Array, "n 2"],
    reference: float | Float[Array, ""] | Float[Array, "n"],
    border: Int[Array, "2"],
    *,
    smallest: int,
    largest: int,
) -> Int[Array, "n 4"]:
    """Square regions centred on the anchors and cut off at the border (rows, columns), as large as the map allows.

    From `smallest` cells they grow by one on each side, up to `largest`, while the mean over the visible cells of the
    grown region is at least `reference` (one for all, or one for each).
    """
    if not 1 <= smallest <= largest:
        raise UserError(f"regions: sizes {smallest} to {largest}; expected 1 <= smallest <= largest")
    sizes = jnp.arange(smallest, largest + 1, 2)
    start = anchors[:, None] - sizes[:, None] // 2
    start, stop = jnp.maximum(start, 0), jnp.minimum(start + sizes[:, None], border)
    rows, columns = (_bands(start[..., axis], stop[..., axis], heatmap.shape[axis]) for axis in (0, 1))
    # Divided by a power of two, which is exact, so that a sum of huge values cannot overflow.
    _, exponent = jnp.frexp(jnp.abs(heatmap).max())
    total, count = (
        jnp.einsum("nsr,rc,nsc->ns", rows, cells, columns, precision="highest")
        for cells in (jnp.ldexp(heatmap, -exponent), visible.astype(jnp.float32))
    )
    enough = total >= jnp.ldexp(jnp.asarray(reference, jnp.float32), -exponent)[..., None] * count
    last = jnp.cumprod(enough[:, 1:], axis=1).sum(1)
    x1y1, x2y2 = (jnp.take_along_axis(edge, last[:, None, None], 1)[:, 0, ::-1] for edge in (start, stop))
    return jnp.concatenate([x1y1, x2y2], axis=1)


def _bands(start: Int[Array, "n s"], stop: Int[Array, "n s"], length: int) -> Float[Array, "n s length"]:
    at = jnp.arange(length)
    return ((start[..., None] <= at) & (at < stop[..., None])).astype(jnp.float32)


def suppress(
    boxes: Int[Array | np.ndarray, "n 4"], valid: Bool[Array | np.ndarray, "n"], iou: float | int | Array
) -> Bool[Array, "n"]:
    """Greedy non-maximum suppression: which boxes stay; each suppresses the later ones that overlap it by more."""
    return _keep_unless_better(jnp.asarray(valid), intersection_over_union(boxes, boxes) > iou)


def intersection_over_union(a: Array | np.ndarray, b: Array | np.ndarray) -> Float[Array, "n m"]:
    """Of each box of `a` [n, 4] with each of `b` [m, 4], xyxy, half-open: float32; 0 where both are empty."""
    a, b = jnp.asarray(a)[:, None], jnp.asarray(b)
    sides = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
    shared = jnp.maximum(sides, 0).prod(-1)
    total = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return jnp.where(total > 0, shared / jnp.where(total > 0, total, 1), 0.0)


def _keep_unless_better(candidates: Bool[Array, "n"], conflict: Bool[Array, "n n"]) -> Bool[Array, "n"]:
    """Of candidates in order of rank, those that conflict with no better one that is kept."""

    def decide(i, kept):
        return kept.at[i].set(candidates[i] & ~(kept & conflict[i]).any())

    return jax.lax.fori_loop(0, len(candidates), decide, jnp.zeros_like(candidates))


class Regions(NamedTuple):
    """What `to_pixels` leaves, best first."""

    cells: np.ndarray
    """int [m, 4], xyxy on the map."""
    boxes: np.ndarray
    """float64 [m, 4], xyxy in pixels of the image, half-open."""
    relevance: np.ndarray
    """float32 [m]."""


def to_pixels(proposals: Proposals, geometry: Geometry) -> Regions:
    """The valid regions of one map as boxes on its image, clamped; those with less than a pixel of it are dropped.

    Raises UserError where a region does not lie on the grid of `geometry`.
    """
    keep = np.asarray(proposals.valid)
    cells = np.asarray(proposals.cells)[keep]
    (h, w), (W, H) = geometry.grid, geometry.image_size
    if (cells > [w, h, w, h]).any():
        raise UserError(f"regions up to cell {cells.max(0).tolist()[2:]} (x, y) on a {h}x{w} token grid")
    x, y = geometry.edges()
    boxes = np.stack([x[cells[:, 0]], y[cells[:, 1]], x[cells[:, 2]], y[cells[:, 3]]], axis=-1)
    boxes = np.clip(boxes, 0, [W, H, W, H])
    # A crop is cut at rounded pixels: there must be one left, too.
    size = np.minimum(boxes[:, 2:] - boxes[:, :2], np.rint(boxes[:, 2:]) - np.rint(boxes[:, :2]))
    seen = (size >= 1).all(1)
    return Regions(cells[seen], boxes[seen], np.asarray(proposals.relevance)[keep][seen])


def merge(boxes: np.ndarray, dilation: float | int = 0.0) -> np.ndarray:
    """Boxes [n, 4] with those that overlap replaced by their union, until none do: [m, 4].

    dilation: boxes also count as overlapping where they would if each were larger by so much on every side (ZoomEye:
    50 pixels). The result does not depend on the order but for its own: that of the first box in each.
    """
    merged: list[np.ndarray] = []
    for box in np.asarray(boxes, np.float64).reshape(-1, 4):
        at = len(merged)
        while touched := [i for i, other in enumerate(merged) if _overlap(box, other, 2 * dilation)]:
            at = min(at, *touched)
            box = union([box, *(merged[i] for i in touched)])
            merged = [other for i, other in enumerate(merged) if i not in touched]
        merged.insert(at, box)
    return np.array(merged).reshape(-1, 4)


def union(boxes: Sequence | np.ndarray) -> np.ndarray:
    """The smallest box that holds all boxes [n, 4]: float64 [4]."""
    boxes = np.asarray(boxes, np.float64)
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])


def _overlap(a: np.ndarray, b: np.ndarray, slack: float | int) -> bool:
    return bool((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + slack > 0).all())
