"""The decoder: its program without edits, its segments and stops, its cache, its memory, and who may influence whom."""

import functools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CONFIG, dense, parameters

from jaxvqa import decoder
from jaxvqa.attention import Mask, attend
from jaxvqa.decoder import DecoderConfig, Stream, right_padded
from jaxvqa.decoding import forward
from jaxvqa.errors import JaxVQAError
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps

B, T = 2, 11
LENGTHS = np.array([11, 7], np.int32)
VALID = np.arange(T) < LENGTHS[:, None]
TOLERANCE = 2e-5
"""f32 through four blocks with states of size 10, against float64 or another order of summation."""
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def params():
    return parameters()


def states(seed, length=T, rows=B):
    return np.random.default_rng(seed).standard_normal((rows, length, CONFIG.width)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("capacity", "backend", "remat"))
def run(params, x, lengths, taps=Taps(), spec=ReadSpec(), capacity=None, backend="xla", remat=False):
    stream = right_padded(x, lengths)
    out = decoder.run(params, CONFIG, stream, taps=taps, spec=spec, capacity=capacity, backend=backend, remat=remat)
    return out[0], out[1], out[2], decoder.finish(params, CONFIG, out[0])


# ---- the plain program ----


def plain(config, params, x, lengths):
    """The decoder without anything but itself: one scan, written once more."""
    stream = right_padded(x, lengths)
    mask = Mask(stream.order, stream.order, causal=True)
    rope = decoder._rope(stream.positions, config)

    def block(x, i):
        w = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), params.layers)
        h = decoder.rms_norm(x, w.attn_norm, config.norm_eps)
        q = jnp.einsum("BTD,DNH->BTNH", h, w.q_proj)
        k = jnp.einsum("BTD,DKH->BTKH", h, w.k_proj)
        v = jnp.einsum("BTD,DKH->BTKH", h, w.v_proj)
        q, k, v = q + w.q_bias, k + w.k_bias, v + w.v_bias
        q, k = decoder.rms_norm(q, w.q_norm, config.norm_eps), decoder.rms_norm(k, w.k_norm, config.norm_eps)
        q, k = decoder._rotate(q, *rope), decoder._rotate(k, *rope)
        out = attend(q, k, v, mask, scale=config.head_dim**-0.5, backend="xla")
        x = x + jnp.einsum("BTNH,NHD->BTD", out, w.o_proj)
        h = decoder.rms_norm(x, w.mlp_norm, config.norm_eps)
        gate = jax.nn.silu(jnp.einsum("BTD,DF->BTF", h, w.gate_proj))
        h = gate * jnp.einsum("BTD,DF->BTF", h, w.up_proj)
        return x + jnp.einsum("BTF,FD->BTD", h, w.down_proj), None

    return jax.lax.scan(block, stream.hidden, jnp.arange(config.num_layers))[0]


@pytest.mark.parametrize("edits", [(), (Edit(Tap(), 0, 4),)], ids=["no-taps", "empty-tap"])
def test_without_taps_the_jaxpr_is_that_of_the_plain_model(params, edits):
    def tapped(params, x, lengths):
        return decoder.run(params, CONFIG, right_padded(x, lengths), taps=Taps(edits), backend="xla")[0]

    expected = jax.make_jaxpr(functools.partial(plain, CONFIG))(params, states(0), LENGTHS)
    assert str(jax.make_jaxpr(tapped)(params, states(0), LENGTHS)) == str(expected)


@given(seed=seeds)
def test_every_layer_equals_the_dense_reference(params, seed):
    x = states(seed)
    spec = ReadSpec(layers=(0, 1, 2, 3), read=frozenset({"hidden", "rows", "values", "keys"}), heads="all")
    rows = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
    _, _, read, logits = run(params, x, LENGTHS, Taps(rows=rows), spec)
    expected = dense(params, x, LENGTHS)
    for i in range(CONFIG.num_layers):
        np.testing.assert_allclose(np.asarray(read.hidden[i])[VALID], expected.hidden[i][VALID], atol=TOLERANCE)
        np.testing.assert_allclose(np.asarray(read.values[i])[VALID], expected.values[i][VALID], atol=TOLERANCE)
        ours = np.asarray(read.rows[i]).swapaxes(1, 2)[VALID]
        np.testing.assert_allclose(ours, expected.probs[i].swapaxes(1, 2)[VALID], atol=1e-5)
    np.testing.assert_allclose(np.asarray(logits)[VALID], expected.logits[VALID], atol=TOLERANCE)


