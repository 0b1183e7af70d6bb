"""Forward passes that end in logits, and what is done with logits: decoding, option scoring, yes/no confidence.

Prefill and decode are two programs. The whole answer is generated on the device, in one `while_loop`; rows have their
own lengths and stop on their own.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from jaxvqa.attention import NEVER
from jaxvqa.decoder import Cache, Decoder, DecoderConfig, Stream, embed_tokens, finish, last_row, right_padded, run
from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import BATCH, constrain, layout
from jaxvqa.taps import Plugin, Readouts, ReadSpec, Taps
from jaxvqa.typing import Array, Bool, Float, Int


@register_dataclass
@dataclass(frozen=True)
class Output:
    """Result of a forward pass over a prompt or its continuation."""

    logits: Float[Array, "B V"]
    """f32, at the last valid token; V = 0 after a pass that stopped before the last layer."""
    hidden: Float[Array, "B T D"]
    """Output of the last layer that ran, before the final normalisation."""
    cache: Cache | None
    readouts: Readouts
    plugins: tuple[Plugin, ...]


def forward(params: Decoder, config: DecoderConfig, stream: Stream, *, spec: ReadSpec = ReadSpec(), **kwargs) -> Output:
    """`decoder.run` and the logits of the last valid token. Keyword arguments as for `run`."""
    hidden, cache, readouts, plugins = run(params, config, stream, spec=spec, **kwargs)
    if spec.stop is not None and spec.stop < config.num_layers:
        logits = jnp.zeros((hidden.shape[0], 0), jnp.float32)
    else:
        last = jnp.take_along_axis(hidden, last_row(stream.order)[:, :, None], axis=1)
        logits = constrain(finish(params, config, last)[:, 0], BATCH)
    return Output(logits, hidden, cache, readouts, plugins)


def extend(
    params: Decoder, config: DecoderConfig, ids: Int[Array, "B T"], lengths: Int[Array, "B"], cache: Cache, **kwargs
) -> Output:
    """Append right-padded text tokens to each row of a cache: a decode step, a further turn. A length may be 0."""
    stream = right_padded(embed_tokens(params, ids), lengths, cache.length, shift=cache.shift)
    return forward(params, config, stream, cache=cache, **kwargs)


@register_dataclass
@dataclass(frozen=True)
class Decoded:
    """Generated tokens. The cache holds all of them but each row's last, which a further turn must begin with."""

    ids: Int[Array, "B M"]
    """Zero behind each row's count."""
    count: Int[Array, "B"]
    """Tokens generated, the end-of-sequence token included."""
    finite: Bool[Array, "B"]
    """Whether every logit that was used is finite; a row with False has no meaningful answer."""
    cache: Cache
    plugins: tuple[Plugin, ...]


@register_dataclass
@dataclass(frozen=True)
class _State:
    step: Int[Array, ""]
    done: Bool[Array, "B"]
    result: Decoded


