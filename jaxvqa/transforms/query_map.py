"""From a decoder that sees an image through a few queries to the image's cells (InstructBLIP)."""

import math

import jax.numpy as jnp
import numpy as np

from jaxvqa.errors import UserError
from jaxvqa.typing import Array, Float


def query_map(
    decoder_rows: Float[Array | np.ndarray, "*B Q"], cross: Float[Array | np.ndarray, "*B Q S"]
) -> Float[Array, "*B h w"]:
    """What a decoder row says of an image's Q queries, carried on to the cells that the queries look at (ViCrop).

    decoder_rows: of each query's token, the mean over the heads: attention, or attention times its gradient.
    cross: of the Q-Former's cross-attention, likewise; S = 1 + side·side keys, the class token first, which has no
        cell and is dropped.

    Returns float32 [.., side, side]. Raises UserError where the keys are no such square.
    """
    *batch, keys = cross.shape
    side = math.isqrt(keys - 1)
    if side * side != keys - 1:
        raise UserError(f"query_map: cross-attention to {keys} keys; expected a class token and a square of patches")
    rows, cells = decoder_rows.astype(jnp.float32), cross[..., 1:].astype(jnp.float32)
    flat = jnp.einsum("...Q,...QS->...S", rows, cells, precision="highest")
    return flat.reshape(*batch[:-1], side, side)