def test_one_scan_of_readouts_equals_one_layer_at_a_time(params):
    """And the mean over heads is the mean of all heads; both read the last valid token where no rows are given."""
    x, everything = states(1), frozenset({"hidden", "rows", "values", "keys"})
    _, _, together, _ = run(params, x, LENGTHS, spec=ReadSpec(layers=(0, 1, 2, 3), read=everything))
    _, _, some, _ = run(params, x, LENGTHS, spec=ReadSpec(layers=(0, 2, 3), read=everything, heads="all"))
    for name in ("hidden", "values", "keys"):
        np.testing.assert_array_equal(getattr(together, name)[jnp.array([0, 2, 3])], getattr(some, name))
    assert together.rows.shape == (4, B, 1, T) and some.rows.shape == (3, B, 4, 1, T)
    np.testing.assert_allclose(together.rows[jnp.array([0, 2, 3])], some.rows.mean(axis=2), atol=1e-7)
    assert (np.asarray(together.rows)[:, 1, 0, 7:] == 0).all() and (np.asarray(together.rows)[:, 1, 0, 6] > 0).all()


@pytest.mark.parametrize("stop", [1, 3])
def test_an_early_stop_resumed_is_the_full_run(params, stop):
    x = states(2)
    full, _, _, logits = run(params, x, LENGTHS)
    part, _, _, _ = run(params, x, LENGTHS, spec=ReadSpec(stop=stop))
    rest, _, _, resumed = run(params, part, LENGTHS, spec=ReadSpec(start=stop))
    np.testing.assert_array_equal(full, rest)
    np.testing.assert_array_equal(logits, resumed)


def test_a_pass_that_stops_early_has_no_logits(params):
    def stopped(x):
        return forward(params, CONFIG, right_padded(x, jnp.asarray(LENGTHS)), spec=ReadSpec(stop=1), capacity=16)

    out = jax.eval_shape(stopped, states(0))
    assert out.logits.shape == (B, 0) and out.cache.k.shape[0] == 1


@pytest.mark.parametrize("options", [dict(backend="xla_chunked"), dict(remat=True), dict(capacity=T + 3)])
def test_an_option_of_the_program_does_not_change_the_result(params, options):
    x = states(3)
    one, _, _, _ = run(params, x, LENGTHS)
    two, _, _, _ = run(params, x, LENGTHS, **options)
    np.testing.assert_allclose(np.asarray(one)[VALID], np.asarray(two)[VALID], atol=TOLERANCE)


# ---- the cache ----


@functools.partial(jax.jit, static_argnames=("pieces",))
def in_pieces(params, x, first, pieces):
    """Hidden states of right-padded pieces, each appended to a cache: [(piece, lengths [B])]."""
    hidden, cache = [], None
    for start, size in pieces:
        lengths = jnp.clip(first - start, 0, size)
        piece = jax.lax.slice_in_dim(x, start, start + size, axis=1)
        before = 0 if cache is None else cache.length
        out, cache, _, _ = decoder.run(
            params, CONFIG, right_padded(piece, lengths, before), cache=cache, capacity=16, backend="xla"
        )
        hidden.append(out)
    return jnp.concatenate(hidden, axis=1), cache


@given(seed=seeds, lengths=st.lists(st.integers(1, T), min_size=B, max_size=B))
def test_prefill_and_steps_on_a_cache_equal_one_full_pass(params, seed, lengths):
    """A prompt, three tokens at once, then one by one, where every row ends at its own time."""
    x, lengths = states(seed), np.array(lengths, np.int32)
    hidden, cache = in_pieces(params, x, lengths, ((0, 5), (5, 3), (8, 1), (9, 1), (10, 1)))
    full, _, _, _ = run(params, x, lengths)
    valid = np.arange(T) < lengths[:, None]
    np.testing.assert_allclose(np.asarray(hidden)[valid], np.asarray(full)[valid], atol=TOLERANCE)
    np.testing.assert_array_equal(cache.length, lengths)
    assert cache.filled == T and (np.asarray(cache.order)[:, :T][valid] == np.nonzero(valid)[1]).all()


