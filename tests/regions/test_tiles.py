"""Tiles of large images and the map made of theirs."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxvqa.errors import UserError
from jaxvqa.geometry import for_squash
from jaxvqa.regions.tiles import cut, join, joined_geometry, tile_boxes
from jaxvqa.regions.windows import Tiles, find, high_res_split, plan, search


def test_the_tiles_of_a_vstar_image():
    """ViCrop, section 1.5: 2250 x 1500 is cut into six squares of 750."""
    tiles = high_res_split((2250, 1500))
    assert tiles == Tiles(2, 3, (750, 750))
    assert tile_boxes(tiles)[[0, 1, 3]].tolist() == [[0, 0, 750, 750], [750, 0, 1500, 750], [0, 750, 750, 1500]]
    assert tile_boxes(tiles)[-1].tolist() == [1500, 750, 2250, 1500]


# ViCrop, section 1.5: images for which the release divides by zero, and narrower ones.
@pytest.mark.parametrize("size", [(768, 1024), (600, 1000), (1, 3000), (10, 2000)])
def test_a_narrow_image_has_one_column(size):
    assert high_res_split(size).columns == 1


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([16, 100, 1024]))
def test_tiles_show_every_pixel_once_and_black_beyond_the_image(width, height, longest):
    pixels = np.random.default_rng(width).integers(1, 256, (height, width, 3), np.uint8)
    tiles = high_res_split((width, height), longest)
    parts = cut(Image.fromarray(pixels), tiles)
    assert {part.size for part in parts} == {tiles.size} and tiles.size[1] <= longest
    canvas = np.zeros((tiles.rows * tiles.size[1], tiles.columns * tiles.size[0], 3), np.uint8)
    for part, (x1, y1, x2, y2) in zip(parts, tile_boxes(tiles), strict=True):
        canvas[y1:y2, x1:x2] = part
    np.testing.assert_array_equal(canvas[:height, :width], pixels)
    assert not canvas[height:].any() and not canvas[:, width:].any()


@given(st.sampled_from([(1, 1), (2, 3), (3, 1)]), st.integers(0, 99))
def test_the_joined_map_has_each_tiles_map_in_its_place(shape, seed):
    tiles = Tiles(*shape, (100, 100))
    maps = np.random.default_rng(seed).random((shape[0] * shape[1], 4, 5), np.float32)
    whole = np.asarray(join(maps, tiles))
    assert whole.shape == (shape[0] * 4, shape[1] * 5)
    for i, one in enumerate(maps):
        row, column = divmod(i, shape[1])
        np.testing.assert_array_equal(whole[row * 4 : row * 4 + 4, column * 5 : column * 5 + 5], one)
    np.testing.assert_array_equal(jax.jit(partial(join, tiles=tiles))(maps), whole)
    np.testing.assert_array_equal(jax.vmap(partial(join, tiles=tiles))(maps[None])[0], whole)


def test_a_missing_map_is_an_error():
    with pytest.raises(UserError, match="5 maps for 2x3 tiles"):
        join(np.zeros((5, 4, 4), np.float32), Tiles(2, 3, (10, 10)))


@given(st.sampled_from([(2250, 1500), (1025, 1025), (8064, 5241), (5, 9), (600, 1000)]))
def test_the_joined_cells_look_where_those_of_each_tile_do(size):
    tiles = high_res_split(size)
    geometry = joined_geometry(size, tiles, (6, 6), 336)
    whole = geometry.cell_boxes()
    alone = for_squash(*tiles.size, 336, (6, 6)).cell_boxes()
    for i, (x, y, *_) in enumerate(tile_boxes(tiles)):
        row, column = divmod(i, tiles.columns)
        ours = whole[row * 6 : row * 6 + 6, column * 6 : column * 6 + 6]
        np.testing.assert_allclose(ours, np.minimum(alone + np.array([x, y, x, y]), np.tile(size, 2)), atol=1e-9)


def test_a_hot_cell_of_one_tile_is_found_in_the_image():
    size = (2250, 1500)
    tiles = high_res_split(size)
    maps = np.zeros((6, 24, 24), np.float32)
    maps[4, 6, 6] = 1  # second row, second column: centre at 750 + 6.5 · 750 / 24 of both axes
    whole, geometry = np.asarray(join(maps, tiles)), joined_geometry(size, tiles, (24, 24), 336)
    assert geometry.grid == whole.shape == (48, 72)
    x1, y1, x2, y2 = search(whole, size, 336, geometry=geometry)
    assert x1 <= 750 + 203 <= x2 and y1 <= 750 + 203 <= y2 and (x2 - x1, y2 - y1) == (336, 336)
    # Without overhang the release's reading, the map over the whole image, is the same.
    assert search(whole, size, 336, alignment="official") == (x1, y1, x2, y2)


def test_the_black_beyond_the_image_is_never_chosen():
    size = (1025, 1025)  # two tiles of 513 each way, one pixel too many
    tiles = Tiles(2, 2, (700, 700))
    geometry = joined_geometry(size, tiles, (7, 7), 336)
    assert geometry.valid_ranges() == ((0, 11), (0, 11))
    heat = np.where(geometry.valid(), 0, 9).astype(np.float32)
    heat[2, 3] = 1
    x1, y1, x2, y2 = search(heat, size, 336, geometry=geometry)
    assert x1 <= 350 <= x2 and y1 <= 250 <= y2


SIZES = [(2250, 1500), (8064, 1024)]


@given(st.sampled_from(SIZES), st.integers(0, 99), st.sampled_from([100, 336]), st.booleans())
def test_a_search_in_a_padded_map_finds_what_one_in_the_map_does(size, seed, base, squashed):
    tiles = high_res_split(size)
    geometry = joined_geometry(size, tiles, (6, 6), 84)
    geometry = for_squash(*size, 84, geometry.grid) if squashed else geometry
    heat = np.random.default_rng(seed).standard_normal(geometry.grid, np.float32)
    plain = find(heat, plan(geometry, base)).box
    assert search(heat, size, base, geometry=geometry) == tuple(np.asarray(plain).tolist())


def test_joined_maps_of_many_shapes_share_programs():
    shapes = [(rows, columns) for rows in (3, 4) for columns in (3, 4)]
    before = find._cache_size()
    for rows, columns in shapes:
        tiles = Tiles(rows, columns, (100, 100))
        size = columns * 100, rows * 100
        view = joined_geometry(size, tiles, (11, 11), 84)
        search(np.ones((rows * 11, columns * 11), np.float32), size, 100, geometry=view)
    assert find._cache_size() - before <= 1, "33 and 44 cells are both padded to 48"
