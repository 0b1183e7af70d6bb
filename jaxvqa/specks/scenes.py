"""Specks scenes: plates on a textured ground, legible as plates from afar, as characters only from close by.

A scene is a function of (seed, index) alone. Its *layout* (the plates) is drawn first and can be had without
rendering; the picture follows from the layout and a second stream, so a change of texture moves no plate.
"""

from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
from PIL import Image

from jaxvqa.geometry import area, shared_area
from jaxvqa.specks.glyphs import CHARACTERS, glyph
from jaxvqa.typing import UInt8

SIZE = 896
COLORS = {
    "red": (206, 28, 36),
    "orange": (244, 132, 20),
    "yellow": (246, 222, 52),
    "green": (32, 150, 60),
    "blue": (32, 84, 214),
    "purple": (138, 42, 166),
    "white": (244, 244, 244),
    "black": (22, 22, 22),
}
SHAPES = ("square", "triangle", "diamond", "cross")
TEXTURES = 64
_BRIGHT = ("orange", "yellow", "white")
_COLOR_NAMES = tuple(COLORS)
_RIM = 3

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Layout:
    """What a kind of scene holds: how many plates, their sides and the heights of their characters in pixels.

    Ranges include both ends; the smallest plate has the smallest character, and so on in proportion.
    """

    plates: tuple[int, int]
    side: tuple[int, int]
    character: tuple[int, int]


LAYOUTS = {
    "small": Layout((8, 12), (64, 92), (14, 20)),
    "crowded": Layout((24, 30), (104, 128), (32, 42)),
    "whole": Layout((3, 6), (120, 240), (54, 130)),
    "dense": Layout((28, 28), (64, 92), (14, 20)),
}
"""By kind of scene. small: characters of 14-20 px, which only a crop shows. crowded: larger plates, characters of 32-42
px, which a good look at the right one of many shows. whole: few large plates. dense: to train on, much per view."""


@dataclass(frozen=True)
class Plate:
    """One plate: its words, and the boxes (xyxy, half-open, scene pixels) of itself and of its character."""

    color: str
    shape: str
    character: str
    box: Box
    character_box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def side(self) -> int:
        return self.box[2] - self.box[0]

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def visible(self, view: Box) -> float:
        """Share of the plate's box inside `view`."""
        return shared_area(self.box, view) / area(self.box)

    def legible(self, view: Box, encoder: int = 128, minimum: float = 4.5) -> bool:
        """Whether the whole character lies in `view` and is at least `minimum` encoder pixels high there."""
        x1, y1, x2, y2 = self.character_box
        inside = view[0] <= x1 and view[1] <= y1 and x2 <= view[2] and y2 <= view[3]
        return inside and (y2 - y1) * encoder >= minimum * max(view[2] - view[0], view[3] - view[1])


@dataclass(frozen=True)
class Scene:
    """A scene. `image` is rendered when first asked for."""

    seed: int
    index: int
    kind: str
    plates: tuple[Plate, ...]
    box: Box = field(default=(0, 0, SIZE, SIZE), init=False)

    @cached_property
    def picture(self) -> Image.Image:
        """The scene as a PIL image, RGB, 896 x 896."""
        return _render(self)

    @property
    def image(self) -> UInt8[np.ndarray, "896 896 3"]:
        return np.asarray(self.picture)

    def view(self, box: Box | None = None, size: int = 128) -> UInt8[np.ndarray, "size size 3"]:
        """The square `box` of the scene (all of it if None) as the encoder sees it: cropped, then PIL bicubic."""
        picture = self.picture if box is None else self.picture.crop(box)
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


