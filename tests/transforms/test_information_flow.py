"""VIF's injection as written against NumPy loops, and the tap that a decoder runs against the injection as written."""

import jax
import jax.numpy as jnp
import numpy as np
from batched import assert_batched
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa import decoder
from jaxvqa.attention import NEVER
from jaxvqa.taps import Edit, Tap
from jaxvqa.transforms.information_flow import information_flow as not_compiled
from jaxvqa.transforms.information_flow import inject

information_flow = jax.jit(not_compiled, static_argnames="keys")

T, P, N = 11, 3, 2
STARTS = (2, 7)
"""Two images of three cells, with text before, between and behind them; a sample may have fewer."""
seeds = st.integers(0, 2**31 - 1)
counts = st.integers(0, 2)


def prompt(rng, count):
    """Maps [2, P] and cells [2, P] of a prompt with `count` images, and its text rows [T]."""
    maps = rng.random((2, P)).astype(np.float32) + 0.05
    maps /= maps.sum(-1, keepdims=True)
    cells = np.stack([np.arange(P, dtype=np.int32) + start for start in STARTS])
    cells[count:] = -1
    rows = np.ones(T, bool)
    rows[cells[:count].ravel()] = False
    return maps, cells, rows


def causal_attention(rng):
    """Probabilities [N, T, T] under a causal mask [T, T]."""
    visible = np.tril(np.ones((T, T), bool))
    attention = np.where(visible, rng.random((N, T, T)) + 0.01, 0)
    return (attention / attention.sum(-1, keepdims=True)).astype(np.float32), visible


def reference(attention, maps, cells, rows, visible, alpha, count):
    """Eq. 6-7 cell by cell in float64: mix, hide, renormalise; each image weighs α / (number of images)."""
    out = attention.astype(np.float64)
    for n, t in np.ndindex(out.shape[:2]):
        if not rows[t] or not count:
            continue
        row = (1 - alpha) * out[n, t]
        for i in range(count):
            for p in range(P):
                row[cells[i, p]] += alpha / count * np.float64(maps[i, p])
        row[~visible[t]] = 0
        if row.sum() > 0:
            out[n, t] = row / row.sum()
    return out


def over_keys(maps, cells):
    out = np.zeros((len(maps), T), np.float32)
    for image, positions, values in zip(out, cells, maps, strict=True):
        image[positions[positions >= 0]] = values[positions >= 0]
    return out


@given(seeds, counts, st.floats(0, 1))
def test_the_injection_is_the_equation(seed, count, alpha):
    rng = np.random.default_rng(seed)
    maps, cells, rows = prompt(rng, count)
    attention, visible = causal_attention(rng)
    weights = np.float32([alpha / count if i < count else 0 for i in range(2)])
    ours = np.asarray(inject(attention, over_keys(maps, cells), weights, rows, visible))
    expected = reference(attention, maps, cells, rows, visible, alpha, count)
    # Where next to nothing is left to renormalise, what is left of 1 - α is its rounding.
    np.testing.assert_allclose(ours, expected, atol=1e-6 if alpha < 0.99 else 1e-4)


@given(seeds, counts, st.floats(0, 0.95))
def test_the_tap_is_the_injection(seed, count, alpha):
    """With one-hot values the outputs of an attention are its probabilities."""
    rng = np.random.default_rng(seed)
    maps, cells, rows = prompt(rng, count)
    attention, visible = causal_attention(rng)
    mix = information_flow(maps[None], cells[None], T, alpha=alpha, rows=rows[None])
    got = mixed_by_the_decoder(attention, mix)
    np.testing.assert_allclose(got, reference(attention, maps, cells, rows, visible, alpha, count), atol=2e-6)
    written = inject(attention[None], mix.maps[0], mix.alpha[0], rows[None], visible[None])[0]
    np.testing.assert_allclose(got, written, atol=2e-6)


@jax.jit
def mixed_by_the_decoder(attention, mix):
    """Probabilities [N, T, T] after the tap of one sample."""
    out = attention.transpose(1, 0, 2)[None]  # [B, T, N, H = S]
    values = jnp.broadcast_to(jnp.eye(T)[None, :, None, :], (1, T, N, T))
    order = jnp.arange(T, dtype=jnp.int32)[None]
    tap = Edit(Tap(mix=mix), 0, 1).at(0)
    return decoder._mix(out, values, order, tap.mix)[0].transpose(1, 0, 2)


def test_the_injection_of_the_paper_in_numbers():
    """VIF, analytic test values: S = 4, image columns 1 and 2, M = [0.75, 0.25], α = 0.5."""
    attention = np.float32([[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.4, 0.3, 0.2, 0.1]]])
    rows, visible = np.array([1, 0, 0, 1], bool), np.tril(np.ones((4, 4), bool))
    mix = information_flow(np.float32([[0.75, 0.25]]), np.int32([[1, 2]]), 4, rows=rows)
    ours = inject(attention, mix.maps[0], mix.alpha[0], rows, visible)
    expected = attention.copy()
    expected[0, 3] = [0.2, 0.525, 0.225, 0.05]
    np.testing.assert_allclose(ours, expected, atol=1e-7)


