"""Cells, encoder pixels and image pixels, for padded, centre-cropped and squashed images."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxvqa.geometry import Geometry, for_crop, for_pad, for_squash, from_padded, resized_size, to_padded
from jaxvqa.images import pad_to_square

GRID = (24, 24)
MODES = {"pad": for_pad, "crop": for_crop, "squash": for_squash}
SIZES = [(1024, 768), (768, 1024), (640, 640), (1, 200), (200, 1), (333, 517), (1, 1), (2250, 1500), (337, 336)]


@pytest.fixture(params=[(mode, size) for mode in MODES for size in SIZES], ids=str)
def geometry(request) -> Geometry:
    mode, size = request.param
    return MODES[mode](*size, 336, GRID)


def test_padding_of_a_1024x768_image_matches_the_worked_example():
    geometry = for_pad(1024, 768, 336, GRID)
    x, y = geometry.edges()
    assert y[:2].tolist() == [-128, 1024 / 24 - 128] and x[0] == 0 and x[1] == 1024 / 24
    assert np.flatnonzero(~geometry.valid().any(1)).tolist() == [0, 1, 2, 21, 22, 23]
    assert geometry.valid().sum() == 18 * 24
    assert geometry.cell_boxes()[3, 0].tolist() == [0, 0, 1024 / 24, 4 * 1024 / 24 - 128]
    assert geometry.valid_ranges() == ((3, 21), (0, 24))


def test_centre_crop_of_a_1024x768_image_matches_the_worked_example():
    geometry = for_crop(1024, 768, 336, GRID)
    assert resized_size(1024, 768, 336) == (448, 336)
    assert geometry.cell_boxes()[0, 0].tolist() == [128, 0, 160, 32]
    assert geometry.cells_at(np.array([[127.9, 5], [128, 5], [895.9, 5], [896, 5]])).tolist() == [
        [-1, -1],
        [0, 0],
        [0, 23],
        [-1, -1],
    ]
    assert geometry.valid().all()


def test_squash_divides_the_image_into_equal_cells():
    boxes = for_squash(480, 240, 384, (24, 16)).cell_boxes()
    assert boxes[1, 2].tolist() == [60, 10, 90, 20]


def test_every_visible_cell_maps_to_pixels_and_back(geometry):
    boxes, valid = geometry.cell_boxes(), geometry.valid()
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    rows, columns = np.indices(GRID)
    assert np.array_equal(geometry.cells_at(centres)[valid], np.stack([rows, columns], -1)[valid])
    assert valid.any()


def test_a_cell_is_invalid_exactly_when_its_clamped_area_is_empty(geometry):
    boxes = geometry.cell_boxes()
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    assert np.array_equal(geometry.valid(), area > 0)
    assert (boxes >= 0).all() and (boxes <= np.tile(geometry.image_size, 2)).all()


def test_the_visible_cells_tile_what_the_encoder_sees(geometry):
    boxes = geometry.cell_boxes()
    seen = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sum()
    W, H = geometry.image_size
    expected = min(W, geometry.extent[0]) * min(H, geometry.extent[1]) if geometry.mode == "crop" else W * H
    assert seen == pytest.approx(expected, rel=1e-12)


def test_the_whole_image_covers_every_valid_cell_once(geometry):
    coverage = geometry.cells_of_box((0, 0, *geometry.image_size))
    assert np.array_equal(coverage, geometry.valid())


def test_the_box_of_a_cell_covers_that_cell_and_no_other(geometry):
    row, column = np.argwhere(geometry.valid())[-1]
    coverage = geometry.cells_of_box(geometry.cell_boxes()[row, column])
    assert coverage[row, column] == 1 and coverage.sum() == 1


def test_coverage_fractions_are_exact():
    geometry = for_pad(1024, 768, 336, (16, 16))  # cells of 64 pixels, two padded rows above
    coverage = geometry.cells_of_box((32, 16, 80, 64))
    expected = np.zeros((16, 16))
    expected[2, 0], expected[2, 1] = 0.5 * 0.75, 0.25 * 0.75
    assert np.array_equal(coverage, expected)


point = st.floats(-50, 1100)


@given(point, point, st.sampled_from(list(MODES)), st.sampled_from(SIZES))
def test_points_survive_the_way_to_the_encoder_and_back(x, y, mode, size):
    geometry = MODES[mode](*size, 336, GRID)
    assert geometry.from_encoder(geometry.to_encoder(np.array([x, y]))) == pytest.approx([x, y], abs=1e-8)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1), st.sampled_from(list(MODES)))
def test_the_cell_of_a_point_is_the_cell_of_its_encoder_pixel(width, height, across, down, mode):
    geometry = MODES[mode](width, height, 336, GRID)
    x, y = across * width, down * height
    u, v = geometry.to_encoder(np.array([x, y])) / 14
    if min(abs(u - round(u)), abs(v - round(v))) < 1e-6:
        return  # on a boundary rounding decides
    row, column = geometry.cells_at(np.array([x, y]))
    seen = 0 <= u < 24 and 0 <= v < 24
    assert (row, column) == ((int(v), int(u)) if seen else (-1, -1))


# What transformers' own processor does, read off the pixels it produces.


@pytest.fixture(scope="module")
def processor():
    from transformers import CLIPImageProcessorPil

    side = {"height": 64, "width": 64}
    return CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size=side, image_mean=[0.0] * 3, image_std=[1.0] * 3, do_rescale=False
    )


def ramps(width, height):
    """An image whose red is the x and whose green the y coordinate (in 1/255 of the side)."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([x, y, 0 * x], -1) * 255).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(200, 151), (151, 200), (333, 97), (97, 333), (65, 64), (129, 129), (500, 301)])
