"""Heat maps between the grids of two preprocessings, against integrals over pixels, and by their properties."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batched import assert_batched
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxvqa.errors import JaxVQAError
from jaxvqa.geometry import Geometry, for_crop, for_pad, for_squash
from jaxvqa.transforms.resample import lay, overlap
from jaxvqa.transforms.resample import resample as not_compiled

resample = jax.jit(not_compiled)
MODES = {"pad": for_pad, "crop": for_crop, "squash": for_squash}
SIZES = [(24, 18), (18, 24), (20, 20), (40, 10), (13, 29), (3, 50), (1, 7)]
GRIDS = [(4, 6), (5, 3)]  # few, because each pair compiles
cells = st.floats(-8, 8, width=32)


def geometries(size):
    mode, grid = st.sampled_from(list(MODES)), st.sampled_from(GRIDS)
    return st.builds(lambda mode, grid: MODES[mode](*size, 336, grid), mode, grid)


pairs = st.sampled_from(SIZES).flatmap(lambda size: st.tuples(geometries(size), geometries(size)))


def reference(heatmap, source: Geometry, target: Geometry):
    """Cell by cell: the mean over the old cells that a new one meets on the image, by area; else the minimum."""
    old, new = source.cell_boxes(), target.cell_boxes()
    out = np.full(target.grid, heatmap[source.valid()].min(), np.float64)
    for at in np.ndindex(target.grid):
        x1, y1, x2, y2 = new[at]
        wide = np.minimum(old[..., 2], x2) - np.maximum(old[..., 0], x1)
        high = np.minimum(old[..., 3], y2) - np.maximum(old[..., 1], y1)
        area = np.maximum(wide, 0) * np.maximum(high, 0)
        if area.sum() > 0:
            out[at] = (area * heatmap.astype(np.float64)).sum() / area.sum()
    return out


def heatmaps(grid, elements=cells):
    return arrays(np.float32, grid, elements=elements)


@settings(max_examples=60)
@given(pairs, st.data())
def test_a_new_cell_is_the_mean_of_the_old_ones_by_area(pair, data):
    source, target = pair
    heatmap = data.draw(heatmaps(source.grid))
    ours = resample(heatmap, overlap(source, target))
    assert ours.dtype == jnp.float32 and ours.shape == target.grid
    np.testing.assert_allclose(ours, reference(heatmap, source, target), atol=3e-6)


@given(st.sampled_from(SIZES), st.data())
def test_the_mean_over_the_image_stays_when_both_grids_cover_it(size, data):
    """Padded to squashed and back: areas of the cells times their values."""

    def mean(heatmap, geometry):
        x1, y1, x2, y2 = np.moveaxis(geometry.cell_boxes(), -1, 0)
        return (heatmap * (x2 - x1) * (y2 - y1)).sum() / (size[0] * size[1])

    pad, squash = for_pad(*size, 336, (4, 6)), for_squash(*size, 336, (5, 3))
    for source, target in ((pad, squash), (squash, pad)):
        heatmap = data.draw(heatmaps(source.grid))
        new = np.asarray(resample(heatmap, overlap(source, target)), np.float64)
        assert mean(new, target) == pytest.approx(mean(heatmap, source), abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_a_map_on_its_own_grid_stays_as_it_is(mode, size):
    geometry = MODES[mode](*size, 336, (5, 3))
    heatmap = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    expected = np.where(geometry.valid(), heatmap, heatmap[geometry.valid()].min())
    np.testing.assert_array_equal(resample(heatmap, overlap(geometry, geometry)), expected)


def test_a_padded_map_is_laid_over_the_image_row_by_row():
    """1024 × 768 pads exactly three of 24 rows above and below: the other 18 cover the image, 3/4 per new row."""
    heatmap = np.random.default_rng(0).random((24, 24), np.float32)
    source, target = for_pad(1024, 768, 336, (24, 24)), for_squash(1024, 768, 384, (24, 24))
    ours = np.asarray(resample(heatmap, overlap(source, target)))
    np.testing.assert_allclose(ours[0], heatmap[3], rtol=1e-6)
    np.testing.assert_allclose(ours[1], heatmap[3] / 3 + heatmap[4] * 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(ours[23], heatmap[20], rtol=1e-6)


def test_cells_that_the_map_does_not_cover_get_its_minimum():
    """A centre crop of 1024 × 768 does not see the outer 128 columns, three of 24 cells on either side."""
    heatmap = np.random.default_rng(0).random((24, 24), np.float32) - 2
    source, target = for_crop(1024, 768, 336, (24, 24)), for_squash(1024, 768, 336, (24, 24))
    ours = np.asarray(resample(heatmap, overlap(source, target)))
    np.testing.assert_array_equal(ours[:, [0, 1, 2, 21, 22, 23]], np.full((24, 6), heatmap.min()))
    assert (ours[:, 3:21] > heatmap.min()).any(0).all()


@given(pairs, st.data())
def test_padding_has_no_part_in_the_result(pair, data):
    source, target = pair
    heatmap = data.draw(heatmaps(source.grid))
    other = np.where(source.valid(), heatmap, data.draw(st.sampled_from([-3e38, 0, 3e38]))).astype(np.float32)
    onto = overlap(source, target)
    np.testing.assert_array_equal(resample(other, onto), resample(heatmap, onto))


@given(pairs, st.data())
def test_it_is_finite_and_within_the_range_for_every_finite_map(pair, data):
    source, target = pair
    heatmap = data.draw(heatmaps(source.grid, st.floats(width=32, allow_infinity=False, allow_nan=False)))
    ours = np.asarray(resample(heatmap, overlap(source, target)))
    seen = heatmap[source.valid()]
    assert np.isfinite(ours).all() and seen.min() <= ours.min() and ours.max() <= seen.max()


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 3e38])
@pytest.mark.parametrize("mode", MODES)
def test_all_equal_cells_stay_exactly_as_they_are(mode, value):
    source, target = MODES[mode](13, 29, 336, (5, 3)), for_squash(13, 29, 384, (4, 6))
    heatmap = np.full((5, 3), value, np.float32)
    np.testing.assert_array_equal(resample(heatmap, overlap(source, target)), np.full((4, 6), heatmap[0, 0]))


def test_a_single_cell_covers_everything_and_takes_the_mean_of_everything():
    one, many = for_squash(20, 10, 336, (1, 1)), for_squash(20, 10, 336, (4, 6))
    heatmap = np.random.default_rng(0).random((4, 6), np.float32)
    np.testing.assert_allclose(resample(heatmap, overlap(many, one)), [[heatmap.mean()]], rtol=1e-6)
    np.testing.assert_array_equal(resample(heatmap[:1, :1], overlap(one, many)), np.full((4, 6), heatmap[0, 0]))


ONTO = overlap(for_pad(24, 18, 336, (5, 3)), for_squash(24, 18, 384, (4, 6)))


def onto_another(heatmap):
    return not_compiled(heatmap, ONTO)


@given(arrays(np.float32, (3, 5, 3), elements=cells), st.permutations(range(3)))
def test_maps_of_a_batch_do_not_mix(batch, order):
    assert_batched(onto_another, batch, order=order, atol=2e-6)


def test_a_batch_of_images_of_any_size_is_one_program():
    heatmaps = np.random.default_rng(0).random((len(SIZES), 5, 3), np.float32)
    pairs = [(for_pad(*size, 336, (5, 3)), for_squash(*size, 384, (4, 6))) for size in SIZES]
    plans = [overlap(*pair) for pair in pairs]
    batch = jax.jit(jax.vmap(resample))(heatmaps, jax.tree.map(lambda *leaves: np.stack(leaves), *plans))
    for heatmap, pair, ours in zip(heatmaps, pairs, batch, strict=True):
        np.testing.assert_allclose(ours, reference(heatmap, *pair), atol=1e-6)


def test_half_precision_maps_are_averaged_in_float32():
    rounded = np.random.default_rng(0).standard_normal((5, 3)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(onto_another(jnp.asarray(rounded)), onto_another(rounded.astype(np.float32)))


def test_geometries_of_different_images_are_refused():
    source = for_pad(640, 480, 336, (24, 24))
    with pytest.raises(JaxVQAError, match=r"the map of a \(640, 480\) image to a grid on a \(480, 640\) image"):
        overlap(source, replace(source, image_size=(480, 640)))


@given(arrays(np.float32, (7, 9), elements=cells), st.sampled_from([(3, 5), (12, 7)]))
def test_laying_a_map_from_the_host_is_resampling_it(heatmap, grid):
    """However it is padded inside."""
    onto = overlap(for_pad(40, 10, 336, (7, 9)), for_squash(40, 10, 336, grid))
    np.testing.assert_allclose(lay(heatmap, onto), resample(heatmap, onto), atol=1e-6)
