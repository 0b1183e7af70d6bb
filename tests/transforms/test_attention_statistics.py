"""Statistics of attention maps against NumPy, cell by cell and box by box."""

import math
from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxvqa.geometry import for_crop, for_pad, for_squash
from jaxvqa.transforms import attention_ratio, box_weights, image_share, spatial_entropy

SHAPES = [(3, 5), (2, 4, 3), (1, 1)]  # few, because each compiles
GRID = (4, 5)
MODES = {"pad": for_pad, "crop": for_crop, "squash": for_squash}
NOTHING = np.zeros(GRID, np.float32)

maps = st.sampled_from(SHAPES).flatmap(lambda shape: arrays(np.float32, shape, elements=st.floats(2**-20, 1, width=32)))


@given(maps)
def test_the_share_is_the_sum(attention):
    np.testing.assert_allclose(image_share(attention), attention.astype(np.float64).sum((-2, -1)), rtol=1e-6)


@given(maps)
def test_the_entropy_is_that_of_the_map_as_a_distribution_over_its_cells(attention):
    cells = attention.astype(np.float64).reshape(*attention.shape[:-2], -1)
    p = cells / cells.sum(-1, keepdims=True)
    expected = -(p * np.log(p)).sum(-1) / math.log(max(2, cells.shape[-1]))
    np.testing.assert_allclose(spatial_entropy(attention), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(spatial_entropy(attention / 64), expected, rtol=1e-5, atol=1e-6)


def test_the_entropy_is_one_if_uniform_zero_in_one_cell_and_unknown_without_attention():
    single = np.zeros((4, 6), np.float32)
    single[2, 3] = 0.25
    both = np.stack([np.full((4, 6), 0.01, np.float32), single, 0 * single])
    np.testing.assert_allclose(spatial_entropy(both), [1, 0, np.nan], atol=1e-6)


@st.composite
def boxed(draw):
    """A geometry of a small image, a box in it with whole corners, and a map per pixel behind it."""
    W, H = draw(st.integers(5, 30)), draw(st.integers(5, 30))
    x1, y1 = draw(st.integers(0, W - 1)), draw(st.integers(0, H - 1))
    box = (x1, y1, draw(st.integers(x1 + 1, W)), draw(st.integers(y1 + 1, H)))
    heat = draw(arrays(np.float32, GRID, elements=st.floats(2**-10, 8, width=32)))
    return (W, H), box, heat


@given(boxed(), st.sampled_from(["pad", "squash"]))
def test_the_ratio_is_the_targets_sum_over_the_mean_of_all_placements(case, mode):
    """Every placement of the box one by one, over the cells' values times the areas in which they meet it."""
    (W, H), (x1, y1, x2, y2), heat = case
    geometry = MODES[mode](W, H, 28, GRID)
    columns, rows = geometry.edges()

    def held(left, top):
        across = [max(0, min(b, left + x2 - x1) - max(a, left)) for a, b in pairwise(columns)]
        down = [max(0, min(b, top + y2 - y1) - max(a, top)) for a, b in pairwise(rows)]
        return sum(down[r] * across[c] * float(heat[r, c]) for r, c in np.ndindex(GRID))

    placements = [held(left, top) for left in range(W - (x2 - x1) + 1) for top in range(H - (y2 - y1) + 1)]
    expected = held(x1, y1) / np.mean(placements)
    assert attention_ratio(heat, *box_weights([(x1, y1, x2, y2)], geometry)) == pytest.approx(expected, rel=1e-5)


@given(boxed(), st.sampled_from(list(MODES)))
def test_a_uniform_map_has_ratio_one_and_a_factor_does_not_matter(case, mode):
    (W, H), box, heat = case
    inside, anywhere = box_weights([box], MODES[mode](W, H, 28, GRID))
    if inside.any():
        ratio = attention_ratio(heat, inside, anywhere)
        np.testing.assert_allclose(attention_ratio(np.ones_like(heat), inside, anywhere), 1, rtol=1e-5)
        np.testing.assert_allclose(attention_ratio(heat * np.float32(1e30), inside, anywhere), ratio, rtol=1e-5)
    else:
        assert mode == "crop", "only a centre crop leaves parts of the image unseen"
        assert np.isnan(attention_ratio(heat, inside, anywhere))


def test_all_attention_in_one_box_of_a_cells_size_gives_the_inverse_of_its_mean_share():
    """4 x 5 cells of 10 pixels: 31 x 41 placements of the box, of which a tenth part covers the cell on average."""
    geometry, spike = for_squash(50, 40, 40, GRID), NOTHING.copy()
    spike[1, 2] = 1
    covered = [(10 - abs(d)) / 10 for d in range(-9, 10)]  # from nine pixels left of the cell to nine right of it
    expected = 1 / ((sum(covered) / 41) * (sum(covered) / 31))
    assert attention_ratio(spike, *box_weights([(20, 10, 30, 20)], geometry)) == pytest.approx(expected, rel=1e-5)


def test_several_targets_are_added_and_none_has_no_ratio():
    geometry, heat = for_pad(50, 40, 50, (5, 5)), np.arange(25, dtype=np.float32).reshape(5, 5)
    boxes = [(0, 0, 10, 10), (20, 15, 45, 30)]
    single = [box_weights([box], geometry) for box in boxes]
    for both, one, other in zip(box_weights(boxes, geometry), *single, strict=True):
        np.testing.assert_allclose(both, one + other, rtol=1e-6)
    assert np.isnan(attention_ratio(heat, *box_weights([], geometry)))
    assert np.isnan(attention_ratio(0 * heat, *single[0])), "no attention, no ratio"


def test_what_a_centre_crop_does_not_see_is_neither_target_nor_placement():
    """100 x 40, of which columns 30..70 are seen, on 4 x 4 cells of 10 pixels."""
    geometry = for_crop(100, 40, 40, (4, 4))
    assert not np.any(box_weights([(0, 0, 20, 20)], geometry))
    cut, seen = box_weights([(20, 0, 40, 20)], geometry), box_weights([(30, 0, 40, 20)], geometry)
    np.testing.assert_array_equal(cut, seen)
    assert cut[0].sum() == pytest.approx(2) and cut[0][:2, 0].sum() == pytest.approx(2)


@given(arrays(np.float32, (2, 3, *GRID), elements=st.floats(0, 1, width=32)))
def test_batches_compiled_and_one_by_one_agree(attention):
    weights = box_weights([(3, 4, 20, 25)], for_squash(50, 40, 40, GRID))
    for statistic in (image_share, spatial_entropy, lambda m: attention_ratio(m, *weights)):
        whole = np.asarray(statistic(attention))
        assert whole.shape == (2, 3) and whole.dtype == np.float32
        np.testing.assert_allclose(jax.jit(statistic)(attention), whole, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(whole[1, 2], statistic(attention[1, 2]), rtol=1e-5, atol=1e-6)
