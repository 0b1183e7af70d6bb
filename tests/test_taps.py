"""Edits and plugins inside a whole model, against the dense float64 reference with rewritten probabilities."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CONFIG, causal, dense, parameters

from jaxvqa import decoder
from jaxvqa.attention import MASKED
from jaxvqa.decoder import right_padded
from jaxvqa.errors import JaxVQAError
from jaxvqa.taps import Edit, Mix, Plugin, ReadSpec, Tap, Taps

B, T, L, N = 2, 14, CONFIG.num_layers, CONFIG.num_heads
LENGTHS = np.array([14, 12], np.int32)
VALID = np.arange(T) < LENGTHS[:, None]
TOLERANCE = 3e-5
"""f32 through four blocks with states of size 10, against float64."""
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def params():
    return parameters()


def states(rng, length=T):
    return rng.standard_normal((B, length, CONFIG.width)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("capacity", "backend", "remat"))
def run(params, x, lengths, taps=Taps(), spec=ReadSpec(), plugins=(), capacity=None, backend="xla", remat=False):
    """Hidden states of the last layer, cache, readouts, plugins."""
    stream = right_padded(x, lengths)
    return decoder.run(
        params, CONFIG, stream, taps=taps, spec=spec, plugins=plugins, capacity=capacity, backend=backend, remat=remat
    )


@jax.jit
def extend(params, x, cache, taps=Taps(), plugins=()):
    stream = right_padded(x, jnp.full(len(x), x.shape[1], jnp.int32), cache.length)
    return decoder.run(params, CONFIG, stream, cache=cache, taps=taps, plugins=plugins, backend="xla")


def assert_valid_equal(got, expected):
    np.testing.assert_allclose(np.asarray(got)[VALID], np.asarray(expected)[VALID], atol=TOLERANCE)


# ---- key bias ----


@pytest.mark.parametrize("heads", [1, N], ids=["shared", "by-head"])
@given(seed=seeds, lam=st.floats(0.05, 20))
def test_a_ranged_key_bias_is_a_power_of_lambda_renormalised(params, heads, seed, lam):
    """Layers 1 and 2 in one scan, each with its own strength."""
    rng = np.random.default_rng(seed)
    x, weight = states(rng), rng.random((2, B, heads, T))
    weight[:, :, :, 9] = 0
    bias = jnp.asarray(np.log(lam) * weight, jnp.float32)

    def change(layer, probs):
        if layer not in (1, 2):
            return probs
        probs = probs * lam ** weight[layer - 1][:, :, None, :]
        return probs / probs.sum(axis=-1, keepdims=True)

    got = run(params, x, LENGTHS, Taps((Edit(Tap(key_bias=bias), 1, 3),)))[0]
    assert_valid_equal(got, dense(params, x, LENGTHS, change=change).hidden[-1])


@given(seed=seeds)
def test_lambda_zero_hides_the_keys(params, seed):
    rng = np.random.default_rng(seed)
    x, hidden = states(rng), np.arange(3, 7)
    bias = np.zeros((1, B, 1, T), np.float32)
    bias[..., hidden] = MASKED

    def change(layer, probs):
        probs = probs.copy()
        probs[..., hidden] = 0
        return probs / probs.sum(axis=-1, keepdims=True)

    got = run(params, x, LENGTHS, Taps((Edit(Tap(key_bias=jnp.asarray(bias)), 0, L),)))[0]
    assert_valid_equal(got, dense(params, x, LENGTHS, change=change).hidden[-1])


def everything(rng):
    """One edit of every kind for layers 1..2, with values of each layer's own."""
    maps, last, rows = images(rng, 2)
    mix = Mix(jnp.asarray(0.4 * rng.random((2, B, 2)), jnp.float32), maps, last, rows)
    bias = jnp.asarray(rng.standard_normal((2, B, 1, T)), jnp.float32)
    perturb = jnp.asarray(rng.standard_normal((2, B, 1, N, CONFIG.head_dim)), jnp.float32)
    return Tap(bias, mix, perturb)


def one_layer(tap, i):
    tap = jax.tree.map(lambda x: x[i : i + 1] if x.ndim > 2 else x, tap)
    return tap


def test_a_ranged_edit_is_one_scan_and_equals_edits_layer_by_layer(params):
    rng = np.random.default_rng(7)
    x, tap = states(rng), everything(rng)
    ranged = Taps((Edit(tap, 1, 3),))
    single = Taps((Edit(one_layer(tap, 0), 1, 2), Edit(one_layer(tap, 1), 2, 3)))
    one, two = run(params, x, LENGTHS, ranged)[0], run(params, x, LENGTHS, single)[0]
    np.testing.assert_allclose(np.asarray(one)[VALID], np.asarray(two)[VALID], atol=TOLERANCE)
    assert np.abs(one - run(params, x, LENGTHS)[0])[VALID].max() > 0.1
    scans = str(jax.make_jaxpr(lambda t: run(params, x, LENGTHS, t)[0])(ranged)).count("scan[")
    assert scans == 1  # layers 1..2; layers 0 and 3 are plain calls


