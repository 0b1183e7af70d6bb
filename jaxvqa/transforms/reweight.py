"""Attention to chosen image tokens multiplied by a factor (CoF): the bias that does it."""

import jax.numpy as jnp
import numpy as np

from jaxvqa.typing import Array, Float

HIDDEN = -1e5
"""Bias of a key whose weight is 0: below all scores, but far above that of a masked key (`attention.MASKED`)."""


def log_reweight(
    mask: Float[Array | np.ndarray, "*#B h w"],
    strength: float | int | Float[Array | np.ndarray, ""] | Float[Array | np.ndarray, "*#B #h #w"],
) -> Float[Array, "*B h w"]:
    """The key bias log(λ)·M, which multiplies the weight of image tokens by λ^M (CoF, Eq. 3).

    Added to attention logits before the softmax, it turns a row's probabilities p into λ^M·p / Σ λ^M·p. Tokens with
    M = 0, and all keys outside the image, keep their weight and lose share to the others where λ > 1.

    mask: M, [.., h, w] in 0..1; CoF's is 0 or 1.
    strength: λ >= 0, finite: a number, or an array that broadcasts against the mask, such as [L, N, 1, 1] for a λ per
        layer and head. 1 is the identity, bit for bit; 0 (anything below the smallest normal number) hides the tokens
        with M > 0.

    Returns float32 [.., h, w], finite.
    """
    mask, strength = jnp.asarray(mask, jnp.float32), jnp.asarray(strength, jnp.float32)
    some = strength >= jnp.finfo(jnp.float32).tiny
    return jnp.where(some, jnp.log(jnp.where(some, strength, 1.0)) * mask, jnp.where(mask > 0, HIDDEN, 0.0))
