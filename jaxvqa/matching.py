"""How requests to an image-text matching model are served: `Match`, and `Gradient` of its logit.

They follow the rules of `handlers`; an image is encoded once, whatever texts it is matched with.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.geometry import Geometry
from jaxvqa.handlers import IMAGES, SHORT, Work, arrays, bucket, not_finite, padded, right_pad, shapes, split, stacked
from jaxvqa.matcher import MAX_TOKENS, Matcher
from jaxvqa.models import blip_itm
from jaxvqa.requests import Gradient, Match, Reading, Row
from jaxvqa.taps import Readouts
from jaxvqa.typing import Array, Bool, Float
from jaxvqa.vlm import VLM


@partial(jax.jit, static_argnames=("backend",))
def _match(params, config, ids, lengths, features, *, backend) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """Probabilities of "match", and whether each row is finite."""
    ids, lengths, image = split((ids, lengths, jnp.stack(features)))
    logits = blip_itm.match(params, config, ids, lengths, image, backend=backend)
    return jax.nn.softmax(logits)[:, blip_itm.MATCH], jnp.isfinite(logits).all(axis=1)


@partial(jax.jit, static_argnames=("layer", "reduce", "backend"))
def _match_gradient(
    params, config, ids, lengths, features, args, *, layer, reduce, backend
) -> tuple[Any, Bool[Array, "B"]]:
    """The reduced gradient (without a reduction the gradient itself), and whether each row is finite."""
    ids, lengths, image, args = split((ids, lengths, jnp.stack(features), args))
    logits, probs, slopes = blip_itm.match_gradient(params, config, ids, lengths, image, layer, backend=backend)
    logits, probs, slopes = split((logits, probs[:, None], slopes[:, None]))
    finite = jnp.isfinite(logits).all(axis=1) & jnp.isfinite(slopes).all(axis=(1, 2, 3, 4))
    if reduce is None:
        return slopes, finite

    def reduced(length, logits, probs, slopes, *args):
        h, w = config.grid
        at = jnp.arange(ids.shape[1])
        cells = jnp.arange(h * w)[None]
        return reduce(Row(cells, length, at, at < length, Readouts(probs), logits, (h, w), h * w, slopes), *args)

    return jax.vmap(reduced)(lengths, logits, probs, slopes, *args), finite


class Key(NamedTuple):
    """What pairs share that run in one batch."""

    handler: Any
    model: str
    length: int
    """Tokens of the text, padding included."""
    static: Any = None
    args: tuple = ()


@dataclass(frozen=True, eq=False)
class Paired:
    """The data of a work with an image and a text."""

    ids: np.ndarray
    image: Any
    """Name of the image's features."""
    geometries: tuple[Geometry, ...]
    args: tuple[Any, ...]


class _PairHandler:
    """What requests to a matching model have in common."""

    name: str

    def work(self, engine, request: Match | Gradient, static=None, args=(), back: int = 0) -> Work:
        """Make a pair ready. back: how many of the upper layers a backward pass goes through."""
        model, matcher = engine.matcher(request.model)
        if len(request.images) != 1:
            raise UserError(f"{type(request).__name__}: found {len(request.images)} images; a text is matched with one")
        if not isinstance(request.prompt, str):
            raise UserError(f"{type(request).__name__}: a matching model takes plain text, not a rendered prompt")
        config, image, ids = (
            matcher.config,
            engine.preprocessed(model, request.images[0]),
            matcher.tokenise(request.prompt),
        )
        length = min(bucket(len(ids), SHORT, "the text"), MAX_TOKENS, config.text.max_length)
        args = arrays(args)
        flops, padded_flops = (
            blip_itm.flops(config, tokens) + 2 * blip_itm.flops(config, tokens, back) * bool(back)
            for tokens in (len(ids), length)
        )
        return Work(
            key=Key(self, model, length, static, shapes(args)),
            data=Paired(ids, image.name, (image.input.geometry,), args),
            text=request.prompt,
            needs={image.name: IMAGES.work(model, matcher, image.input.arrays)},
            flops=flops,
            padded_flops=padded_flops,
            cost=lambda result: (0, flops),
            apart=True,
        )

    def batch(self, engine, works: list[Work], size: int) -> tuple[Matcher, tuple]:
        """The model, and the batch: ids, lengths and each row's image features."""
        key, works = works[0].key, padded(works, size)
        ids = np.stack([right_pad(work.data.ids, key.length) for work in works])
        lengths = np.array([len(work.data.ids) for work in works], np.int32)
        return engine.matcher(key.model)[1], (ids, lengths, tuple(work.got[work.data.image] for work in works))


class MatchHandler(_PairHandler):
    name = "match"

    def prepare(self, engine, request: Match, seed) -> Work:
        return self.work(engine, request)

    def launch(self, engine, works, size):
        matcher, batch = self.batch(engine, works, size)
        with matcher.on_mesh():
            result = _match(matcher.params, matcher.config, *batch, backend=matcher.attention)

        def collect():
            values, fine = jax.device_get(result)
            return [float(values[i]) if fine[i] else not_finite(matcher) for i in range(len(works))]

        return collect


class MatchGradientHandler(_PairHandler):
    name = "match_gradient"

    def prepare(self, engine, request: Gradient, seed) -> Work:
        _, matcher = engine.matcher(request.model)
        if request.wrt != "attention" or len(request.layers) != 1:
            raise UserError(
                f"Gradient of a match: found wrt={request.wrt!r}, layers={request.layers}; "
                f"expected wrt='attention' and one layer"
            )
        layer = blip_itm.layer_index(matcher.config, request.layers[0])
        back = matcher.config.text.num_layers - layer
        return self.work(engine, request, (layer, request.reduce), request.args, back)

    def launch(self, engine, works, size):
        matcher, batch = self.batch(engine, works, size)
        layer, reduce = works[0].key.static
        args = stacked([work.data.args for work in padded(works, size)]) if reduce else ()
        with matcher.on_mesh():
            result = _match_gradient(
                matcher.params, matcher.config, *batch, args, layer=layer, reduce=reduce, backend=matcher.attention
            )
        return partial(readings, matcher, works, result)


def readings(model: Matcher | VLM, works: list[Work], result) -> list[Reading | JaxVQAError]:
    """What a program of gradients gave: (values, whether each row is finite), on the device."""
    values, fine = jax.device_get(result)
    return [
        Reading(jax.tree.map(lambda x, i=i: x[i], values), work.data.geometries)
        if fine[i]
        else not_finite(model, "the logits or their gradient")
        for i, work in enumerate(works)
    ]


MATCH, MATCH_GRADIENT = MatchHandler(), MatchGradientHandler()
