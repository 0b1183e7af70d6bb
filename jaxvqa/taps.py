"""What a caller may edit in a forward pass, and what it may read out of it.

Edits are data: a pytree of optional arrays, each for a range of layers. Readouts are chosen by one static, hashable
`ReadSpec` and come back as arrays. A `Plugin` runs between layers at static cut points. With no edits, nothing to read
and no plugins, the forward pass has the jaxpr of the plain model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.tree_util import register_dataclass, register_static

from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import BATCH, constrain
from jaxvqa.typing import Array, Bool, Float, Int

READABLE = frozenset({"rows", "values", "keys", "hidden"})


@register_dataclass
@dataclass(frozen=True)
class Mix:
    """Mix a map into the attention of chosen rows (VIF eq. 6-7), for any number of images, in its linear form:

    out' = ((1 − α)·out + Σ_visible α_i·(M_i V)) / (1 − α + Σ_visible α_i), with α = Σ_i α_i.

    An image is visible to a row whose order is greater than `last`, the order of the image's last token. Exact where
    each map sums to one over its image and no selected row lies inside an image.
    """

    alpha: Float[Array, "C B I"]
    """Weight of each image's map; the leading axis is the layers of the range, or 1. α = 0 is the identity."""
    maps: Float[Array, "C B I S"]
    """Maps over all keys, zero outside the image; keys beyond S count as zero."""
    last: Int[Array, "B I"]
    """Order of the last token of each image."""
    rows: Bool[Array, "B T"] | None = None
    """Query rows to edit; None is every row (decode)."""


@register_dataclass
@dataclass(frozen=True)
class Tap:
    """Edits of one attention. A field that is None costs nothing. Leading axis C: the layers of the range, or 1.

    Order inside the attention: scores, scale, key bias, mask, softmax (f32), times V, mixture, plus perturbation.
    """

    key_bias: Float[Array, "C B #N S"] | None = None
    """Added to the scaled scores of every row, e.g. log λ·M (CoF). Keys beyond S are not biased."""
    mix: Mix | None = None
    perturb: Float[Array, "C B R N H"] | None = None
    """Added to the head outputs at the rows of `Taps.rows`. Its gradient g, at zero, gives ∂y/∂A = g·Vᵀ exactly."""


@register_dataclass
@dataclass(frozen=True)
class Edit:
    """`tap` in layers start..stop−1. An edit of many layers stays one scan: its leaves are indexed by layer."""

    tap: Tap
    start: int = field(metadata={"static": True})
    stop: int = field(metadata={"static": True})

    def at(self, layer: int | Array) -> Tap:
        """The tap of one layer (a static or a traced index), without the leading axis."""

        def pick(x):
            x = x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, layer - self.start, keepdims=False)
            return constrain(x, BATCH)

        tap, mix = self.tap, self.tap.mix
        if mix is not None:
            rows = None if mix.rows is None else constrain(mix.rows, BATCH)
            mix = Mix(pick(mix.alpha), pick(mix.maps), constrain(mix.last, BATCH), rows)
        optional = [None if x is None else pick(x) for x in (tap.key_bias, tap.perturb)]
        return Tap(optional[0], mix, optional[1])


@register_dataclass
@dataclass(frozen=True)
class Taps:
    """All edits of a forward pass, and the query positions at which rows are read and outputs perturbed."""

    edits: tuple[Edit, ...] = ()
    rows: Int[Array, "B R"] | None = None
    """Query positions (their count is static, their values are data); None is the last valid token, R = 1."""
    cross_bias: Float[Array, "B I #N S"] | None = None
    """Of models that see each image I through queries (InstructBLIP): added to the scaled scores of their
    cross-attentions, all of them and every query, e.g. log λ·M (CoF). The class token is the first of the S keys.
    In `VLM.prefill` and the taps of requests; the family's own `prefill` takes it as `bias`."""


@register_static
@dataclass(frozen=True)
class ReadSpec:
    """What to read, and which layers to run. Static: part of the compilation key."""

    layers: tuple[int, ...] = ()
    """Layers to read, ascending (0-based)."""
    read: frozenset[str] = frozenset()
    """Subset of {"rows", "values", "keys", "hidden"}."""
    heads: str = "mean"
    """Attention rows: "mean" over the heads, on the device, or "all"."""
    stop: int | None = None
    """Run layers up to stop−1 only (None: all)."""
    start: int = 0
    """First layer to run: `hidden` of an earlier pass that stopped there goes in."""
    cross: tuple[int, ...] | None = None
    """Of models that see an image through queries (InstructBLIP): cross-attentions to read, ascending, counted by
    themselves. None is none but for requests, which read the model's own choice beside attention rows."""

    def __post_init__(self):
        if unknown := set(self.read) - READABLE:
            raise JaxVQAError(f"cannot read {sorted(unknown)}; readable are {sorted(READABLE)}")
        if self.heads not in ("mean", "all"):
            raise JaxVQAError(f"heads={self.heads!r}: expected 'mean' or 'all'")
        for name, layers in (("layers", self.layers), ("cross", self.cross or ())):
            if list(layers) != sorted(set(layers)):
                raise JaxVQAError(f"{name} {layers} must be distinct and ascending")
        if bool(self.layers) != bool(self.read):
            raise JaxVQAError("a readout needs both layers and what to read")


@register_dataclass
@dataclass(frozen=True)
class Readouts:
    """Readouts stacked over the C layers of `ReadSpec.layers`; what was not asked for is None."""

    rows: Float[Array, "C B *N R S"] | None = None
    """Attention probabilities, f32, [C, B, R, S] (heads="mean") or [C, B, N, R, S]."""
    values: Float[Array, "C B S K H"] | None = None
    keys: Float[Array, "C B S K H"] | None = None
    """Keys before the rotary embedding (after key normalisation, where the model has one)."""
    hidden: Float[Array, "C B T D"] | None = None
    """Output of the block."""
    cross: Float[Array, "C B I *N Q S"] | None = None
    """Of the cross-attentions `ReadSpec.cross`, with heads as in `rows`: attention probabilities, f32, of each image's
    queries to its class token and its patches."""
    cross_values: Float[Array, "C B I S N H"] | None = None


@register_dataclass
@dataclass(frozen=True)
class Plugin:
    """Runs before each layer of `cuts`: `step(params, cut, stream, carry) -> stream, carry, edits`.

    `step` is a pure module-level function and may replace the stream's hidden states and positions, not the number and
    order of its tokens (all layers share one cache); the edits that it returns hold from that cut on. The carry leaves
    prefill with the cache and enters every decode step.
    """

    step: Callable = field(metadata={"static": True})
    cuts: tuple[int, ...] = field(metadata={"static": True})
    params: Any = None
    carry: Any = None
    begin: Callable | None = field(default=None, metadata={"static": True})
    """Module-level function `begin(row, *args) -> carry`, by which the engine makes the carry of one sample (of a
    `requests.Row`, without the batch axis) before prefill, on the device. None: `carry` is the whole batch's."""
    end: Callable | None = field(default=None, metadata={"static": True})
    """Module-level function `end(carry) -> arrays` of one sample after prefill: what comes back as `Reply.value`."""