def scene(seed: int, index: int, kind: str = "small") -> Scene:
    """The scene number `index` of the world `seed`, of one of the kinds of `LAYOUTS`.

    small: five colours occur. One plate is the only one of its colour, another the only one of its shape; the others
    are distinct pairs of the remaining four colours and three shapes, five of which make a plate with two rivals of
    its colour and two of its shape. crowded: distinct pairs of all colours and shapes. whole: distinct pairs of three
    colours and three shapes. dense: any pairs.
    """
    rng, layout = np.random.default_rng((seed, index)), LAYOUTS[kind]
    count = int(rng.integers(layout.plates[0], layout.plates[1] + 1))
    colors, shapes = rng.permutation(len(COLORS)), rng.permutation(len(SHAPES))
    if kind == "small":
        pairs = [(colors[0], rng.choice(shapes[1:])), (rng.choice(colors[1:5]), shapes[0])]
        pairs += [(colors[1], shapes[n]) for n in (1, 2, 3)] + [(colors[n], shapes[1]) for n in (2, 3)]
        others = [(color, shape) for color in colors[1:5] for shape in shapes[1:]]
        others = [pair for pair in others if pair not in pairs]
        pairs += [others[i] for i in rng.permutation(len(others))[: count - len(pairs)]]
    elif kind == "dense":
        pairs = list(zip(rng.integers(0, len(COLORS), count), rng.integers(0, len(SHAPES), count), strict=True))
    else:
        few = 3 if kind == "whole" else None
        pairs = [(color, shape) for color in colors[:few] for shape in shapes[:few]]
        pairs = [pairs[i] for i in rng.permutation(len(pairs))[:count]]
    sides = rng.integers(layout.side[0], layout.side[1] + 1, count)
    corners = _grid(rng, sides) if kind == "crowded" else _place(rng, sides)
    plates = []
    for (color, shape), side, (x, y) in zip(pairs, sides.tolist(), corners, strict=True):
        height = round(np.interp(side, layout.side, layout.character))
        width = round(height * 5 / 7)
        low = side / 6 if SHAPES[shape] == "triangle" else 0
        dx, dy = rng.integers(-2, 3, 2).tolist()
        left, top = x + (side - width) // 2 + dx, y + round((side - height) / 2 + low) + dy
        plates.append(
            Plate(
                _COLOR_NAMES[color],
                SHAPES[shape],
                CHARACTERS[int(rng.integers(len(CHARACTERS)))],
                (x, y, x + side, y + side),
                (left, top, left + width, top + height),
            )
        )
    return Scene(seed, index, kind, tuple(plates))


def random_view(rng: np.random.Generator, plates: tuple[Plate, ...], empty: float = 0.1) -> Box:
    """A square crop around a plate at a random offset, or (`empty`) around none.

    Its side is log-uniform from 1.3 to 6.4 times the mean plate's side (100..500 px for small plates), at most 800 px.
    """
    mean = np.mean([plate.side for plate in plates])
    side = int(np.exp(rng.uniform(np.log(1.3 * mean), np.log(min(6.4 * mean, 800)))))
    if rng.random() < empty:
        small = min(side, 250)
        for _ in range(20):
            x, y = rng.integers(0, SIZE - small + 1, 2).tolist()
            if not any(plate.visible((x, y, x + small, y + small)) for plate in plates):
                return x, y, x + small, y + small
    center = plates[int(rng.integers(len(plates)))].center
    offset = rng.uniform(0.05, 0.95, 2) * side
    x, y = (int(np.clip(center[i] - offset[i], 0, SIZE - side)) for i in range(2))
    return x, y, x + side, y + side


def crop_around(plate: Plate, side: int = 160) -> Box:
    """The square crop of `side` pixels (1.4 times the plate's, if that is more) around a plate, moved inside."""
    side = min(max(side, round(1.4 * plate.side)), SIZE)
    x, y = (int(np.clip(c - side / 2, 0, SIZE - side)) for c in plate.center)
    return x, y, x + side, y + side


def _place(rng: np.random.Generator, sides: np.ndarray) -> list[tuple[int, int]]:
    """Top left corners of squares that keep 8 px from each other and from the border."""
    while True:
        corners = np.empty((0, 2), int)
        for n, side in enumerate(sides):
            tries = rng.integers(8, SIZE - 8 - side, (64 if len(sides) < 20 else 256, 2))
            gap = np.maximum(tries[:, None] - (corners + sides[:n, None]), corners - (tries[:, None] + side))
            free = np.flatnonzero((gap.max(-1) >= 8).all(-1))
            if not len(free):
                break
            corners = np.vstack([corners, tries[free[0]]])
        else:
            return [(int(x), int(y)) for x, y in corners]