def test_edits_of_one_layer_add_and_two_mixtures_are_refused(params):
    rng = np.random.default_rng(8)
    x, tap = states(rng), everything(rng)
    bias = Tap(key_bias=tap.key_bias[:1])
    both = run(params, x, LENGTHS, Taps((Edit(bias, 0, L), Edit(bias, 0, L))))[0]
    double = run(params, x, LENGTHS, Taps((Edit(Tap(key_bias=2 * bias.key_bias), 0, L),)))[0]
    np.testing.assert_allclose(both, double, atol=TOLERANCE)
    with pytest.raises(JaxVQAError, match="two edits mix"):
        run(params, x, LENGTHS, Taps((Edit(tap, 1, 3), Edit(tap, 1, 3))))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(Tap(), 2, 5), "the model has 4 layers"),
        (Edit(Tap(), 2, 2), "the model has 4 layers"),
        (Edit(Tap(key_bias=jnp.zeros((2, B, 1, T))), 0, 3), "expected 1 or the range"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(params, edit, message):
    with pytest.raises(JaxVQAError, match=message):
        run(params, np.zeros((B, T, CONFIG.width), np.float32), LENGTHS, Taps((edit,)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(layers=(1,), read=frozenset({"probs"})), "cannot read"),
        (dict(layers=(2, 1), read=frozenset({"rows"})), "ascending"),
        (dict(layers=(1,)), "needs both"),
        (dict(heads="max"), "'mean' or 'all'"),
    ],
)
def test_a_read_spec_that_means_nothing_is_refused(fields, message):
    with pytest.raises(JaxVQAError, match=message):
        ReadSpec(**fields)


# ---- mixture ----

IMAGES = ((2, 5), (7, 10))
"""Two images, with text before, between and behind them."""


def images(rng, layers=1):
    """Maps [layers, B, 2, T] that sum to one over each image, their last orders, and the rows of text."""
    maps = np.zeros((layers, B, 2, T), np.float32)
    for i, (a, b) in enumerate(IMAGES):
        part = rng.random((layers, B, b - a)) + 0.05
        maps[:, :, i, a:b] = part / part.sum(axis=-1, keepdims=True)
    last = np.tile(np.array([b - 1 for _, b in IMAGES], np.int32), (B, 1))
    text = np.ones((B, T), bool)
    for a, b in IMAGES:
        text[:, a:b] = False
    return jnp.asarray(maps), jnp.asarray(last), jnp.asarray(text & VALID)


def mixed(probs, alpha, maps, rows, lengths):
    """VIF's probability form: mix the maps into the rows, mask, renormalise. maps [B, I, S], rows bool [B, T]."""
    target = np.einsum("bi,bis->bs", alpha, maps)[:, None, None, :]
    new = (1 - alpha.sum(axis=-1))[:, None, None, None] * probs + target
    new = np.where(causal(lengths, probs.shape[-1])[:, None], new, 0)
    total = new.sum(axis=-1, keepdims=True)
    return np.where(rows[:, None, :, None], new / np.where(total > 0, total, 1), probs)


@given(seed=seeds)
def test_the_linear_mixture_is_the_probability_form(params, seed):
    """Several images, rows before, between and behind them, layers with maps and weights of their own."""
    rng = np.random.default_rng(seed)
    x, (maps, last, rows) = states(rng), images(rng, 3)
    alpha = (0.5 * rng.random((3, B, 2))).astype(np.float32)

    def change(layer, probs):
        if layer == 0:
            return probs
        return mixed(probs, alpha[layer - 1], np.asarray(maps[layer - 1], np.float64), np.asarray(rows), LENGTHS)

    mix = Mix(jnp.asarray(alpha), maps, last, rows)
    got = run(params, x, LENGTHS, Taps((Edit(Tap(mix=mix), 1, 4),)))[0]
    assert_valid_equal(got, dense(params, x, LENGTHS, change=change).hidden[-1])


