"""Specks: a procedural world of plates with small characters, its questions, and its tokenizer."""

from jaxvqa.specks.glyphs import CHARACTERS
from jaxvqa.specks.scenes import COLORS, SHAPES, SIZE, Plate, Scene, crop_around, random_view, scene
from jaxvqa.specks.strata import STRATA, samples

__all__ = [
    "CHARACTERS",
    "COLORS",
    "SHAPES",
    "SIZE",
    "STRATA",
    "Plate",
    "Scene",
    "crop_around",
    "random_view",
    "samples",
    "scene",
]
