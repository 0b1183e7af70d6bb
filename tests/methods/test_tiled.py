"""Methods on the bundled model that sees an image in tiles: on trained weights, maps and views are those of detail."""

import pytest

import jaxvqa
from jaxvqa.bundled import SPECKS_LLAVA_NEXT
from jaxvqa.engine import Engine
from jaxvqa.geometry import covers
from jaxvqa.methods.focus import MAIN_IMAGE, Focus
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import Vicrop
from jaxvqa.specks.strata import samples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine():
    return Engine(jaxvqa.load(SPECKS_LLAVA_NEXT), batch_size=2)


@pytest.fixture(scope="module")
def asked():
    return list(samples("small", "dev", 2))


def test_vicrop_finds_and_reads_small_characters(engine, asked):
    for sample, answer in zip(asked, engine.run(asked, Vicrop(max_new_tokens=8)), strict=True):
        assert answer.error is None and answer.forward_passes == (2, 1)
        assert answer.grid.shape == (32, 32) and covers(answer.boxes[0], sample.boxes[0])
        assert answer.text == sample.answer


def test_focus_shows_the_scene_and_a_crop(engine, asked):
    """Its map has a cell for 2 x 2 of the tiles' tokens."""
    method = Focus(n_steps=2, overrun=False, like=Vanilla(max_new_tokens=8))
    for answer in engine.run(asked, method):
        assert answer.error is None and answer.options["final"] == "two_image"
        assert answer.grid.shape == (16, 16) and len(answer.boxes) == 1 and answer.forward_passes == (3, 1)
        assert MAIN_IMAGE.format(colour="red") in answer.log[-1].prompt
