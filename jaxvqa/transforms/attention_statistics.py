"""What attention to an image amounts to: how much, how evenly spread, and how much of it lies on the target."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr

from jaxvqa.geometry import Geometry
from jaxvqa.typing import Array, Float


def image_share(maps: Float[Array | np.ndarray, "*B h w"]) -> Float[Array, "*B"]:
    """Share of a row's attention that falls on image tokens, 0..1 (the ratio of VIF, section 2.1, Figures 1 and 2).

    maps: [.., h, w] attention probabilities of one row each, the part that lies on the image.
    """
    return jnp.asarray(maps, jnp.float32).sum((-2, -1))


def spatial_entropy(maps: Float[Array | np.ndarray, "*B h w"]) -> Float[Array, "*B"]:
    """How evenly attention is spread over the image: Shannon entropy of the map, scaled to sum one, over ln(h·w).

    1 is uniform, 0 a single cell; times ln(h·w) it is the entropy in nats of VIF, section 5.3.4 (the collapse that its
    Figures 2 and 3 show). maps: [.., h, w], >= 0; NaN for a map of zeros.
    """
    maps = jnp.asarray(maps, jnp.float32)
    total = maps.sum((-2, -1), keepdims=True)
    shares = jnp.where(total > 0, maps / jnp.where(total > 0, total, 1.0), jnp.nan)
    return entr(shares).sum((-2, -1)) / np.log(max(2, shares.shape[-2] * shares.shape[-1]))


def attention_ratio(
    maps: Float[Array | np.ndarray, "*B h w"],
    inside: Float[Array | np.ndarray, "h w"],
    anywhere: Float[Array | np.ndarray, "h w"],
) -> Float[Array, "*B"]:
    """Sum of a map inside the target over the mean of its sums inside all boxes of equal size (HiPerson B.2, Figure 9).

    1 is chance. maps: [.., h, w], >= 0; the paper's are relative attention. inside, anywhere: of `box_weights`.
    NaN where the boxes hold nothing: a map of zeros, or a target that the encoder did not see.
    """
    maps = jnp.asarray(maps, jnp.float32)
    maps = maps / jnp.maximum(maps.max((-2, -1), keepdims=True), jnp.finfo(jnp.float32).tiny)  # sums cannot overflow
    held, mean = ((maps * weights).sum((-2, -1)) for weights in (inside, anywhere))
    return jnp.where(mean > 0, held / jnp.where(mean > 0, mean, 1.0), jnp.nan)


def box_weights(
    boxes: Sequence[Sequence[float]], geometry: Geometry
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """What a sum over a map inside `boxes` weighs each cell with, and the mean weights over all boxes of equal size.

    boxes: xyxy in pixels of the image; of several, the sums are added. Each is cut to the part of the image that the
    encoder sees, and those of equal size (the target among them, HiPerson B.2 excludes none) lie at every whole-pixel
    step inside that part. A weight is the share of the cell's area that lies in the box.

    Returns two float32 [h, w]; equal sums, so a uniform map has ratio 1. Zeros where no box is seen.
    """
    weights = np.zeros((2, *geometry.grid))
    (x, y), (W, H) = geometry.edges(), geometry.image_size
    for x1, y1, x2, y2 in boxes:
        columns, rows = _axis_weights(x, W, x1, x2), _axis_weights(y, H, y1, y2)
        weights += [np.outer(rows[0], columns[0]), np.outer(rows[1], columns[1])]
    return weights[0].astype(np.float32), weights[1].astype(np.float32)


def _axis_weights(
    edges: np.ndarray, limit: int, start: float | int, stop: float | int
) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis, the share of each cell in start..stop, and its mean over all places of an interval so long."""
    low, high = max(edges[0], 0.0), min(edges[-1], float(limit))
    start, size = max(start, low), min(stop, high) - max(start, low)
    if size <= 0:
        return np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)

    def shares(starts):
        return np.diff(np.clip(edges - starts[:, None], 0, size).mean(0)) / (edges[1] - edges[0])

    return shares(np.array([start])), shares(low + np.arange(max(1, int(high - low - size) + 1)))
