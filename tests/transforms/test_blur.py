"""Gaussian blur and average pooling against NumPy loops, SciPy, and by their properties."""

import jax.numpy as jnp
import numpy as np
import pytest
from batched import assert_batched
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from jaxvqa.errors import JaxVQAError
from jaxvqa.transforms.blur import average_pool, blur_weights, gaussian_blur, pool_weights

SHAPES = [(6, 9), (1, 4), (1, 1)]
cells = st.floats(-8, 8, width=32)
finite = st.floats(width=32, allow_infinity=False, allow_nan=False)


def maps(elements=cells):
    return st.sampled_from(SHAPES).flatmap(lambda s: arrays(np.float32, s, elements=elements))


def blurred(heatmap, sigma, radius):
    """The definition: weights by distance, the map unfolded by reflection with the edge repeated."""
    wide = np.pad(heatmap.astype(np.float64), radius, mode="symmetric")
    out = np.zeros(heatmap.shape)
    total = 0.0
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            weight = np.exp(-(dx**2 + dy**2) / (2 * sigma**2))
            total += weight
            out += weight * wide[radius + dy :, radius + dx :][: heatmap.shape[0], : heatmap.shape[1]]
    return out / total


@given(maps(), st.sampled_from([(0.7, 4.0), (1.0, 4.0), (2.0, 1.0)]))
def test_the_blur_is_the_gaussian_filter_with_a_reflected_border(heatmap, kernel):
    sigma, truncate = kernel
    ours = gaussian_blur(heatmap, sigma, truncate)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, blurred(heatmap, sigma, int(truncate * sigma + 0.5)), atol=4e-6)
    theirs = ndimage.gaussian_filter(heatmap.astype(np.float64), sigma, truncate=truncate, mode="reflect")
    np.testing.assert_allclose(ours, theirs, atol=4e-6)


@given(maps())
def test_the_blur_keeps_the_sum_and_stays_within_the_range(heatmap):
    ours = np.asarray(gaussian_blur(heatmap))
    assert ours.sum() == pytest.approx(heatmap.sum(), abs=1e-4)
    assert heatmap.min() <= ours.min() and ours.max() <= heatmap.max()


@given(maps(finite))
def test_blur_and_pooling_are_finite_for_every_finite_map(heatmap):
    for ours in (gaussian_blur(heatmap), average_pool(heatmap, 2)):
        assert np.isfinite(ours).all()


@pytest.mark.parametrize("value", [0.1, -7.3, 3.4e38])
def test_all_equal_cells_stay_exactly_as_they_are(value):
    heatmap = np.full((7, 5), value, np.float32)
    np.testing.assert_array_equal(gaussian_blur(heatmap), heatmap)
    np.testing.assert_array_equal(average_pool(heatmap, 3), heatmap[:2, :1])


def test_a_blur_of_zero_cells_and_blocks_of_one_are_the_identity():
    heatmap = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    np.testing.assert_array_equal(gaussian_blur(heatmap, 0), heatmap)
    np.testing.assert_array_equal(average_pool(heatmap, 1), heatmap)


def test_the_blur_of_a_cell_far_from_the_border_moves_with_the_cell():
    one = np.zeros((12, 14), np.float32)
    one[5, 5] = 1
    moved = np.roll(one, (1, 3), (0, 1))
    np.testing.assert_allclose(gaussian_blur(moved), np.roll(gaussian_blur(one), (1, 3), (0, 1)), atol=1e-7)


@given(maps(), st.sampled_from([2, 3]))
def test_pooling_is_the_mean_of_whole_blocks(heatmap, factor):
    h, w = heatmap.shape
    fh, fw = min(factor, h), min(factor, w)
    expected = np.zeros((h // fh, w // fw))
    for y, x in np.ndindex(expected.shape):
        expected[y, x] = heatmap[y * fh : (y + 1) * fh, x * fw : (x + 1) * fw].astype(np.float64).mean()
    np.testing.assert_allclose(average_pool(heatmap, factor), expected, atol=2e-6)


@pytest.mark.parametrize(("native", "halved"), [((57, 114), (28, 57)), ((68, 96), (34, 48)), ((75, 86), (37, 43))])
def test_the_grids_of_focus_lose_their_odd_rows_and_columns(native, halved):
    """FOCUS, section 4: relevance maps of LLaVA-OneVision."""
    heatmap = np.zeros(native, np.float32)
    heatmap[2 * halved[0] :] = heatmap[:, 2 * halved[1] :] = 1
    np.testing.assert_array_equal(average_pool(heatmap, 2), np.zeros(halved))


def pooled(heatmap):
    return average_pool(heatmap, 2)


@given(arrays(np.float32, (3, 6, 9), elements=cells), st.permutations(range(3)))
def test_maps_of_a_batch_do_not_mix(batch, order):
    assert_batched(gaussian_blur, batch, order=order, atol=2e-6)
    assert_batched(pooled, batch, order=order, atol=2e-6)


def test_half_precision_maps_are_averaged_in_float32():
    rounded = np.random.default_rng(0).standard_normal((6, 9)).astype(jnp.bfloat16)
    for function in (gaussian_blur, pooled):
        np.testing.assert_array_equal(function(jnp.asarray(rounded)), function(rounded.astype(np.float32)))


def test_wrong_sizes_are_refused():
    heatmap = np.zeros((2, 2), np.float32)
    with pytest.raises(JaxVQAError, match="sigma=-1; expected 0 or more"):
        gaussian_blur(heatmap, -1)
    with pytest.raises(JaxVQAError, match="factor=0; expected 1 or more"):
        average_pool(heatmap, 0)


@pytest.mark.parametrize("shape", [(6, 9), (1, 5)])
def test_the_weights_along_each_axis_are_the_filters_own(shape):
    """What FOCUS multiplies, so that filter and pooling are one program for all shapes."""
    heatmap = np.random.default_rng(0).random(shape, np.float32)
    rows, columns = (pool_weights(size, 2) @ blur_weights(size, 1.0) for size in shape)
    np.testing.assert_allclose(rows @ heatmap @ columns.T, average_pool(gaussian_blur(heatmap, 1.0), 2), atol=1e-6)