@settings(max_examples=6)
@given(seed=seeds)
def test_a_mixture_goes_on_in_decoding(params, seed):
    """Generated rows are mixed too; the map knows only the prompt's keys."""
    rng = np.random.default_rng(seed)
    x, (maps, last, rows) = states(rng), images(rng)
    new = states(rng, 1)
    alpha = jnp.asarray([[[0.3, 0.2], [0.5, 0.1]]], jnp.float32)
    mix = Mix(alpha, maps, last, rows)
    cache = run(params, x, LENGTHS, Taps((Edit(Tap(mix=mix), 1, 3),)), capacity=T + 2)[1]
    got = extend(params, new, cache, Taps((Edit(Tap(mix=replace(mix, rows=None)), 1, 3),)))[0]

    for b, length in enumerate(LENGTHS):
        own = np.concatenate([x[b, :length], new[b]])[None]
        row = np.append(np.asarray(rows)[b, :length], True)[None]
        its_maps = np.zeros((1, 2, length + 1))
        its_maps[0, :, :length] = maps[0, b, :, :length]

        def change(layer, probs, b=b, row=row, its_maps=its_maps, length=length):
            if layer not in (1, 2):
                return probs
            return mixed(probs, np.asarray(alpha[0, b : b + 1], np.float64), its_maps, row, [length + 1])

        expected = dense(params, own, [length + 1], change=change).hidden[-1]
        np.testing.assert_allclose(got[b, 0], expected[0, -1], atol=TOLERANCE)


def test_the_mixture_of_the_paper_in_numbers():
    """S = 4, image columns 1 and 2, M = [0.75, 0.25], α = 0.5; one-hot values: outputs are probabilities."""
    A = jnp.asarray([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.4, 0.3, 0.2, 0.1]], jnp.float32)
    mix = Mix(
        jnp.asarray([[0.5]]), jnp.asarray([[[0, 0.75, 0.25, 0]]]), jnp.asarray([[2]]), jnp.asarray([[1, 0, 0, 1]], bool)
    )
    order = jnp.arange(4, dtype=jnp.int32)[None]
    out = decoder._mix(A[None, :, None, :], jnp.eye(4)[None, :, None, :], order, mix)[0, :, 0]
    expected = np.array(A)
    expected[3] = [0.2, 0.525, 0.225, 0.05]
    np.testing.assert_allclose(out, expected, atol=1e-7)


def test_alpha_zero_is_the_identity_and_alpha_one_has_finite_gradients(params):
    rng = np.random.default_rng(3)
    x, (maps, last, rows) = states(rng), images(rng)

    def total(alpha):
        taps = Taps((Edit(Tap(mix=Mix(alpha, maps, last, rows)), 1, 3),))
        hidden = run(params, x, LENGTHS, taps)[0]
        return jnp.sum(jnp.where(VALID[:, :, None], hidden, 0)), hidden

    grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, hidden), _ = grad(jnp.zeros((1, B, 2)))
    np.testing.assert_allclose(hidden, run(params, x, LENGTHS)[0], atol=TOLERANCE)
    (value, _), g = grad(jnp.full((1, B, 2), 0.5))
    assert np.isfinite(value) and np.isfinite(g).all()


# ---- perturbation and its gradient ----

ROWS = np.array([[13, 8, 4], [11, 6, 0]], np.int32)


@functools.partial(jax.jit, static_argnames=("layer", "backend", "remat"))
def gradient(params, x, weight, layer, backend, remat):
    """Of a score of the last tokens' states, with respect to the head outputs at ROWS; and the layer's readouts."""
    spec = ReadSpec(layers=(layer,), read=frozenset({"values", "rows"}), heads="all")

    def score(perturb):
        taps = Taps((Edit(Tap(perturb=perturb), layer, layer + 1),), jnp.asarray(ROWS))
        hidden, _, read, _ = run(params, x, jnp.asarray(LENGTHS), taps, spec, backend=backend, remat=remat)
        last = jnp.take_along_axis(hidden, jnp.asarray(LENGTHS)[:, None, None] - 1, axis=1)[:, 0]
        return jnp.sum(last * weight), read

    return jax.grad(score, has_aux=True)(jnp.zeros((1, B, ROWS.shape[1], N, CONFIG.head_dim)))


