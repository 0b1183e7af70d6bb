"""Where a question makes the model look more than a neutral one does."""

import jax.numpy as jnp
import numpy as np

from jaxvqa.typing import Array, Float


def relative_attention(
    question_map: Float[Array | np.ndarray, "*B h w"],
    reference_map: Float[Array | np.ndarray, "*B h w"],
    eps: float | int = 0.0,
) -> Float[Array, "*B h w"]:
    """Attention to the image under the question, over that under a reference question, cell by cell.

    question_map, reference_map: [.., h, w] attention probabilities of one row, heads averaged (>= 0).
    eps: added to the denominator: 0 in ViCrop, 1e-8 in HiPerson (Eq. 2).

    Returns float32 [.., h, w], finite for every finite input: zero where the denominator is zero (or below the
    smallest normal number: an attention that has underflowed says nothing), at most the largest float32.
    """
    question, reference = question_map.astype(jnp.float32), reference_map.astype(jnp.float32) + eps
    limits = jnp.finfo(jnp.float32)
    known = reference >= limits.tiny
    return jnp.where(known, jnp.minimum(question / jnp.where(known, reference, 1.0), limits.max), 0.0)
