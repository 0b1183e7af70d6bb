"""How `Gradient` is served: the log-probability of the most likely next token, differentiated in one program.

A prefix's keys and values do not depend on the rows behind it, so that a gradient to their attention is exact beside a
shared prefix, and its backward pass runs through the rest of the prompt alone.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvqa.errors import UserError
from jaxvqa.handlers import Batch, PromptHandler, Work, cross_layers, laid_out, padded, seen, split, stacked
from jaxvqa.matching import MATCH_GRADIENT, readings
from jaxvqa.models import family_of
from jaxvqa.requests import Gradient
from jaxvqa.sharding import ACT_BTNH, BATCH, layout
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps
from jaxvqa.transforms.gradient import attention_gradient
from jaxvqa.typing import Array, Bool, Float
from jaxvqa.vlm import queried


@partial(jax.jit, static_argnames=("spec", "reduce", "backend"))
def _gradient(
    params, config, batch: Batch, pixels: Float[Array, "B I E E 3"] | None, args, *, spec, reduce, backend
) -> tuple[Any, Bool[Array, "B"]]:
    """∂y/∂A at `spec.layers` and `spec.cross` or, with pixels, ∂y/∂X: reduced, and whether each row is finite."""
    family, d = family_of(config), config.decoder
    row, run = laid_out(config, batch)
    pixels, args = split((pixels, args))
    # Without a cache in its carry, a layer is cheaply recomputed from its input.
    static = dict(spec=spec, backend=backend, remat=not batch.prefix)
    cross = spec.cross or ()
    if cross:
        static |= queried(batch.asked, Taps(), spec, frozenset({"rows", "values"}))

    def top(x):
        if pixels is None:
            edits = (Edit(Tap(perturb=p[None]), at, at + 1) for p, at in zip(x[0], spec.layers, strict=True))
            edited = dict(perturb=x[1]) if cross else {}
            out = run(params, taps=Taps(tuple(edits)), **static, **edited)
        else:
            features = family.encode_images(params, config, jax.lax.collapse(x, 0, 2), backend=backend)
            features = jnp.reshape(features, (len(x), -1, features.shape[-1]), out_sharding=layout(("batch",)))
            out = run(params, features, taps=Taps(), **static)
        best = jnp.argmax(out.logits, axis=-1)[:, None]
        return jnp.take_along_axis(jax.nn.log_softmax(out.logits), best, axis=-1).sum(), out

    if pixels is None:
        shape = (len(spec.layers), *batch.rows.shape, d.num_heads, d.head_dim)
        zero = [jnp.zeros(shape, jnp.float32, out_sharding=layout((None, *ACT_BTNH)))]
        if cross:
            q, axes = config.qformer, (None, *BATCH)
            shape = (len(cross), *batch.queries.shape, q.num_heads, q.width // q.num_heads)
            zero += [jnp.zeros(shape, jnp.float32, out_sharding=layout(axes))]
        slopes, out = jax.grad(top, has_aux=True)(zero)
        slopes, row = split([jnp.moveaxis(slope, 1, 0) for slope in slopes]), seen(row, out)
        gradient = attention_gradient(slopes[0], row.readouts.values)
        if cross:
            row = replace(row, cross_gradient=attention_gradient(slopes[1], row.readouts.cross_values))
    else:
        gradient, out = jax.grad(top, has_aux=True)(pixels)
        row = seen(row, out)
    finite = jnp.isfinite(out.logits).all(axis=1) & jnp.isfinite(gradient).all(axis=tuple(range(1, gradient.ndim)))
    value = gradient if reduce is None else jax.vmap(reduce)(replace(row, gradient=gradient), *args)
    return value, finite


class GradientHandler(PromptHandler):
    name = "gradient"

    def prepare(self, engine, request: Gradient, seed) -> Work:
        for option, allowed in (("of", ("top", "match")), ("wrt", ("attention", "pixels"))):
            if (given := getattr(request, option)) not in allowed:
                raise UserError(f"Gradient: {option}={given!r}; expected one of {', '.join(allowed)}")
        if request.of == "match":
            return MATCH_GRADIENT.prepare(engine, request, seed)
        (_, vlm), layers = engine.model(request.model), request.layers
        family, d, to_pixels = family_of(vlm.config), vlm.config.decoder, request.wrt == "pixels"
        if to_pixels and (layers or not request.images):
            raise UserError(
                f"Gradient to pixels: found layers={layers}, {len(request.images)} images; expected () and 1"
            )
        if not to_pixels and not layers:
            raise UserError("Gradient to attention: no layers; name at least one")
        if outside := [layer for layer in layers if not 0 <= layer < d.num_layers]:
            raise UserError(f"Gradient to layers {outside}: the model has layers 0 to {d.num_layers - 1}")
        cross = cross_layers(vlm, request, request.cross, not to_pixels)
        if to_pixels and cross:
            raise UserError(f"Gradient to pixels: found cross={cross}; expected none")
        what = frozenset({"rows", "values"})
        spec = ReadSpec() if to_pixels else ReadSpec(layers, what, heads="all", cross=cross)
        work = self.work(
            engine, request, seed, (spec, to_pixels, request.reduce), which=request.rows, args=request.args,
            shares=not to_pixels,
        )  # fmt: skip
        images = 0
        if to_pixels:
            pixels = [image.arrays for image in work.data.images]
            if not all(isinstance(image, np.ndarray) and image.ndim == 3 for image in pixels):
                raise UserError(f"Gradient to pixels: {vlm.name} sees no single square; take wrt='attention'")
            pixels = np.stack(pixels)
            work.needs, work.data = {}, replace(work.data, features=(), extra=pixels)
            images = len(pixels) * family.image_flops(vlm.config, pixels[0])
        # On the way to what image tokens are made of lie all layers.
        lowest = 0 if cross else min(layers, default=0)
        upper = replace(vlm.config, decoder=replace(d, num_layers=d.num_layers - lowest))

        def and_back(flops: int, tokens: int, start: int, asked: int) -> int:
            back = images + family.flops(upper, tokens, start + (tokens + 1) // 2)
            if asked and (cross or to_pixels):
                back += len(request.images) * family.query_flops(vlm.config, asked, min(cross or (0,)))
            return flops + images + 2 * back

        key, asked = work.key, 0 if work.data.asked is None else len(work.data.asked)
        total = and_back(work.flops, work.data.length, 0, asked)
        work.flops, work.padded_flops = total, and_back(work.padded_flops, key.length - key.start, key.start, key.asked)
        work.cost = lambda result: (0, total)
        return work

    def launch(self, engine, works, size):
        key = works[0].key
        _, vlm = engine.model(key.model)
        spec, to_pixels, reduce = key.static
        rows = [work.data for work in padded(works, size)]
        pixels = stacked([row.extra for row in rows]) if to_pixels else None
        args = stacked([row.args for row in rows]) if reduce else ()
        with vlm.on_mesh():
            result = _gradient(
                vlm.params, vlm.config, self.batch(vlm, works, size), pixels, args,
                spec=spec, reduce=reduce, backend=vlm.attention,
            )  # fmt: skip
        return partial(readings, vlm, works, result)


GRADIENT = GradientHandler()
