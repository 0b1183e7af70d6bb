"""Heat maps as distributions, and the fusion that min-max normalisation is for."""

import jax.numpy as jnp
import numpy as np
import pytest
from batched import assert_batched
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxvqa.transforms.normalise import distribution, minmax

finite = st.floats(width=32, allow_infinity=False, allow_nan=False)


@given(st.sampled_from([(3, 5), (1, 1)]).flatmap(lambda s: arrays(np.float32, s, elements=finite)))
def test_a_distribution_is_the_positive_part_over_its_sum(heatmap):
    ours = np.asarray(distribution(heatmap))
    assert ours.dtype == np.float32 and (ours >= 0).all()
    assert ours.sum() == pytest.approx(1, rel=1e-6)
    positive = np.maximum(heatmap.astype(np.float64), 0)
    if positive.max() < np.finfo(np.float32).tiny:
        positive[:] = 1
    np.testing.assert_allclose(ours, positive / positive.sum(), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("value", [0.0, -2.0, 3e38, 1e-40])
def test_an_all_equal_map_is_the_uniform_distribution(value):
    np.testing.assert_allclose(distribution(np.full((2, 3), value, np.float32)), np.full((2, 3), 1 / 6), rtol=1e-6)


@given(arrays(np.float32, (3, 3, 5), elements=finite), st.permutations(range(3)))
def test_maps_of_a_batch_do_not_mix(maps, order):
    assert_batched(distribution, maps, order=order, atol=1e-37)
    assert_batched(minmax, maps, order=order, atol=1e-7)


def test_half_precision_maps_are_normalised_in_float32():
    rounded = np.random.default_rng(0).standard_normal((4, 3)).astype(jnp.bfloat16)
    for function in (distribution, minmax):
        np.testing.assert_array_equal(function(jnp.asarray(rounded)), function(rounded.astype(np.float32)))


def test_the_largest_range_is_scaled_like_any_other():
    heatmap = np.float32([[-3e38, 3e38, 0]])
    np.testing.assert_allclose(minmax(heatmap), [[0, 1, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(distribution(heatmap / 2 + np.float32(1.5e38)), [[0, 2 / 3, 1 / 3]], rtol=1e-6)


def test_the_fusion_of_hiperson():
    """HiPerson, analytic test values, and its Eq. 5: a constant map adds nothing."""
    one, other = np.float32([[1, 2], [3, 5]]), np.float32([[0, 4], [2, 4]])
    np.testing.assert_array_equal(minmax(one) + minmax(other), [[0, 1.25], [1, 2]])
    np.testing.assert_array_equal(minmax(one) + minmax(np.ones((2, 2), np.float32)), minmax(one))
