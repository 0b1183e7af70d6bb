"""Decoding on the device, option scoring, yes/no confidence; what sampling depends on; what donation saves."""

import functools
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CONFIG, parameters, side_by_side

from jaxvqa import decoder, decoding
from jaxvqa.decoder import right_padded
from jaxvqa.decoding import forward
from jaxvqa.errors import JaxVQAError
from jaxvqa.models import llava
from jaxvqa.models.llava import LlavaConfig
from jaxvqa.taps import ReadSpec
from jaxvqa.vision.clip import ClipConfig

B, T, NEW = 4, 9, 8
LENGTHS = np.array([9, 4, 7, 1], np.int32)
CAPACITY = T + NEW
NO_EOS = (-1,)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def params():
    return parameters()


def prompts(seed, rows=B):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, T)).astype(np.int32)


@jax.jit
def prefill(params, ids, lengths):
    stream = right_padded(decoder.embed_tokens(params, ids), lengths)
    return forward(params, CONFIG, stream, capacity=CAPACITY, backend="xla")


@functools.partial(jax.jit, static_argnames=("eos_ids", "max_new_tokens"))
def decode(params, output, keys=None, temperature=1.0, eos_ids=NO_EOS, max_new_tokens=NEW):
    return decoding.decode(
        params, CONFIG, output, max_new_tokens=max_new_tokens, eos_ids=eos_ids, keys=keys, temperature=temperature
    )


@jax.jit
def all_logits(params, ids, lengths):
    stream = right_padded(decoder.embed_tokens(params, ids), lengths)
    return decoder.finish(params, CONFIG, decoder.run(params, CONFIG, stream, backend="xla")[0])


def test_greedy_decoding_takes_the_best_token_of_a_full_pass(params):
    """Each row from its own length: the generated text, run through the model at once, predicts itself."""
    ids = prompts(0)
    out = prefill(params, ids, LENGTHS)
    result = decode(params, out)
    generated = np.asarray(result.ids)
    assert (result.count == NEW).all() and result.finite.all()
    whole = np.zeros((B, CAPACITY), np.int32)
    for b, n in enumerate(LENGTHS):
        whole[b, : n + NEW] = np.concatenate([ids[b, :n], generated[b]])
    logits = np.asarray(all_logits(params, whole, LENGTHS + NEW))
    for b, n in enumerate(LENGTHS):
        rows = logits[b, n - 1 : n - 1 + NEW]
        best = np.sort(rows, axis=-1)
        assert ((rows.argmax(axis=-1) == generated[b]) | (best[:, -1] - best[:, -2] < 1e-4)).all()
    np.testing.assert_allclose(out.logits, logits[np.arange(B), LENGTHS - 1], atol=3e-5)
    np.testing.assert_array_equal(result.cache.length, LENGTHS + NEW - 1)


def test_a_row_ends_at_its_end_of_sequence_token(params):
    """Later ids are zero, the other rows go on unchanged, and the loop ends when every row has ended."""
    out = prefill(params, prompts(0), LENGTHS)
    free = np.asarray(decode(params, out).ids)
    eos = int(free[0, 2])
    result = decode(params, out, eos_ids=(eos, int(free[2, 4])))
    for b in range(B):
        ends = np.flatnonzero(np.isin(free[b], (eos, free[2, 4])))
        count = ends[0] + 1 if len(ends) else NEW
        assert result.count[b] == count
        np.testing.assert_array_equal(result.ids[b], np.where(np.arange(NEW) < count, free[b], 0))
        assert result.cache.length[b] == LENGTHS[b] + count - 1
    every = decode(params, out, eos_ids=tuple(int(i) for i in free[:, 0]))
    assert (every.count == 1).all() and every.cache.filled == T


@jax.jit
def further(params, ids, cache):
    return decoding.extend(params, CONFIG, ids, jnp.full(B, ids.shape[1], jnp.int32), cache)


def test_a_further_turn_starts_with_the_last_token(params):
    """`Decoded.cache` holds everything but each row's last token: appending it and a question equals a full pass."""
    ids = prompts(0)
    out = prefill(params, ids, LENGTHS)
    result = decode(params, out, max_new_tokens=4)
    question = np.array([[3, 1], [7, 7], [0, 2], [5, 4]], np.int32)
    turn = np.concatenate([np.asarray(result.ids)[:, 3:4], question], axis=1)
    follow = further(params, turn, result.cache)
    whole = np.zeros((B, CAPACITY), np.int32)
    for b, n in enumerate(LENGTHS):
        whole[b, : n + 6] = np.concatenate([ids[b, :n], result.ids[b, :4], question[b]])
    logits = np.asarray(all_logits(params, whole, LENGTHS + 6))
    np.testing.assert_allclose(follow.logits, logits[np.arange(B), LENGTHS + 5], atol=3e-5)


