"""Heat maps brought to a common range."""

import jax.numpy as jnp
import numpy as np

from jaxvqa.typing import Array, Float

TINY = jnp.finfo(jnp.float32).tiny
"""The smallest number that is told from zero on every device."""


def minmax(heatmap: Float[Array | np.ndarray, "*B h w"]) -> Float[Array, "*B h w"]:
    """Each map scaled to 0..1, float32 [.., h, w]; a constant map becomes zeros. Maps must be finite."""
    heatmap = heatmap.astype(jnp.float32)
    low, high = heatmap.min((-2, -1), keepdims=True), heatmap.max((-2, -1), keepdims=True)
    # Halves, because high - low of two finite numbers may overflow.
    span = high / 2 - low / 2
    return jnp.where(span >= TINY, ratio(heatmap / 2 - low / 2, jnp.maximum(span, TINY)), 0.0)


def distribution(heatmap: Float[Array | np.ndarray, "*B h w"]) -> Float[Array, "*B h w"]:
    """Each map as probabilities, float32 [.., h, w]: negative values are zero, the sum is one.

    Uniform where nothing is positive. Maps must be finite.
    """
    heatmap = jnp.maximum(heatmap.astype(jnp.float32), 0.0)
    top = heatmap.max((-2, -1), keepdims=True)
    # Scaled first, because a sum of finite numbers may overflow.
    scaled = jnp.where(top >= TINY, ratio(heatmap, jnp.maximum(top, TINY)), 1.0)
    return scaled / scaled.sum((-2, -1), keepdims=True)


def ratio(
    part: Float[Array | np.ndarray, "*#A"], whole: Float[Array | np.ndarray, "*#A"]
) -> Float[Array | np.ndarray, "*#A"]:
    """part / whole for any |part| <= whole in the range of normal float32 numbers.

    XLA may multiply by the reciprocal, which is zero for a `whole` above 8.5e37: a power of two is taken out before.
    """
    _, exponent = jnp.frexp(whole)
    return jnp.ldexp(part, -exponent) / jnp.ldexp(whole, -exponent)
