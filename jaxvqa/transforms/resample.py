"""Heat maps from the token grid of one preprocessing to that of another.

Two encoders cut the same image into different cells (LLaVA pads it to a square, BLIP squashes it). A cell of the new
grid takes the mean of the old map over its area. Areas are products of lengths, so the means are taken along one axis
after the other. `overlap` computes their weights on the host, as arrays of one shape per pair of grids; `resample` is
then one program for all image sizes, and `jax.vmap` batches it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from jaxvqa.errors import JaxVQAError
from jaxvqa.geometry import Geometry, missing
from jaxvqa.typing import Array, Bool, Float


@register_dataclass
@dataclass(frozen=True)
class Overlap:
    """How two grids lie on one image. Rows of the weights sum to one, or to zero where there is no old cell."""

    rows: Float[Array | np.ndarray, "h2 h"]
    """Share of each old row (h) in each new one (h2)."""
    columns: Float[Array | np.ndarray, "w2 w"]
    """Share of each old column in each new one."""
    seen: Bool[Array | np.ndarray, "h w"]
    """Old cells that see any of the image."""


def overlap(source: Geometry, target: Geometry) -> Overlap:
    """The weights that bring a map on the grid of `source` to that of `target`, for one image (host, float64).

    Only the image counts: padding that a cell sees has no part in a mean. `for_squash(W, H, side, grid)` as the target
    is a grid over the whole image. Raises JaxVQAError for geometries of images of different sizes.
    """
    if source.image_size != target.image_size:
        raise JaxVQAError(
            f"cannot resample the map of a {source.image_size} image to a grid on a {target.image_size} image; "
            f"expected two geometries of one image"
        )
    columns, rows = map(_shares, source.edges(), target.edges(), source.image_size)
    return Overlap(rows, columns, source.valid())


def _shares(source: np.ndarray, target: np.ndarray, limit: int) -> Float[np.ndarray, "m n"]:
    """Share of each interval between the edges `source` in each one of `target`, within 0..limit."""
    target = np.clip(target, 0, limit)[:, None]
    lengths = np.minimum(source[1:], target[1:]) - np.maximum(source[:-1], target[:-1])
    lengths = np.maximum(lengths, 0)
    total = lengths.sum(1, keepdims=True)
    return np.divide(lengths, total, out=np.zeros_like(lengths), where=total > 0).astype(np.float32)


def resample(heatmap: Float[Array | np.ndarray, "*B h w"], onto: Overlap) -> Float[Array, "*B h2 w2"]:
    """Area-weighted means of the map over the cells of another grid, float32 (HiPerson, before Eq. 5).

    heatmap: finite; values of cells that see only padding are ignored. New cells of which the map covers nothing get
    the smallest value of a cell that sees the image.
    """
    heatmap = jnp.asarray(heatmap, jnp.float32)
    low = jnp.where(onto.seen, heatmap, jnp.inf).min((-2, -1))
    high = jnp.where(onto.seen, heatmap, -jnp.inf).max((-2, -1))
    means = separable_mean(heatmap, onto.rows, onto.columns, low, high)
    covered = (onto.rows.sum(-1) > 0)[:, None] & (onto.columns.sum(-1) > 0)
    return jnp.where(covered, means, low[..., None, None])


def lay(heatmap: Float[Array | np.ndarray, "h w"], onto: Overlap) -> Float[np.ndarray, "h2 w2"]:
    """`resample` of one map, called from the host: padded to one of few shapes, for which it is compiled."""
    (h2, h), (w2, w) = onto.rows.shape, onto.columns.shape
    padded = Overlap(
        np.pad(onto.rows, (missing(h2), missing(h))),
        np.pad(onto.columns, (missing(w2), missing(w))),
        np.pad(onto.seen, (missing(h), missing(w))),
    )
    return np.asarray(_resample(np.pad(heatmap, (missing(h), missing(w))), padded))[:h2, :w2]


def separable_mean(
    heatmap: Float[Array, "*B h w"],
    rows: Float[Array | np.ndarray, "h2 h"],
    columns: Float[Array | np.ndarray, "w2 w"],
    low: Float[Array, "*B"],
    high: Float[Array, "*B"],
) -> Float[Array, "*B h2 w2"]:
    """Weighted means along both axes; low, high: the range of the map.

    A mean lies in that range. Clipping to it undoes rounding: a constant map stays exactly constant, and a map of the
    largest numbers finite.
    """
    low, high = low[..., None, None], high[..., None, None]
    means = jnp.clip(jnp.einsum("yr,...rc->...yc", rows, heatmap, precision="highest"), low, high)
    return jnp.clip(jnp.einsum("xc,...yc->...yx", columns, means, precision="highest"), low, high)


_resample = jax.jit(resample)
