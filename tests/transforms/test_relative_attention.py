"""The ratio of two attention maps, and min-max normalisation, against NumPy and by their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxvqa.transforms import minmax, relative_attention

SHAPES = [(3, 5), (1, 1), (2, 4, 3)]  # few, because each compiles
TINY = np.finfo(np.float32).tiny

probability = st.floats(0, 1, width=32)
non_negative = st.floats(0, width=32, allow_infinity=False, allow_nan=False)


def pairs(elements):
    return st.sampled_from(SHAPES).flatmap(lambda s: st.tuples(*[arrays(np.float32, s, elements=elements)] * 2))


def reference(question, neutral, eps=0.0):
    """Cell by cell in float64."""
    out = np.zeros(question.shape)
    for at in np.ndindex(question.shape):
        below = np.float32(neutral[at] + np.float32(eps))
        out[at] = min(float(question[at]) / float(below), np.finfo(np.float32).max) if below >= TINY else 0
    return out


@given(pairs(probability), st.sampled_from([0.0, 1e-8]))
def test_it_is_the_quotient_of_the_maps(maps, eps):
    ours = relative_attention(*maps, eps=eps)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, reference(*maps, eps), rtol=3e-7, atol=TINY)


@given(pairs(non_negative))
def test_it_is_finite_and_non_negative_for_every_finite_input(maps):
    ours = np.asarray(relative_attention(*maps))
    assert np.isfinite(ours).all() and (ours >= 0).all()


def test_a_cell_without_reference_attention_is_zero():
    question = np.float32([[0.5, 0, 0.5]])
    neutral = np.float32([[0, 0, 0.25]])
    assert np.asarray(relative_attention(question, neutral)).tolist() == [[0, 0, 2]]


def test_the_epsilon_of_hiperson_bounds_the_ratio():
    ours = relative_attention(np.float32([[1e-3]]), np.float32([[0]]), eps=1e-8)
    assert float(ours[0, 0]) == pytest.approx(1e5, rel=1e-6)


@given(pairs(st.floats(2**-7, 1, width=32)), st.floats(0.125, 8, width=32))
def test_equal_maps_give_ones_and_a_factor_passes_through(maps, factor):
    question, neutral = maps
    np.testing.assert_array_equal(relative_attention(question, question), np.ones(question.shape))
    scaled = relative_attention(question * np.float32(factor), neutral)
    np.testing.assert_allclose(scaled, relative_attention(question, neutral) * factor, rtol=1e-6)


@given(arrays(np.float32, (2, 4, 3, 5), elements=probability), st.permutations(range(4)))
def test_rows_of_a_batch_do_not_mix(maps, order):
    question, neutral = maps
    whole = np.asarray(relative_attention(question, neutral))
    np.testing.assert_array_equal(relative_attention(question[order], neutral[order]), whole[order])
    rows = [np.asarray(relative_attention(q, n)) for q, n in zip(question, neutral, strict=True)]
    np.testing.assert_array_equal(whole, rows)
    np.testing.assert_array_equal(jax.vmap(relative_attention)(question, neutral), rows)


@given(pairs(probability))
def test_compiled_and_not_compiled_agree(maps):
    np.testing.assert_array_equal(jax.jit(relative_attention)(*maps), relative_attention(*maps))
    np.testing.assert_array_equal(jax.jit(minmax)(maps[0]), minmax(maps[0]))


def test_half_precision_maps_are_divided_in_float32():
    question, neutral = jnp.full((2, 2), 0.3, jnp.bfloat16), jnp.full((2, 2), 0.7, jnp.bfloat16)
    expected = np.float32(question) / np.float32(neutral)
    np.testing.assert_array_equal(relative_attention(question, neutral), expected)


finite = st.floats(width=32, allow_infinity=False, allow_nan=False)


@given(arrays(np.float32, (3, 5), elements=finite))
def test_minmax_spans_zero_to_one(heatmap):
    ours = np.asarray(minmax(heatmap))
    assert ours.dtype == np.float32 and np.isfinite(ours).all() and ours.min() == 0
    spread = float(heatmap.max()) - float(heatmap.min())
    if spread > 1e-30:
        expected = (heatmap.astype(np.float64) - heatmap.min()) / spread
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30])
def test_minmax_of_a_constant_map_is_zero(value):
    np.testing.assert_array_equal(minmax(np.full((4, 2), value, np.float32)), np.zeros((4, 2)))


def test_minmax_scales_each_map_of_a_batch_by_itself():
    maps = np.float32([[[0, 1], [2, 4]], [[10, 10], [10, 20]]])
    np.testing.assert_array_equal(minmax(maps), [[[0, 0.25], [0.5, 1]], [[0, 0], [0, 1]]])