def decode(
    params: Decoder,
    config: DecoderConfig,
    output: Output,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    keys: Array | None = None,
    temperature: Float[Array, ""] | float = 1.0,
    taps: Taps = Taps(),
    backend: str = "auto",
) -> Decoded:
    """Generate until every row has an end-of-sequence token or `max_new_tokens` tokens.

    Greedy (first index on ties) without `keys`; with one random key per row, sampled at `temperature`. A row's sample
    depends on its own key and step only. `output.cache` must have room for `max_new_tokens` − 1 more tokens (a full
    cache ends the loop); donate it.
    """
    if output.cache is None or output.cache.capacity < max_new_tokens - 1:
        raise JaxVQAError("decode needs a cache with room for the new tokens: give prefill a `capacity`")
    B, whole_rows = output.logits.shape[0], layout(BATCH)
    keys = None if keys is None else constrain(keys, BATCH)
    eos = jnp.asarray(eos_ids, jnp.int32)

    def choose(logits, step):
        if keys is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(step_keys, logits / temperature).astype(jnp.int32)

    def emit(step, done, logits, result):
        token = jnp.where(done, 0, choose(logits, step))
        result = replace(
            result,
            ids=jax.lax.dynamic_update_slice(result.ids, token[:, None], (0, step)),
            count=result.count + ~done,
            finite=result.finite & (done | jnp.isfinite(logits).all(axis=-1)),
        )
        return _State(step + 1, done | jnp.isin(token, eos), result)

    def unfinished(state):
        room = state.result.cache.filled < output.cache.capacity  # a write into a full cache would hit older tokens
        return (state.step < max_new_tokens) & ~state.done.all() & room

    def body(state):
        r = state.result
        token = jax.lax.dynamic_slice_in_dim(r.ids, state.step - 1, 1, axis=1)
        lengths = jnp.where(state.done, 0, 1)
        out = extend(params, config, token, lengths, r.cache, taps=taps, plugins=r.plugins, backend=backend)
        return emit(state.step, state.done, out.logits, replace(r, cache=out.cache, plugins=out.plugins))

    empty = Decoded(
        ids=jnp.zeros((B, max_new_tokens), jnp.int32, out_sharding=whole_rows),
        count=jnp.zeros(B, jnp.int32, out_sharding=whole_rows),
        finite=jnp.ones(B, bool, out_sharding=whole_rows),
        cache=output.cache,
        plugins=output.plugins,
    )
    first = emit(jnp.int32(0), jnp.zeros_like(empty.finite), output.logits, empty)
    return jax.lax.while_loop(unfinished, body, first).result


def score_options(
    params: Decoder,
    config: DecoderConfig,
    output: Output,
    ids: Int[Array, "B C T"],
    lengths: Int[Array, "B C"],
    *,
    taps: Taps = Taps(),
    backend: str = "auto",
) -> Float[Array, "B C"]:
    """Mean log-likelihood of each continuation of one prompt, in one pass over one shared prefill.

    The options lie side by side in one sequence, each its own segment, so the cache is neither copied nor repeated. It
    needs C·T free slots. Every token counts, the final end-of-sequence token included if given (SEAL, ZoomEye
    `logits_match`). An option of length 0 scores −inf.
    """
    ids, lengths = constrain(ids, BATCH), constrain(lengths, BATCH)
    B, C, T = ids.shape
    offset = jnp.arange(T, dtype=jnp.int32)
    order = output.cache.length[:, None, None] + jnp.broadcast_to(offset, (B, C, T))
    shift = output.cache.shift
    positions = order if shift is None else order + shift[:, None, None]
    valid = offset < lengths[:, :, None]
    segment = jnp.broadcast_to(jnp.arange(1, C + 1, dtype=jnp.int32)[None, :, None], (B, C, T))
    flat = jax.vmap(jnp.ravel)
    stream = Stream(
        embed_tokens(params, flat(ids)), flat(positions), flat(jnp.where(valid, order, NEVER)), flat(segment)
    )
    hidden, *_ = run(params, config, stream, cache=output.cache, taps=taps, plugins=output.plugins, backend=backend)
    logits = constrain(finish(params, config, hidden), BATCH).reshape(B, C, T, -1)
    before = jnp.broadcast_to(output.logits[:, None, None, :], (B, C, 1, logits.shape[-1]))
    log_probs = jax.nn.log_softmax(jnp.concatenate([before, logits[:, :, :-1]], axis=2), axis=-1)
    picked = jnp.take_along_axis(log_probs, ids[..., None], axis=-1)[..., 0]
    total = jnp.where(valid, picked, 0.0).sum(axis=-1)
    return jnp.where(lengths > 0, total / jnp.maximum(lengths, 1), -jnp.inf)


def yes_no_confidence(logits: Float[Array, "B V"], yes_id: int, no_id: int) -> Float[Array, "B"]:
    """2·softmax([l_yes, l_no])_yes − 1 = tanh((l_yes − l_no)/2), in [−1, 1] (FOCUS eq. 5, ZoomEye)."""
    return jnp.tanh((logits[:, yes_id] - logits[:, no_id]) / 2)
