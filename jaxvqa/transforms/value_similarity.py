"""Where an image's cached values are like those of the words that name a target (FOCUS, section 3.2, Figure 7)."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxvqa.typing import Array, Bool, Float, Int


def value_similarity(
    values: Float[Array | np.ndarray, "C S K H"],
    targets: Int[Array | np.ndarray, "T"],
    valid: Bool[Array | np.ndarray, "S"],
    norm: Literal["row", "column"] = "row",
) -> Float[Array, "T S"]:
    """Similarity of each target token's values to every token's, summed over heads and layers (FOCUS Eq. 1 and 2).

    values: of the C chosen layers, before any rotary embedding; they need not be finite where not `valid`.
    targets: positions of the tokens that name the target.
    valid: which of the S tokens there are; the others are padding, and get 0.
    norm: what (similarity + identity) / 2 is divided by: "row", the sum of the target token's row (the pseudocode's
        comment), or "column", of every token's own (what the pseudocode computes as written).

    Returns float32 [T, S]. Negative similarities are kept.
    """

    def add(total, values):
        """One layer after the other: float32 copies of all of them at once would take more than the cache itself."""
        values = jnp.where(valid[:, None, None], values.astype(jnp.float32), 0.0)
        length = jnp.linalg.norm(values, axis=-1, keepdims=True)
        unit = values / jnp.where(length > 0, length, 1.0)
        with jax.default_matmul_precision("highest"):
            alike = jnp.einsum("TKH,SKH->TS", unit[targets], unit)
            # A row's sum over all tokens, without the S x S matrix.
            sums = jnp.einsum("SKH,KH->S", unit, unit.sum(axis=0)) + 1
        divisor = sums[targets, None] if norm == "row" else sums
        return total + (alike + jax.nn.one_hot(targets, len(values))) / divisor, None

    targets = jnp.asarray(targets)
    total, _ = jax.lax.scan(add, jnp.zeros((len(targets), values.shape[1])), jnp.asarray(values))
    return jnp.where(valid, total, 0.0)


def relevance(
    maps: Float[Array | np.ndarray, "T h w"],
    wanted: Bool[Array | np.ndarray, "T"] | None = None,
    clip_negative: bool = True,
) -> Float[Array, "h w"]:
    """The maps of a target's tokens as one: their product, cell by cell (FOCUS Eq. 3, Figure 7).

    Each is divided by its sum first, which turns over the signs of one whose sum is negative; the size of a divisor
    does not matter.
    wanted: which of the maps count (default: all).
    clip_negative: whether negative values of a map so divided are 0; otherwise cells may be negative.

    Returns float32 [h, w], whose absolute values sum to 1. From the first token on that would leave no cell, tokens are
    left out; where that is the first, the map is even.
    """
    wanted = jnp.ones(len(maps), bool) if wanted is None else wanted

    def multiply(state, item):
        product, going = state
        heat, counts = item
        heat = heat.astype(jnp.float32) * jnp.where(heat.sum() < 0, -1.0, 1.0)
        new = product * (jnp.maximum(heat, 0.0) if clip_negative else heat)
        top = jnp.abs(new).max()
        going &= (top > 0) | ~counts
        return (jnp.where(counts & going, new / jnp.where(top > 0, top, 1.0), product), going), None

    state = jnp.ones(maps.shape[1:]), jnp.array(True)
    (product, _), _ = jax.lax.scan(multiply, state, (jnp.asarray(maps), wanted))
    return product / jnp.abs(product).sum()
