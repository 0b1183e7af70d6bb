"""A spatial Gaussian mixture rendered as an importance map on the token grid (VIF eq. 3-4)."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvqa.errors import JaxVQAError
from jaxvqa.transforms.normalise import TINY
from jaxvqa.typing import Array, Bool, Float, Int

_FAR = 1e18
"""Distance in spreads beyond which nothing is told apart: its square is finite in float32."""


def gaussian_mixture(
    centres: Float[Array | np.ndarray, "*B n 2"],
    spreads: Float[Array | np.ndarray, "*B n"],
    weights: Float[Array | np.ndarray, "*B n"],
    grid: tuple[int, int],
    *,
    map_norm: str = "sum",
    temperature: float | int = 1.0,
) -> Float[Array, "*B h w"]:
    """M = normalise(Σ_k π_k exp(−‖g − c_k‖² / (2 s_k²))) for the grid points g: float32 [.., h, w], sums to one.

    centres c: (x, y); the grid's first and last cells lie at 0 and 1. spreads s: > 0, in the same unit.
    weights π: >= 0 and summing to one. grid: (h, w).
    map_norm: "sum" divides by the sum; "softmax" is softmax(h / temperature) over the cells (VIF's release), nearly
    uniform because h lies in 0..1.

    Computed from logarithms, so that components far from every cell, or narrower than a cell, still give a
    distribution, and gradients do not vanish with them. VIF adds 1e-6 to the sum instead, which on its 24 × 24 grid is
    less than float32 resolves.
    """
    points = grid_points(jnp.array(grid), grid[0] * grid[1])
    maps = mixture_at(centres, spreads, weights, points, map_norm=map_norm, temperature=temperature)
    return maps.reshape(*maps.shape[:-1], *grid)


def grid_points(shape: Int[Array, "*B 2"], count: int) -> Float[Array, "*B P 2"]:
    """(x, y) of the first `count` cells of a grid of `shape` (rows, columns), row-major; its corners lie at 0 and 1."""
    rows, columns = shape[..., :1], shape[..., 1:]
    row, column = jnp.divmod(jnp.arange(count), columns)
    return jnp.stack([column / jnp.maximum(columns - 1, 1), row / jnp.maximum(rows - 1, 1)], axis=-1)


def mixture_at(
    centres: Float[Array | np.ndarray, "*B n 2"],
    spreads: Float[Array | np.ndarray, "*B n"],
    weights: Float[Array | np.ndarray, "*B n"],
    points: Float[Array, "*#B P 2"],
    there: Bool[Array, "*#B P"] | None = None,
    *,
    map_norm: str = "sum",
    temperature: float | int = 1.0,
) -> Float[Array, "*B P"]:
    """`gaussian_mixture` at any points (x, y), over those that are `there` (None: all): float32, sums to one."""
    if map_norm not in ("sum", "softmax"):
        raise JaxVQAError(f"gaussian_mixture: map_norm={map_norm!r}; expected 'sum' or 'softmax'")
    centres, spreads, weights = (x.astype(jnp.float32) for x in (centres, spreads, weights))
    away = (points[..., None, :, :] - centres[..., :, None, :]) / jnp.maximum(spreads, TINY)[..., None, None]
    squared = jnp.square(jnp.clip(away, -_FAR, _FAR)).sum(-1)
    log_h = jax.nn.logsumexp(jnp.log(jnp.maximum(weights, TINY))[..., None] - squared / 2, axis=-2)
    logits = log_h if map_norm == "sum" else jnp.exp(log_h) / temperature
    return jax.nn.softmax(logits if there is None else jnp.where(there, logits, -jnp.inf), axis=-1)