@jax.jit
def run_stream(params, stream, cache=None):
    return decoder.run(params, CONFIG, stream, cache=cache, backend="xla")[0]


@given(seed=seeds)
def test_segments_are_separate_sequences(params, seed):
    """Four tokens of prefix (segment 0), then questions of four and three tokens side by side in one sequence."""
    x = states(seed)
    order = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6]] * B, jnp.int32)
    segment = jnp.asarray([[0] * 4 + [1] * 4 + [2] * 3] * B, jnp.int32)
    packed = run_stream(params, Stream(x, order, order, segment))
    for own in (np.r_[0:8], np.r_[0:4, 8:11]):
        expected = dense(params, x[:, own], [len(own)] * B).hidden[-1]
        np.testing.assert_allclose(np.asarray(packed)[:, own], expected, atol=TOLERANCE)


def test_segments_on_a_cache_see_all_of_it(params):
    x = states(5)
    _, cache, _, _ = run(params, x[:, :5], np.array([5, 4], np.int32), capacity=16)
    order = jnp.asarray([[5, 6, 5], [4, 5, 4]], jnp.int32)
    segment = jnp.asarray([[1, 1, 2]] * B, jnp.int32)
    stream = Stream(x[:, 5:8], order, order, segment)
    packed = run_stream(params, stream, cache)
    for b, length in enumerate((5, 4)):
        for own in ([5, 6], [7]):
            alone = np.concatenate([x[b : b + 1, :length], x[b : b + 1, own]], axis=1)
            expected = dense(params, alone, [alone.shape[1]]).hidden[-1][0, length:]
            np.testing.assert_allclose(np.asarray(packed)[b, np.array(own) - 5], expected, atol=TOLERANCE)


def test_a_cache_of_other_layers_is_refused(params):
    """Prefill stopped at layer 2 keeps two layers of keys; a full pass over them would read the wrong ones."""
    _, cache, _, _ = run(params, states(0), LENGTHS, spec=ReadSpec(stop=2), capacity=16)
    token = right_padded(jnp.zeros((B, 1, CONFIG.width)), jnp.ones(B, jnp.int32), cache.length)
    with pytest.raises(JaxVQAError, match="2 layers"):
        run_stream(params, token, cache)


def test_a_capacity_below_the_prompt_is_refused(params):
    with pytest.raises(JaxVQAError, match="capacity 4 is below the 11 tokens"):
        run(params, states(0), LENGTHS, capacity=4)


# ---- companions ----


@settings(max_examples=6)
@given(seed=seeds, order=st.permutations(range(4)))
def test_companions_and_position_do_not_change_a_bit_of_a_row(params, seed, order):
    """At one batch size. Prefill and a decode step; lengths are companions too."""
    rng = np.random.default_rng(seed)
    x, step, lengths = states(seed, rows=4), states(seed + 1, 1, rows=4), rng.integers(1, T + 1, 4).astype(np.int32)

    def both(x, step, lengths):
        hidden, cache, _, logits = run(params, x, lengths, capacity=16)
        return hidden, logits, extended(params, step, cache)

    base = both(x, step, lengths)
    other, others_lengths = states(seed + 2, rows=4), rng.integers(1, T + 1, 4).astype(np.int32)
    at = order.index(0)
    moved = np.stack([x[0] if i == at else other[i] for i in range(4)])
    moved_step = np.stack([step[0] if i == at else other[i, :1] for i in range(4)])
    others_lengths[at] = lengths[0]
    for a, b in zip(base, both(moved, moved_step, others_lengths), strict=True):
        a, b = np.asarray(a)[0], np.asarray(b)[at]
        rows = slice(0, lengths[0]) if len(a) == T else slice(None)
        np.testing.assert_array_equal(a[rows], b[rows])


@jax.jit
def extended(params, x, cache):
    stream = right_padded(x, jnp.ones(len(x), jnp.int32), cache.length)
    return decoder.run(params, CONFIG, stream, cache=cache, backend="xla")[0]


