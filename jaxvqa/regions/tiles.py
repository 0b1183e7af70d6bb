"""Large images looked at in tiles (ViCrop's `_high` variants): the tiles, and one map made of theirs.

`windows.high_res_split` says how many tiles there are. Each is looked at like an image of its own, with the same
prompts; the map of the whole is put together from theirs, none scaled by itself:

    tiles = high_res_split(image.size)
    maps = [map of each in cut(image, tiles)]                   # [rows · columns, h, w]
    whole = join(maps, tiles)                                   # [rows · h, columns · w]
    box = windows.search(whole, image.size, base, geometry=joined_geometry(image.size, tiles, (h, w), side))

Where the encoder pads a tile or crops it, its map does not cover the tile cell by cell: `transforms.resample` it onto
`geometry.for_squash` of the tile first, as the release does not.
"""

import numpy as np
from PIL import Image

from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry
from jaxvqa.regions.windows import Tiles
from jaxvqa.typing import Array, Float


def tile_boxes(tiles: Tiles) -> np.ndarray:
    """The tiles, row by row: int [rows · columns, 4] xyxy in pixels of the image; they may overhang it."""
    row, column = np.divmod(np.arange(tiles.rows * tiles.columns), tiles.columns)
    corners = np.stack([column, row], axis=-1) * tiles.size
    return np.concatenate([corners, corners + tiles.size], axis=-1)


def cut(image: Image.Image, tiles: Tiles) -> list[Image.Image]:
    """The tiles of an image, row by row, all of one size; black where they overhang it."""
    return [image.crop(tuple(box)) for box in tile_boxes(tiles).tolist()]


def join(maps: Float[Array | np.ndarray, "n h w"], tiles: Tiles) -> Float[Array | np.ndarray, "H W"]:
    """The maps of the tiles, row by row, side by side: [rows · h, columns · w].

    Raises UserError where there are not as many maps as tiles.
    """
    n, h, w = maps.shape
    if n != tiles.rows * tiles.columns:
        raise UserError(f"tiles: {n} maps for {tiles.rows}x{tiles.columns} tiles; expected one for each")
    grid = maps.reshape(tiles.rows, tiles.columns, h, w)
    return grid.transpose(0, 2, 1, 3).reshape(tiles.rows * h, tiles.columns * w)


def joined_geometry(
    image_size: tuple[int, int], tiles: Tiles, grid: tuple[int, int], encoder_size: int | tuple[int, int]
) -> Geometry:
    """Where the cells of a joined map look, if the grid (h, w) of each tile covers the tile.

    encoder_size: of the encoder; the joined view counts as one squashed input of that side. Cells that lie wholly in
    the black beyond the image are not valid.
    """
    (h, w), (width, height) = grid, tiles.size
    extent = (float(tiles.columns * width), float(tiles.rows * height))
    return Geometry("squash", image_size, encoder_size, (tiles.rows * h, tiles.columns * w), (0.0, 0.0), extent)