@given(seeds, counts, st.floats(0, 1))
def test_rows_sum_to_one_hidden_keys_stay_hidden_and_other_rows_as_they_are(seed, count, alpha):
    rng = np.random.default_rng(seed)
    maps, cells, rows = prompt(rng, count)
    attention, visible = causal_attention(rng)
    mix = information_flow(maps, cells, T, alpha=alpha)
    ours = np.asarray(inject(attention, mix.maps[0], mix.alpha[0], rows, visible))
    np.testing.assert_allclose(ours.sum(-1), np.ones((N, T)), atol=1e-6)
    assert (ours[:, ~visible] == 0).all() and np.isfinite(ours).all()
    np.testing.assert_array_equal(ours[:, ~rows], attention[:, ~rows])


@given(seeds)
def test_alpha_zero_and_a_prompt_without_images_change_nothing(seed):
    rng = np.random.default_rng(seed)
    attention, visible = causal_attention(rng)
    for count, alpha in ((2, 0.0), (0, 0.5)):
        maps, cells, rows = prompt(rng, count)
        mix = information_flow(maps[None], cells[None], T, alpha=alpha, rows=rows[None])
        np.testing.assert_array_equal(mix.alpha, np.zeros((1, 1, 2)))
        np.testing.assert_allclose(mixed_by_the_decoder(attention, mix), attention, atol=1e-7)
        written = inject(attention, mix.maps[0, 0], mix.alpha[0, 0], rows, visible)
        np.testing.assert_allclose(written, attention, atol=3e-7)


def test_images_share_alpha_and_an_absent_one_has_none():
    maps, cells, rows = prompt(np.random.default_rng(0), 2)
    two = information_flow(maps, cells, T, alpha=0.6, rows=rows)
    np.testing.assert_allclose(two.alpha, [[0.3, 0.3]])
    np.testing.assert_array_equal(two.last, [4, 9])
    _, fewer, _ = prompt(np.random.default_rng(0), 1)
    one = information_flow(maps, fewer, T, alpha=0.6)
    np.testing.assert_allclose(one.alpha, [[0.6, 0]])
    np.testing.assert_array_equal(one.last, [4, NEVER])
    np.testing.assert_array_equal(one.maps[0, 1], np.zeros(T))
    assert one.rows is None


def test_cells_need_not_be_neighbours():
    """Rows of two cells, each closed by a newline token: the newline gets nothing."""
    mix = information_flow(np.full((1, 4), 0.25, np.float32), np.int32([[1, 2, 4, 5]]), 8)
    np.testing.assert_array_equal(mix.maps, [[[0, 0.25, 0.25, 0, 0.25, 0.25, 0, 0]]])
    np.testing.assert_array_equal(mix.last, [5])


@given(seeds, st.permutations(range(3)))
def test_injections_of_a_batch_do_not_mix(seed, order):
    maps, cells, rows, attention, visible = batch(seed)
    alpha = np.float32([[0.2, 0.3], [0, 0], [0.5, 0]])
    keys = np.stack([over_keys(m, c) for m, c in zip(maps, cells, strict=True)])
    assert_batched(inject, attention, keys, alpha, rows, visible, order=order, atol=1e-6)


def batch(seed):
    """Prompts with two images, none and one, and an attention each."""
    rng = np.random.default_rng(seed)
    samples = [(*prompt(rng, count), *causal_attention(rng)) for count in (2, 0, 1)]
    return [np.stack(x) for x in zip(*samples, strict=True)]


def test_the_taps_of_a_batch_are_those_of_its_samples():
    """Layers come first in a tap, then the batch; `jax.vmap` puts the batch first."""
    maps, cells, rows, *_ = batch(0)
    whole = information_flow(maps, cells, T, rows=rows)
    vmapped = jax.vmap(lambda m, c, r: not_compiled(m, c, T, rows=r))(maps, cells, rows)
    jax.tree.map(np.testing.assert_array_equal, not_compiled(maps, cells, T, rows=rows), whole)
    for i in range(3):
        one = information_flow(maps[i], cells[i], T, rows=rows[i])
        for name in ("alpha", "maps"):
            np.testing.assert_array_equal(getattr(whole, name)[:, i], getattr(one, name))
            np.testing.assert_array_equal(getattr(vmapped, name)[i], getattr(one, name))
        for name in ("last", "rows"):
            np.testing.assert_array_equal(getattr(whole, name)[i], getattr(one, name))
            np.testing.assert_array_equal(getattr(vmapped, name)[i], getattr(one, name))


def test_half_precision_attention_is_mixed_in_float32():
    rng = np.random.default_rng(0)
    maps, cells, rows = prompt(rng, 2)
    attention, visible = causal_attention(rng)
    mix = information_flow(maps, cells, T)
    rounded = attention.astype(jnp.bfloat16)
    ours = inject(jnp.asarray(rounded), mix.maps[0], mix.alpha[0], rows, visible)
    assert ours.dtype == jnp.float32
    exact = inject(attention, mix.maps[0], mix.alpha[0], rows, visible)
    np.testing.assert_allclose(ours, exact, rtol=2**-7)  # bf16 keeps 8 bits
