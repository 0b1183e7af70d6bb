"""Smoothing and shrinking of heat maps. Every result is a mean, and lies within the map's own range."""

import jax.numpy as jnp
import numpy as np

from jaxvqa.errors import JaxVQAError
from jaxvqa.transforms.resample import separable_mean
from jaxvqa.typing import Array, Float


def gaussian_blur(
    heatmap: Float[Array | np.ndarray, "*B h w"], sigma: float | int = 1.0, truncate: float | int = 4.0
) -> Float[Array, "*B h w"]:
    """Gaussian filter, reflected at the border with the edge repeated, so that the map keeps its sum: float32.

    sigma: in cells; 0 is the identity. truncate: the kernel ends after this many sigmas.
    The definition of `scipy.ndimage.gaussian_filter`, which FOCUS's filter is taken to be.
    """
    if sigma < 0:
        raise JaxVQAError(f"gaussian_blur: sigma={sigma}; expected 0 or more cells")
    heatmap = jnp.asarray(heatmap, jnp.float32)
    rows, columns = (blur_weights(size, sigma, truncate) for size in heatmap.shape[-2:])
    return separable_mean(heatmap, rows, columns, heatmap.min((-2, -1)), heatmap.max((-2, -1)))


def blur_weights(size: int, sigma: float | int, truncate: float | int = 4.0) -> Float[np.ndarray, "n n"]:
    """Weights of each cell (columns) in each blurred one (rows), along one axis."""
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * np.square(offsets / (sigma or 1.0)))
    reflected = np.pad(np.arange(size), radius, mode="symmetric")
    weights = np.zeros((size, size))
    for cell in range(size):
        np.add.at(weights[cell], reflected[cell : cell + 2 * radius + 1], kernel / kernel.sum())
    return weights.astype(np.float32)


def average_pool(heatmap: Float[Array | np.ndarray, "*B h w"], factor: int) -> Float[Array, "*B h2 w2"]:
    """The mean of each block of factor × factor cells, float32 [.., h // factor, w // factor].

    Rows and columns left over at the end are dropped (FOCUS); an axis shorter than `factor` becomes one cell.
    """
    if factor < 1:
        raise JaxVQAError(f"average_pool: factor={factor}; expected 1 or more cells")
    h, w = heatmap.shape[-2:]
    fh, fw = min(factor, h), min(factor, w)
    blocks = jnp.asarray(heatmap, jnp.float32)[..., : h // fh * fh, : w // fw * fw]
    blocks = blocks.reshape(*heatmap.shape[:-2], h // fh, fh, w // fw, fw)
    # Divided first, because a sum of finite numbers may overflow; clipped, so that equal cells stay as they are.
    mean = (blocks / (fh * fw)).sum((-3, -1))
    return jnp.clip(mean, blocks.min((-3, -1)), blocks.max((-3, -1)))


def pool_weights(size: int, factor: int) -> Float[np.ndarray, "m n"]:
    """Weights of each cell (columns) in each pooled one (rows) of `average_pool`, along one axis."""
    factor = min(factor, size)
    blocks = np.repeat(np.eye(size // factor, dtype=np.float32) / factor, factor, axis=1)
    return np.pad(blocks, ((0, 0), (0, size % factor)))