@pytest.mark.parametrize(("backend", "remat"), [("xla", False), ("xla_chunked", True)])
@settings(max_examples=4)
@given(seed=seeds)
def test_the_gradient_of_a_perturbation_is_the_gradient_of_the_probabilities(params, backend, remat, seed):
    """dL/dA = dL/dO · Vᵀ, against central differences of the dense model along random directions of A.

    The identity is the gradient with respect to probabilities that are not renormalised, so it is non-zero at masked
    keys too, where A is zero: what is summed over keys must be multiplied by A or by the mask.
    """
    rng, layer = np.random.default_rng(seed), 1
    x = states(rng)
    weight = rng.standard_normal((B, CONFIG.width)).astype(np.float32)
    g, read = gradient(params, x, weight, layer, backend, remat)
    groups = N // CONFIG.num_kv_heads
    dA = np.einsum("brnh,bsnh->bnrs", g[0], np.repeat(read.values[0], groups, axis=2))

    def dense_score(direction, step):
        def change(i, probs):
            if i != layer:
                return probs
            probs = probs.copy()
            for b in range(B):
                probs[b][:, ROWS[b]] += step * direction[b]
            return probs

        hidden = dense(params, x, LENGTHS, change=change).hidden[-1]
        return sum(hidden[b, LENGTHS[b] - 1] @ weight[b] for b in range(B))

    seen = np.stack([causal(LENGTHS, T)[b][ROWS[b]] for b in range(B)])[:, None]
    assert (np.asarray(read.rows[0])[np.broadcast_to(~seen, dA.shape)] == 0).all()
    for direction in (rng.standard_normal(dA.shape) * seen, rng.standard_normal(dA.shape) * VALID[:, None, None, :]):
        numeric = (dense_score(direction, 1e-4) - dense_score(direction, -1e-4)) / 2e-4
        assert abs(np.sum(dA * direction) - numeric) <= 1e-4 * (1 + abs(numeric))
    assert np.abs(dA * ~seen * VALID[:, None, None, :]).max() > 1e-3


def test_a_perturbation_moves_the_output_as_its_gradient_says(params):
    """Finite differences of the tapped program itself, in the perturbation and without the dense reference."""
    rng = np.random.default_rng(5)
    x = states(rng)

    @jax.jit
    @jax.value_and_grad
    def score(perturb):
        hidden = run(params, x, LENGTHS, Taps((Edit(Tap(perturb=perturb), 1, 3),), jnp.asarray(ROWS)))[0]
        return jnp.sum(hidden[0, 13] - hidden[1, 11])

    zero = np.zeros((2, B, ROWS.shape[1], N, CONFIG.head_dim), np.float32)
    direction = rng.standard_normal(zero.shape).astype(np.float32)
    _, g = score(zero)
    numeric = (score(1e-2 * direction)[0] - score(-1e-2 * direction)[0]) / 2e-2
    np.testing.assert_allclose(np.sum(g * direction), numeric, rtol=2e-3)


# ---- plugins ----


def add_vector(params, cut, stream, carry):
    """Adds a vector to every state and counts its calls."""
    return replace(stream, hidden=stream.hidden + params), carry + 1, ()


def bias_keys(params, cut, stream, carry):
    """Returns an edit of layers 2..3; the carry keeps the bias of the prompt's keys for decoding."""
    return stream, carry, (Edit(Tap(key_bias=carry), 2, 4),)


def test_a_plugin_that_adds_a_vector_acts_at_its_cuts(params):
    rng = np.random.default_rng(11)
    x, vector = states(rng), rng.standard_normal(CONFIG.width).astype(np.float32)
    plugin = Plugin(add_vector, (0, 2), jnp.asarray(vector), jnp.int32(0))
    hidden, cache, _, (after,) = run(params, x, LENGTHS, plugins=(plugin,), capacity=T + 2)
    half = run(params, x + vector, LENGTHS, spec=ReadSpec(stop=2))[0]
    expected = run(params, half + vector, LENGTHS, spec=ReadSpec(start=2))[0]
    np.testing.assert_allclose(np.asarray(hidden)[VALID], np.asarray(expected)[VALID], atol=TOLERANCE)
    assert after.carry == 2 and after.step is add_vector
    # The carry leaves prefill and enters decode.
    _, _, _, (later,) = extend(params, states(rng, 1), cache, plugins=(after,))
    assert later.carry == 4


def test_a_plugin_that_returns_an_edit_is_that_edit(params):
    """In prefill and, through its carry, in decoding."""
    rng = np.random.default_rng(12)
    x, new = states(rng), states(rng, 1)
    bias = jnp.asarray(rng.standard_normal((1, B, 1, T)), jnp.float32)
    plugin = Plugin(bias_keys, (1,), None, bias)
    taps = Taps((Edit(Tap(key_bias=bias), 2, 4),))
    hidden, cache, _, after = run(params, x, LENGTHS, plugins=(plugin,), capacity=T + 2)
    expected, other, _, _ = run(params, x, LENGTHS, taps, capacity=T + 2)
    np.testing.assert_allclose(hidden, expected, atol=TOLERANCE)
    step = extend(params, new, cache, plugins=after)[0]
    np.testing.assert_allclose(step, extend(params, new, other, taps)[0], atol=TOLERANCE)
    assert np.abs(step - extend(params, new, other)[0]).max() > 1e-3


def test_a_plugin_cut_outside_the_model_is_refused(params):
    with pytest.raises(JaxVQAError, match="plugin cuts"):
        run(params, np.zeros((B, T, CONFIG.width), np.float32), LENGTHS, plugins=(Plugin(add_vector, (4,)),))
