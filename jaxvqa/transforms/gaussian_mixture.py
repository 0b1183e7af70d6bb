"""A spatial Gaussian mixture rendered as an importance map on the token grid (VIF eq. 3-4)."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvqa.errors import JaxVQAError
from jaxvqa.transforms.normalise import TINY
from jaxvqa.typing import Array, Float

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
    if map_norm not in ("sum", "softmax"):
        raise JaxVQAError(f"gaussian_mixture: map_norm={map_norm!r}; expected 'sum' or 'softmax'")
    centres, spreads, weights = (x.astype(jnp.float32) for x in (centres, spreads, weights))
    y, x = (jnp.linspace(0, 1, size) for size in grid)
    spreads = jnp.maximum(spreads, TINY)[..., None]

    def away(points, axis):
        return jnp.clip((points - centres[..., axis, None]) / spreads, -_FAR, _FAR)

    squared = away(x, 0)[..., None, :] ** 2 + away(y, 1)[..., :, None] ** 2
    log_density = jnp.log(jnp.maximum(weights, TINY))[..., None, None] - squared / 2
    log_h = jax.nn.logsumexp(log_density, axis=-3)
    logits = log_h if map_norm == "sum" else jnp.exp(log_h) / temperature
    return jax.nn.softmax(logits, axis=(-2, -1))
