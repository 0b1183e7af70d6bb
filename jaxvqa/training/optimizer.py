"""Muon for the matrices inside the blocks, Adam for everything else, and a schedule over used budget."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxvqa.typing import Array, Float

# Leaves that are matrices from some axes to others, all but the last three with a leading layer axis.
_MATRICES = {
    "q_proj": ((1,), (2, 3)),
    "k_proj": ((1,), (2, 3)),
    "v_proj": ((1,), (2, 3)),
    "o_proj": ((1, 2), (3,)),
    "gate_proj": ((1,), (2,)),
    "up_proj": ((1,), (2,)),
    "down_proj": ((1,), (2,)),
    "fc1": ((1,), (2,)),
    "fc2": ((1,), (2,)),
}


def optimizer(
    params: Any, stacks: tuple[str, ...] = ("vision", "decoder"), weight_decay: float = 0.01, clip: float = 1.0
) -> optax.GradientTransformation:
    """Muon for the matrices in the layer stacks of `stacks` (its updates have Adam's usual size), Adam elsewhere.

    Learning rate 1: the caller scales the updates (`scaled`), so that the schedule can follow any measure of progress.
    """

    def dimensions(path, leaf):
        names = [getattr(key, "name", "") for key in path]
        inside = "layers" in names and any(stack in names for stack in stacks)
        return MuonDimensionNumbers(*_MATRICES[names[-1]]) if inside and names[-1] in _MATRICES else None

    numbers = jax.tree_util.tree_map_with_path(dimensions, params)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        muon(
            1.0,
            weight_decay=weight_decay,
            adam_weight_decay=0.0,
            adam_b2=0.98,
            muon_weight_dimension_numbers=numbers,
            consistent_rms=0.2,
        ),
    )


def warmup_linear(progress: Float[Array, ""], peak: float, warmup: float, floor: float = 0.02) -> Float[Array, ""]:
    """Linear warm-up over the first `warmup` of the budget, then linear decay to `floor` of the peak."""
    rise = progress / warmup
    fall = 1 - (1 - floor) * (progress - warmup) / (1 - warmup)
    return peak * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)


def apply(params: Any, updates: Any, rate: Callable[[tuple[str, ...]], Array]) -> Any:
    """params + rate * update; `rate` is a function of the leaf's path, ("model", "vision", ...)."""

    def one(path, param, update):
        return param + rate(tuple(getattr(key, "name", str(key)) for key in path)) * update

    return jax.tree_util.tree_map_with_path(one, params, updates)
