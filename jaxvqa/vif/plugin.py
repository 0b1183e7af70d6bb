"""VIF in a forward pass: maps made from middle layers' states, mixed into the attention of deep layers (eq. 6-7).

The plugin reads the output of each extraction layer and, by the one generator, makes a map over every image of it;
text rows of the injection layer with which that layer is paired attend to (1 − α)·A + α·M. In decoding nothing is made
anew: the prefill's maps hold for the generated tokens, too, or not at all.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from jaxvqa.decoder import Stream
from jaxvqa.errors import JaxVQAError
from jaxvqa.requests import Row, cell_of_keys
from jaxvqa.sharding import ACT_BTD, BATCH, constrain, layout
from jaxvqa.taps import Edit, Plugin, Tap
from jaxvqa.transforms.information_flow import information_flow
from jaxvqa.typing import Array, Bool, Float, Int
from jaxvqa.vif import generator
from jaxvqa.vif.generator import Generator, GeneratorConfig

EXTRACT, INJECT, LAYERS = (11, 13, 15, 17), (25, 27, 29, 31), 32
"""The paper's pairs, in order (Table 4), of so many layers."""

Pairs = tuple[tuple[int, int], ...]
"""(extraction layer, injection layer), 0-based."""


def layer_pairs(num_layers: int) -> Pairs:
    """The paper's pairs in a model of `num_layers`: the layers in which the middles of the paper's 32 would lie.

    Where several pairs fall on one injection layer (below 16 layers or so), the one that extracts last is kept.

    >>> layer_pairs(40), layer_pairs(6)
    (((14, 31), (16, 34), (19, 36), (21, 39)), ((2, 4), (3, 5)))
    """

    def scaled(layer: int) -> int:
        return (2 * layer + 1) * num_layers // (2 * LAYERS)

    into = {scaled(deep): scaled(middle) for middle, deep in zip(EXTRACT, INJECT, strict=True)}
    return tuple((min(middle, deep - 1), deep) for deep, middle in into.items())


@register_dataclass
@dataclass(frozen=True)
class Injection:
    """What the plugin is given: the generator, and how it is used."""

    generator: Generator
    alpha: Float[Array, ""]
    """α; several images share it equally."""
    config: GeneratorConfig = field(metadata={"static": True})
    pairs: Pairs = field(metadata={"static": True})
    decode: bool = field(metadata={"static": True})
    """Whether the rows of generated tokens are injected."""


@register_dataclass
@dataclass(frozen=True)
class Flow:
    """The plugin's carry: where images and text lie, and the maps so far."""

    cells: Int[Array, "*B I P"]
    """Positions of each image's cells; negative where a row has fewer images, and behind the last cell."""
    shapes: Int[Array, "*B I 2"]
    """Rows and columns of each image's grid."""
    text: Int[Array, "*B Q"]
    """Positions of the tokens that are neither image nor padding; negative behind the last."""
    rows: Bool[Array, "*B T"]
    """The same tokens, as a mask."""
    seeds: Int[Array, "*B"] | None
    """One random seed per row, from which each pair of layers and each image has its own key; None takes the mean."""
    grid: tuple[int, int] = field(metadata={"static": True})
    maps: tuple[Float[Array, "*B I P"], ...] = ()
    """By pair, in the order of extraction; all are there when prefill ends."""


def begin(row: Row, *seed: Int[Array, ""]) -> Flow:
    """The carry of one sample before prefill, for a prompt with all images of `row.cells`; a seed samples z."""
    here = (jax.vmap(lambda cells: cell_of_keys(cells, row.keys))(row.cells) >= 0).any(0)
    rows = (jnp.arange(row.keys) < row.length) & ~here
    # Grids that vary hold fewer cells than their padding says, and so leave more text.
    size = row.keys - row.cells.size * (row.grid[0] > 1)
    text = jnp.flatnonzero(rows, size=size, fill_value=-1).astype(jnp.int32)
    return Flow(row.cells, row.shapes, text, rows, seed[0] if seed else None, row.grid)