def test_logits_that_are_not_finite_are_flagged_not_hidden(params):
    out = prefill(params, prompts(0), LENGTHS)
    out = replace(out, logits=out.logits.at[1, 5].set(jnp.nan))
    assert decode(params, out).finite.tolist() == [True, False, True, True]


def test_a_full_cache_ends_the_answers(params):
    """Writing on would overwrite the last slots and change what earlier tokens mean."""
    out = prefill(params, prompts(0), LENGTHS)
    free = decode(params, out)
    longer = decode(params, out, max_new_tokens=NEW + 6)
    assert (longer.count == NEW + 1).all() and longer.cache.filled == CAPACITY
    np.testing.assert_array_equal(longer.ids[:, :NEW], free.ids)


def test_decoding_without_a_cache_is_refused(params):
    out = prefill(params, prompts(0), LENGTHS)
    with pytest.raises(JaxVQAError, match="capacity"):
        decode(params, replace(out, cache=None))


# ---- sampling ----


def row_keys(seeds):
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


@settings(max_examples=6)
@given(seed=seeds, order=st.permutations(range(B)))
def test_a_sample_depends_on_its_own_prompt_and_key_only(params, seed, order):
    ids, order = prompts(seed), np.array(order)
    keys = row_keys(np.arange(B) + seed % 1000)
    one = decode(params, prefill(params, ids, LENGTHS), keys)
    again = decode(params, prefill(params, ids, LENGTHS), keys)
    np.testing.assert_array_equal(one.ids, again.ids)
    moved = decode(params, prefill(params, ids[order], LENGTHS[order]), keys[order])
    np.testing.assert_array_equal(np.asarray(one.ids)[order], moved.ids)
    others = prompts(seed + 1)
    others[0] = ids[0]
    companions = decode(params, prefill(params, others, LENGTHS), row_keys([seed % 1000, 7001, 7002, 7003]))
    np.testing.assert_array_equal(one.ids[0], companions.ids[0])


def test_temperature_shapes_the_samples(params):
    """Cold sampling is greedy; warm sampling follows the softmax (first token, 4,096 keys)."""
    out = prefill(params, prompts(0), LENGTHS)
    cold = decode(params, out, row_keys([1, 2, 3, 4]), 1e-4)
    np.testing.assert_array_equal(cold.ids, decode(params, out).ids)
    many, same = 4096, replace(out, logits=jnp.tile(out.logits[:1], (B, 1)))
    keys = row_keys(np.arange(many)).reshape(-1, B)
    first = jax.vmap(lambda keys: decode(params, same, keys, 0.7, max_new_tokens=1).ids)(keys)
    expected = np.asarray(jax.nn.softmax(out.logits[0] / 0.7))
    found = np.bincount(np.ravel(first), minlength=CONFIG.vocab_size) / many
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / many)


# ---- options and yes/no ----


@settings(max_examples=5)
@given(seed=seeds)
def test_options_side_by_side_score_as_one_by_one(params, seed):
    """Mean log-likelihood of every token of each continuation, whatever its neighbours and their lengths."""
    rng = np.random.default_rng(seed)
    ids, options = prompts(seed), rng.integers(0, CONFIG.vocab_size, (B, 2, 4)).astype(np.int32)
    lengths = rng.integers(1, 5, (B, 2)).astype(np.int32)
    got = score(params, prefill(params, ids, LENGTHS), options, lengths)
    for c in range(2):
        whole = np.zeros((B, T + 4), np.int32)
        for b, n in enumerate(LENGTHS):
            whole[b, :n], whole[b, n : n + 4] = ids[b, :n], options[b, c]
        log_probs = np.asarray(jax.nn.log_softmax(all_logits(params, whole, LENGTHS + lengths[:, c]), axis=-1))
        for b, n in enumerate(LENGTHS):
            m = lengths[b, c]
            expected = log_probs[b, np.arange(n - 1, n - 1 + m), options[b, c, :m]].mean()
            np.testing.assert_allclose(got[b, c], expected, atol=2e-5)


@jax.jit
def score(params, output, ids, lengths):
    return decoding.score_options(params, CONFIG, output, ids, lengths, backend="xla")


def test_an_empty_option_never_wins(params):
    out = prefill(params, prompts(0), LENGTHS)
    got = score(params, out, np.zeros((B, 2, 4), np.int32), np.array([[0, 2]] * B, np.int32))
    assert (got[:, 0] == -np.inf).all() and np.isfinite(got[:, 1]).all()


