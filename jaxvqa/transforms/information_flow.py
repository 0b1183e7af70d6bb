"""VIF's injection: importance maps mixed into the attention of text rows (eq. 6-7), as a tap and as written."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvqa.attention import CHUNK, NEVER
from jaxvqa.taps import Mix
from jaxvqa.typing import Array, Bool, Float, Int


def information_flow(
    maps: Float[Array | np.ndarray, "*B I P"],
    cells: Int[Array | np.ndarray, "*B I P"],
    keys: int,
    *,
    alpha: Float[Array, ""] | float | int = 0.5,
    rows: Bool[Array | np.ndarray, "*B T"] | None = None,
) -> Mix:
    """The edit that mixes one map per image into the attention of `rows`, each with weight α / (number of images).

    maps: over the P cells of each image, each summing to one. keys: length of the key axis.
    cells: position in the sequence of each cell (P positions from the image's first, but for images with tokens between
    the rows of cells); negative where a sequence has fewer images. Without any image nothing is mixed.
    rows: the text tokens; None is every row behind an image, which is right for a single image and in decoding.

    For a batch, or for one sample without the batch axis (a builder of `Generate.taps`): one value for all layers.
    """
    maps = maps.astype(jnp.float32)
    present = cells[..., 0] >= 0
    share = jnp.where(present, alpha / jnp.maximum(present.sum(-1, keepdims=True), 1), 0.0)

    # Sums over chunks of cells, which a mesh splits by batch: it would not know how to split a scatter.
    def chunks(x, fill):
        short = -x.shape[-1] % CHUNK
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)], constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, CHUNK), -2, 0)

    def laid_out(part):
        at, values = part
        return jnp.where(at[..., None] == jnp.arange(keys), values[..., None], 0.0).sum(-2)

    over_keys = jax.lax.map(laid_out, (chunks(cells, -1), chunks(maps, 0.0))).sum(0)
    # An absent image is visible to no row.
    last = jnp.where(present, cells.max(-1), NEVER).astype(jnp.int32)
    return Mix(share[None], over_keys[None], last, None if rows is None else jnp.asarray(rows))


def inject(
    attention: Float[Array | np.ndarray, "*B N T S"],
    maps: Float[Array | np.ndarray, "*B I S"],
    alpha: Float[Array | np.ndarray, "*B I"],
    rows: Bool[Array | np.ndarray, "*B T"],
    visible: Bool[Array | np.ndarray, "*B T S"],
) -> Float[Array, "*B N T S"]:
    """Attention probabilities after the injection, as the paper writes it; `information_flow` never builds them.

    (1 − Σα_i)·A + Σ α_i·M_i on the chosen rows, zero at invisible keys, each row scaled to sum one (eq. 6-7). Other
    rows, and rows of which nothing is left, keep A. maps: over all keys.
    """
    attention = attention.astype(jnp.float32)
    target = jnp.einsum("...I,...IS->...S", alpha, maps, precision="highest")[..., None, None, :]
    mixed = (1 - alpha.sum(-1))[..., None, None, None] * attention + target
    mixed = jnp.where(visible[..., None, :, :], mixed, 0.0)
    total = mixed.sum(-1, keepdims=True)
    chosen = rows[..., None, :, None] & (total > 0)
    return jnp.where(chosen, mixed / jnp.where(chosen, total, 1.0), attention)