def end(flow: Flow) -> Float[Array, "I h w"]:
    """What one sample is given back: each image's map, the mean over the pairs of layers."""
    maps = jnp.stack(flow.maps).mean(0) if flow.maps else jnp.zeros(flow.cells.shape)
    return maps.reshape(len(flow.cells), *flow.grid)


def step(params: Injection, cut: int, stream: Stream, flow: Flow) -> tuple[Stream, Flow, tuple[Edit, ...]]:
    """At a cut: the map of the states that arrive, and the edit that mixes it into the paired layer."""
    if not flow.cells.shape[1]:
        return stream, flow, ()
    prefill, edits = len(flow.maps) < len(params.pairs), ()
    for number, (middle, deep) in enumerate(params.pairs):
        if middle + 1 != cut:
            continue
        if prefill:
            flow = replace(flow, maps=(*flow.maps, make_maps(params, stream.hidden, flow, number)))
        if prefill or params.decode:
            rows = flow.rows if prefill else None
            keys = flow.rows.shape[1]
            mix = information_flow(flow.maps[number], flow.cells, keys, alpha=params.alpha, rows=rows)
            edits = (*edits, Edit(Tap(mix=mix), deep, deep + 1))
    return stream, flow, edits


def make_maps(params: Injection, hidden: Float[Array, "B T D"], flow: Flow, number: int) -> Float[Array, "B I P"]:
    """The maps of one pair of layers, f32, one per image: each generated from that image's states and all the text."""
    (B, images, P), Q, D = flow.cells.shape, flow.text.shape[1], hidden.shape[-1]
    if (wanted := params.config.width) != D:
        raise JaxVQAError(f"VIF's generator was made for states of width {wanted}, the model's have {D}: train its own")

    def states(positions: Int[Array, "B X"]):
        return jnp.take_along_axis(hidden, jnp.maximum(positions, 0)[:, :, None], axis=1)

    def per_image(x: Array, *shape: int):
        return jnp.reshape(x, (B * images, *shape), out_sharding=layout(BATCH))

    vision = per_image(states(_per_row(flow.cells, images * P)), P, D)
    text = per_image(jnp.repeat(states(flow.text), images, axis=0, out_sharding=layout(ACT_BTD)), Q, D)
    mask = per_image(jnp.repeat(flow.text >= 0, images, axis=0, out_sharding=layout(BATCH)), Q)
    seen = None if flow.grid[0] > 1 else per_image(flow.cells >= 0, P)
    mean, logvar = generator.prior(params.generator, params.config, vision, text, mask, seen)
    keys = None
    if flow.seeds is not None:
        row_keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), number))(flow.seeds)
        keys = jax.vmap(lambda key: jax.random.split(key, images))(row_keys).reshape(B * images)
    z = generator.latent(mean, logvar, keys)
    maps = generator.render(params.generator.renderer, params.config, z, per_image(flow.shapes, 2), P)
    return jnp.reshape(maps, (B, images, P), out_sharding=layout(BATCH))


def _per_row(x: Array, size: int) -> Array:
    return jnp.reshape(constrain(x, BATCH), (len(x), size), out_sharding=layout(BATCH))


def plugin(
    params: Generator,
    config: GeneratorConfig,
    pairs: Pairs,
    *,
    alpha: float | int = 0.5,
    decode: bool = True,
) -> Plugin:
    """The plugin of a generator, for `Generate.plugin` (`args`: a seed, to sample) or `decoder.run`.

    pairs: (extraction layer, injection layer); a pair's map comes from the output of the first. For `decoder.run` the
    carry is made by `begin`, vmapped over the batch. Raises `JaxVQAError` for layers that cannot be paired.
    """
    pairs = tuple(sorted(pairs))
    deep = [into for _, into in pairs]
    if not pairs or len(set(deep)) < len(deep) or any(not 0 <= middle < into for middle, into in pairs):
        raise JaxVQAError(f"VIF: pairs of layers {pairs}; expected (middle, deep), middle < deep, no deep one twice")
    cuts = tuple(sorted({middle + 1 for middle, _ in pairs}))
    injection = Injection(params, jnp.float32(alpha), config, pairs, decode)
    return Plugin(step, cuts, injection, begin=begin, end=end)