@pytest.mark.parametrize(
    ("difference", "confidence"),
    [(0, 0), (0.5, 0.244919), (1, 0.462117), (2, 0.761594), (4, 0.964028), (-2, -0.761594)],
)
def test_yes_no_confidence_has_the_published_values(difference, confidence):
    logits = jnp.zeros((1, 9)).at[0, 3].set(1.5 + difference).at[0, 5].set(1.5).at[0, 7].set(99)
    np.testing.assert_allclose(decoding.yes_no_confidence(logits, 3, 5), confidence, atol=1e-6)


# ---- memory ----


def test_a_donated_cache_is_updated_in_place(params, measured):
    """In the decode loop and in a step: the temporaries stay far below the cache, and all of it is aliased."""
    wide = replace(CONFIG, num_layers=12)
    shapes = jax.eval_shape(lambda: parameters(config=wide))
    capacity = 4096
    out = jax.eval_shape(
        lambda p: forward(p, wide, right_padded(jnp.zeros((B, T, 16)), jnp.asarray(LENGTHS)), capacity=capacity), shapes
    )
    cache_bytes = sum(x.size * 4 for x in (out.cache.k, out.cache.v))

    def loop(params, cache, rest):
        output = replace(rest, cache=cache)
        return decoding.decode(params, wide, output, max_new_tokens=NEW, eos_ids=(2,))

    def step(params, cache, rest):
        token, one = jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32)
        return decoding.extend(params, wide, token, one, cache).cache

    for name, program in (("loop", loop), ("step", step)):
        lowered = jax.jit(program, donate_argnums=1).lower(shapes, out.cache, replace(out, cache=None))
        memory = lowered.compile().memory_analysis()
        measured(f"donated {name}: temporary / cache bytes", memory.temp_size_in_bytes / cache_bytes)
        assert memory.alias_size_in_bytes >= cache_bytes
        # A step holds one layer's keys and values, a twelfth of the cache here; a copy would be all of it.
        assert memory.temp_size_in_bytes < 0.2 * cache_bytes


def test_donating_a_cache_warns_of_nothing(params):
    """XLA warns where a donated buffer is of no use: then a loop does not return what it was given."""
    out = prefill(params, prompts(0), LENGTHS)
    run = jax.jit(
        lambda p, cache, out: decoding.decode(p, CONFIG, replace(out, cache=cache), max_new_tokens=3, eos_ids=NO_EOS),
        donate_argnums=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(params, out.cache, replace(out, cache=None))
    assert out.cache.k.is_deleted() and result.cache.k.shape == (4, B, CAPACITY, 2, 6)


# ---- companions, through the whole of LLaVA ----

LLAVA = LlavaConfig(
    vision=ClipConfig(
        image_size=16, patch_size=4, width=12, mlp_width=20, num_layers=3, num_heads=2, norm_eps=1e-5,
        activation="quick_gelu",
    ),
    decoder=CONFIG, image_token_id=39, feature_layers=(-2,), select="default", projector_activation="gelu",
    projector_bias=True,
)  # fmt: skip


@jax.jit
def answer(params, ids, lengths, pixels):
    features = llava.encode_images(params, LLAVA, jax.lax.collapse(pixels, 0, 2), backend="xla")
    features = features.reshape(*pixels.shape[:2], *features.shape[1:])
    spec = ReadSpec(layers=(1, 2), read=frozenset({"rows", "values"}))
    images = side_by_side(features, ids, LLAVA.image_token_id)
    out = llava.prefill(params, LLAVA, ids, lengths, *images, capacity=60, spec=spec, backend="xla")
    result = decoding.decode(params.decoder, CONFIG, out, max_new_tokens=NEW, eos_ids=(2,))
    return features, out.hidden, out.logits, out.readouts.rows.swapaxes(0, 1), result.ids, result.count


@settings(max_examples=5)
@given(seed=seeds, row=st.integers(0, B - 1), at=st.integers(0, B - 1))
def test_companions_and_position_do_not_change_a_bit_of_an_answer(seed, row, at):
    """Pixels to text, at one batch size: image tokens, hidden states, logits, attention rows, generated ids."""
    params = parameters(llava.specs(LLAVA))
    rng = np.random.default_rng(seed)

    def batch():
        ids = rng.integers(0, 39, (B, 50)).astype(np.int32)
        ids[:, 3:19], ids[:, 24:40] = 39, 39
        return ids, rng.integers(20, 51, B).astype(np.int32), rng.standard_normal((B, 2, 16, 16, 3)).astype(np.float32)

    one, two = batch(), batch()
    for a, b in zip(one, two, strict=True):
        b[at] = a[row]
    length = one[1][row]
    for a, b in zip(answer(params, *one), answer(params, *two), strict=True):
        a, b = np.asarray(a)[row], np.asarray(b)[at]
        a, b = (a[:length], b[:length]) if len(np.shape(a)) == 2 and len(a) == 50 else (a, b)
        np.testing.assert_array_equal(a, b)
