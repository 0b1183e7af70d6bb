"""The characters on the plates: a 5 x 7 bitmap alphabet drawn here, scaled to any height."""

from functools import cache

import numpy as np
from PIL import Image

_ROWS = {
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "J": "..### ....# ....# ....# ....# #...# .###.",
    "N": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
    "Z": "##### ....# ...#. ..#.. .#... #.... #####",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
}
CHARACTERS = "".join(_ROWS)
_OVERSAMPLING = 16


@cache
def glyph(character: str, height: int) -> Image.Image:
    """Coverage mask (mode L) of `character`, `height` pixels high and about 5/7 as wide."""
    bits = np.array([[pixel == "#" for pixel in row] for row in _ROWS[character].split()], np.uint8) * 255
    mask = Image.fromarray(bits.repeat(_OVERSAMPLING, 0).repeat(_OVERSAMPLING, 1))
    return mask.resize((round(height * 5 / 7), height), Image.Resampling.BOX)