def _grid(rng: np.random.Generator, sides: np.ndarray) -> list[tuple[int, int]]:
    """Top left corners of squares, each at a random place of its own cell of a 6 x 5 or 5 x 6 grid."""
    columns, rows = (6, 5) if rng.random() < 0.5 else (5, 6)
    cells = rng.permutation(columns * rows)[: len(sides)]
    corners = []
    for cell, side in zip(cells.tolist(), sides.tolist(), strict=True):
        low = [SIZE * (cell % columns) // columns, SIZE * (cell // columns) // rows]
        free = [SIZE // n - 8 - side for n in (columns, rows)]
        corners.append(tuple(int(a + 4 + rng.integers(f + 1)) for a, f in zip(low, free, strict=True)))
    return corners


def _render(scene: Scene) -> Image.Image:
    rng = np.random.default_rng((scene.seed, scene.index, 1))
    ground = _texture(int(rng.integers(TEXTURES)))
    for flip in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE):
        if rng.random() < 0.5:
            ground = ground.transpose(flip)
    gray = rng.uniform(60, 190, (2, 1))
    ends = np.clip(gray + rng.uniform(-22, 22, (2, 3)), 0, 255)
    palette = ends[0] + (ends[1] - ends[0]) * np.linspace(0, 1, 256)[:, None]
    image = ground.copy()
    image.putpalette(palette.astype(np.uint8).tobytes())
    image = image.convert("RGB")
    for plate in scene.plates:
        x1, y1, x2, _ = plate.box
        color = np.clip(np.array(COLORS[plate.color]) + rng.integers(-12, 13, 3), 0, 255)
        rim = color * 0.5 + (55 if plate.color == "black" else 0)
        image.paste(tuple(rim.astype(int).tolist()), (x1, y1), _mask(plate.shape, x2 - x1, 0))
        image.paste(tuple(color.tolist()), (x1, y1), _mask(plate.shape, x2 - x1, _RIM))
        ink = (10, 10, 10) if plate.color in _BRIGHT else (250, 250, 250)
        left, top, _, bottom = plate.character_box
        image.paste(ink, (left, top), glyph(plate.character, bottom - top))
    return image


@cache
def _mask(shape: str, side: int, inset: int) -> Image.Image:
    """Antialiased coverage (mode L, side x side) of a shape, drawn `inset` pixels inside its outline."""
    fine = 4
    x, y = np.meshgrid(*[(np.arange(side * fine) + 0.5) / fine] * 2)
    u, v, half = np.abs(x - side / 2), np.abs(y - side / 2), side / 2
    inside = {
        "square": np.maximum(u, v) <= half - inset,
        "diamond": u + v <= half - inset * 2**0.5,
        "triangle": (y <= side - inset) & (u * 2 + inset * 5**0.5 <= y),
        "cross": (np.minimum(u, v) <= 0.19 * side - inset / 2) & (np.maximum(u, v) <= half - inset),
    }[shape]
    return Image.fromarray(inside.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)


@cache
def _texture(number: int) -> Image.Image:
    """Texture `number` (0..63): eight kinds in eight variants, mode P, to be coloured by a palette."""
    rng = np.random.default_rng((64, number))
    kind, period, angle = number % 8, rng.uniform(18, 90), rng.uniform(0, np.pi)
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    def noise(cells: int) -> np.ndarray:
        small = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        return np.clip(np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)), 0, 1)

    wave = 2 * np.pi / period
    values = [
        lambda: 0.5 + 0.5 * np.sin(u * wave),
        lambda: ((u // period + v // period) % 2) * 0.6 + 0.2,
        lambda: noise(int(rng.integers(5, 12))),
        lambda: 0.5 * noise(7) + 0.3 * noise(28) + 0.2 * noise(112),
        lambda: ((u % period - period / 2) ** 2 + (v % period - period / 2) ** 2 < (period / 3.5) ** 2) * 0.7 + 0.15,
        lambda: 0.5 + 0.5 * np.sin((u + 1.5 * period * noise(6)) * wave),
        lambda: np.minimum((x + (y // period % 2) * period) % (2 * period), y % period) > 3,
        lambda: 0.7 * (u - u.min()) / np.ptp(u) + 0.3 * noise(180),
    ][kind]()
    values = np.clip(0.9 * values + 0.1 * noise(240), 0, 1)
    return Image.frombytes("P", (SIZE, SIZE), (values * 255).astype(np.uint8).tobytes())