# ---- memory ----

LONG = 521
MEMORY = replace(CONFIG, num_heads=4, num_kv_heads=2, head_dim=16, width=32, mlp_width=48, num_layers=3)
"""Sizes at which every legitimate array, a chunk's scores included (128·521·4), is smaller than 521·521."""
READ = ReadSpec(layers=(0, 1, 2), read=frozenset({"rows", "values"}), heads="all")


def long_program(backend, kind):
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32),
        decoder.specs(MEMORY),
        is_leaf=lambda s: hasattr(s, "axes"),
    )
    x = jax.ShapeDtypeStruct((1, LONG, MEMORY.width), jnp.float32)
    rows, lengths = jnp.asarray([[LONG - 1, 40]], jnp.int32), jnp.asarray([LONG], jnp.int32)

    def plain(params, x, spec=ReadSpec(), edits=()):
        stream = right_padded(x, lengths)
        out = decoder.run(params, MEMORY, stream, taps=Taps(edits, rows), spec=spec, capacity=LONG, backend=backend)
        return out[0], out[1:3]

    def gradient(params, x):
        def score(perturb):
            hidden, rest = plain(params, x, READ, (Edit(Tap(perturb=perturb), 0, 1),))
            return decoder.finish(params, MEMORY, hidden[:, -1:])[0, 0, 7], rest

        return jax.value_and_grad(score, has_aux=True)(jnp.zeros((1, 1, 2, 4, 16)))

    program = {"plain": plain, "readout": functools.partial(plain, spec=READ), "gradient": gradient}[kind]
    return jax.jit(program).lower(shapes, x).compile()


def large_buffers(compiled) -> set[str]:
    """Shapes of at least T·T elements that the compiled program names, fusion bodies included."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text())
    return {s for s in shapes if math.prod(map(int, s.split(","))) >= LONG * LONG}


@pytest.mark.parametrize("kind", ["plain", "readout", "gradient"])
def test_the_chunked_backend_holds_no_square_of_the_sequence(kind, measured):
    compiled = long_program("xla_chunked", kind)
    assert not large_buffers(compiled)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    measured(f"chunked {kind}: temporary bytes / (4·T²)", temporary / (4 * LONG**2))
    # A chunk's scores are about one square here, of which a backward step needs several at a time; the probabilities
    # of the two layers above the perturbation, kept for the backward pass, would be 8 more.
    assert temporary < (10 if kind == "gradient" else 3) * 4 * LONG**2


def test_a_readout_adds_no_square_to_the_plain_backend():
    plain, readout = long_program("xla", "plain"), long_program("xla", "readout")
    assert large_buffers(plain) and large_buffers(readout) == large_buffers(plain)
    temporary = [c.memory_analysis().temp_size_in_bytes for c in (plain, readout)]
    assert temporary[1] - temporary[0] < 4 * LONG**2


# ---- configuration ----


def test_the_config_is_frozen_hashable_and_shared_by_equal_ones():
    with pytest.raises(AttributeError):
        CONFIG.width = 3
    assert hash(CONFIG) == hash(replace(CONFIG)) and CONFIG == replace(CONFIG)
    traces = []
    f = jax.jit(lambda config, x: traces.append(config) or x)
    f(CONFIG, 1), f(replace(CONFIG), 2)
    assert len(traces) == 1


def test_an_unsupported_config_lists_every_fault():
    hf = dict(
        model_type="qwen2", hidden_act="relu", use_sliding_window=True, rope_scaling=dict(rope_type="yarn", factor=4)
    )
    with pytest.raises(JaxVQAError) as error:
        DecoderConfig.from_hf(hf)
    for fault in ("yarn", "use_sliding_window", "relu"):
        assert fault in str(error.value)
    with pytest.raises(JaxVQAError, match="'gemma' is not supported"):
        DecoderConfig.from_hf(dict(model_type="gemma"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [(ReadSpec(stop=5), "not a range"), (ReadSpec(layers=(3,), read=frozenset({"rows"}), stop=3), r"cannot read .*3")],
)
def test_layers_that_do_not_run_are_refused(params, spec, message):
    with pytest.raises(JaxVQAError, match=message):
        run(params, states(0), LENGTHS, spec=spec)
