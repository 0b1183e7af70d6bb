"""Heat maps brought to a common range."""

import jax.numpy as jnp
import numpy as np

from jaxvqa.typing import Array, Float


def minmax(heatmap: Float[Array | np.ndarray, "*B h w"]) -> Float[Array, "*B h w"]:
    """Each map scaled to 0..1, float32 [.., h, w]; a constant map becomes zeros. Maps must be finite."""
    heatmap = heatmap.astype(jnp.float32)
    low, high = heatmap.min((-2, -1), keepdims=True), heatmap.max((-2, -1), keepdims=True)
    # Halves, because high - low of two finite numbers may overflow.
    span = high / 2 - low / 2
    return jnp.where(span > 0, (heatmap / 2 - low / 2) / jnp.where(span > 0, span, 1.0), 0.0)