@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_encoder_pixels_are_where_the_hf_processor_puts_them(processor, size, mode):
    image = ramps(*size)
    encoded = processor(pad_to_square(image) if mode == "pad" else image)["pixel_values"][0]
    geometry = MODES[mode](*size, 64, (8, 8))
    u, v = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
    x, y = np.moveaxis(geometry.from_encoder(np.stack([u, v], -1)) / size, -1, 0)
    inside = (0.05 < x) & (x < 0.95) & (0.05 < y) & (y < 0.95)
    # One encoder pixel is worth at least 0.8 levels of a ramp; rounding to 8 bits averages out.
    assert abs((encoded[0] - 255 * x)[inside].mean()) < 0.1
    assert abs((encoded[1] - 255 * y)[inside].mean()) < 0.1
    assert np.abs(encoded[:2] - 255 * np.stack([x, y]))[:, inside].max() < 1.5


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_the_resized_size_is_the_hf_processors(width, height):
    from transformers.image_transforms import get_resize_output_image_size

    blank = np.broadcast_to(np.uint8(0), (3, height, width))
    theirs = get_resize_output_image_size(blank, 336, default_to_square=False, input_data_format="channels_first")
    assert resized_size(width, height, 336) == theirs[::-1]


# Heat maps in image coordinates.


def test_cell_resampling_gives_every_pixel_its_own_cell(geometry):
    W, H = geometry.image_size
    heat = np.arange(GRID[0] * GRID[1], dtype=np.float32).reshape(GRID)
    size = (min(W, 97), min(H, 61))
    image = geometry.to_image(heat, size, fill=-1)
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) * W / size[0], (np.arange(size[1]) + 0.5) * H / size[1])
    cells = geometry.cells_at(np.stack([x, y], -1))
    expected = np.where(cells[..., 0] < 0, -1, heat[cells[..., 0], cells[..., 1]])
    assert image.dtype == np.float32 and image.shape == size[::-1]
    # Pixel centres on a cell boundary may fall to either side.
    assert np.mean(image != expected) < 0.02


def test_resampling_to_the_grid_of_a_squashed_image_is_the_identity():
    heat = np.random.default_rng(0).random((6, 4), np.float32)
    geometry = for_squash(400, 90, 336, (6, 4))
    for method in ("cell", "bilinear"):
        assert np.array_equal(geometry.to_image(heat, (4, 6), method=method), heat)


def test_bilinear_resampling_of_a_ramp_is_a_ramp():
    heat = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    image = for_squash(80, 80, 64, (8, 8)).to_image(heat, (16, 16), method="bilinear")
    expected = np.clip(np.arange(16) / 2 - 0.25, 0, 7)
    assert image == pytest.approx(np.tile(expected, (16, 1)), abs=1e-6)


@pytest.mark.parametrize("method", ["cell", "bilinear"])
def test_padding_never_bleeds_into_the_image(method):
    geometry = for_pad(1000, 500, 336, GRID)
    heat = np.where(geometry.valid(), 1, 1e6).astype(np.float32)
    assert np.array_equal(geometry.to_image(heat, method=method), np.ones((500, 1000)))


def test_pixels_that_were_cropped_away_get_the_smallest_seen_value():
    geometry = for_crop(1024, 768, 336, GRID)
    heat = np.full(GRID, 3, np.float32)
    heat[5, 5] = 2
    image = geometry.to_image(heat)
    assert image.shape == (768, 1024)
    assert (image[:, :128] == 2).all() and (image[:, 896:] == 2).all() and image[0, 128] == 3
    assert geometry.to_image(heat, fill=0)[0, 0] == 0


def test_a_map_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 3\) on a token grid of \(24, 24\)"):
        for_pad(10, 10, 336, GRID).to_image(np.zeros((3, 3)))


# LLaVA's boxes.


def test_llava_boxes_refer_to_the_padded_square():
    assert to_padded([0, 0, 1024, 768], (1024, 768)).tolist() == [0, 0.125, 1, 0.875]
    assert from_padded([0, 0.125, 1, 0.875], (1024, 768)).tolist() == [0, 0, 1024, 768]
    assert from_padded([0, 0, 1, 1], (100, 300)).tolist() == [0, 0, 100, 300]


@given(st.sampled_from(SIZES), st.tuples(*[st.floats(0, 1)] * 4))
def test_llava_boxes_survive_the_round_trip(size, fractions):
    box = np.array(fractions) * np.tile(size, 2)
    assert from_padded(to_padded(box, size), size) == pytest.approx(box, abs=1e-9)


@given(st.sampled_from([(2, 3), (1, 1), (5, 1)]), st.sampled_from([None, 15, 40]), st.integers(0, 9))
def test_a_map_for_a_program_comes_back_on_its_grid(grid, capacity, seed):
    """Padded behind its cells where grids vary, as it is where they do not."""
    view = replace(for_squash(70, 30, 336, grid), capacity=capacity)
    maps = np.random.default_rng(seed).random((2, *grid))
    given = view.for_program(maps)
    assert given.shape == (2, *(grid if capacity is None else (1, capacity)))
    assert given.sum() == pytest.approx(maps.sum())
    np.testing.assert_array_equal(view.on_grid(given), maps)
