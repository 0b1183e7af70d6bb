import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvqa.specks import CHARACTERS, COLORS, SHAPES, SIZE, crop_around, random_view, scene
from jaxvqa.specks.questions import has_rivals
from jaxvqa.specks.scenes import LAYOUTS
from jaxvqa.specks.views import VIEWS, open_views, render, view_boxes

indices, kinds = st.integers(0, 10_000), st.sampled_from(sorted(LAYOUTS))

LAYOUT_HASHES = {
    "small": "cf2d4f405621df46",
    "crowded": "1873135a7cafc81b",
    "whole": "ff71930ca5617677",
    "dense": "4208ac687c6da1bc",
}
PICTURE_HASHES = {
    "small": "bbfa1da21ceaa48e",
    "crowded": "fba478091ea71da6",
    "whole": "9ea687626fa14cfe",
    "dense": "bb81a13166d5a37d",
}
LEVELS_BEGIN, MARGIN = {"small": 7.875, "crowded": 22.0, "whole": 45.875, "dense": 11.75}, 125


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_a_scene_is_a_function_of_seed_and_index():
    first, again, other = scene(7, 11), scene(7, 11), scene(7, 12)
    assert first.plates == again.plates and digest(first.image) == digest(again.image)
    assert digest(first.image) != digest(other.image)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_hundred_layouts_never_change(kind):
    """Rendered views and published figures hang on them; a change of the generator must be deliberate.

    Layouts are integers drawn from NumPy's PCG64, so the hash is exact.
    """
    plates = [
        (p.color, p.shape, p.character, p.box, p.character_box) for n in range(100) for p in scene(3, n, kind).plates
    ]
    assert hashlib.sha256(repr(plates).encode()).hexdigest()[:16] == LAYOUT_HASHES[kind]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_hundred_pictures_look_the_same_on_every_machine(kind, measured):
    """Textures are made of sines and Pillow's float resampling, which may round differently elsewhere: a few pixels by
    one level. So the hash is of the means of 8 x 8 blocks in five levels, which begin where no block is near an edge:
    to cross one, more than `MARGIN` of the 12544 pixels of a block would have to differ. The test checks that, too.
    """
    blocks = np.stack([scene(3, n, kind).image.reshape(8, 112, 8, 112, 3).mean((1, 3)) for n in range(100)])
    level = (blocks + LEVELS_BEGIN[kind]) / 64
    margin = 64 * 112**2 * float(np.abs(level - level.round()).min())
    measured(f"{kind} pictures: pixels of a block that may differ by a level", margin)
    assert margin > MARGIN
    assert hashlib.sha256(np.floor(level).astype(np.uint8).tobytes()).hexdigest()[:16] == PICTURE_HASHES[kind]


@settings(max_examples=40, deadline=None)
@given(indices, kinds)
def test_plates_lie_inside_apart_and_carry_their_character(index, kind):
    made, layout = scene(5, index, kind), LAYOUTS[kind]
    assert layout.plates[0] <= len(made.plates) <= layout.plates[1]
    for n, plate in enumerate(made.plates):
        x1, y1, x2, y2 = plate.box
        assert 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE and x2 - x1 == y2 - y1
        assert layout.side[0] <= x2 - x1 <= layout.side[1]
        a1, b1, a2, b2 = plate.character_box
        assert x1 < a1 < a2 < x2 and y1 < b1 < b2 < y2
        assert layout.character[0] <= b2 - b1 <= layout.character[1]
        assert plate.color in COLORS and plate.shape in SHAPES and plate.character in CHARACTERS
        assert all(plate.visible(other.box) == 0 for other in made.plates[n + 1 :])


def test_the_kinds_are_those_that_the_strata_promise():
    sizes = {kind: (layout.plates, layout.character) for kind, layout in LAYOUTS.items()}
    assert sizes["small"] == ((8, 12), (14, 20)) and sizes["crowded"] == ((24, 30), (32, 42))
    assert sizes["whole"][0] == (3, 6)
    assert len(CHARACTERS) == 10


@settings(max_examples=40, deadline=None)
@given(indices, st.sampled_from(["small", "crowded", "whole"]))
def test_names_are_unique(index, kind):
    plates = scene(5, index, kind).plates
    assert len({p.name for p in plates}) == len(plates)


@settings(max_examples=40, deadline=None)
@given(indices)
def test_small_scenes_have_rivals_and_a_plate_that_is_the_only_one_of_its_colour_or_shape(index):
    plates = scene(5, index).plates
    assert any(has_rivals(p, plates) for p in plates)
    for attribute in ("color", "shape"):
        values = [getattr(p, attribute) for p in plates]
        assert any(values.count(v) == 1 for v in values), f"no plate is the only one of its {attribute}"


def test_plates_are_painted_in_their_colour_and_the_character_in_another():
    made = scene(5, 3)
    for plate in made.plates:
        x1, y1, x2, y2 = plate.character_box
        ink = made.image[y1:y2, x1:x2].reshape(-1, 3).astype(int)
        distance = np.abs(ink - COLORS[plate.color]).sum(1)
        assert (distance < 60).any() and (distance > 200).any(), plate.name


def test_a_view_is_what_the_bundled_processor_makes_of_the_crop():
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}, do_normalize=False, do_rescale=False
    )
    made = scene(5, 4)
    for box in (made.box, crop_around(made.plates[0])):
        expected = processor(images=[made.picture.crop(box)], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(made.view(box), expected.transpose(1, 2, 0).astype(np.uint8))


def test_small_characters_are_legible_in_a_close_crop_only_and_larger_ones_in_the_scene():
    for index in range(20):
        for kind in LAYOUTS:
            made = scene(5, index, kind)
            assert all(plate.legible(crop_around(plate)) for plate in made.plates)
            assert {plate.legible(made.box) for plate in made.plates} == {kind in ("crowded", "whole")}


@settings(max_examples=40, deadline=None)
@given(indices, kinds)
def test_random_views_are_squares_inside_the_scene(index, kind):
    made = scene(5, index, kind)
    x1, y1, x2, y2 = random_view(np.random.default_rng(index), made.plates)
    assert 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE and x2 - x1 == y2 - y1
    mean = np.mean([plate.side for plate in made.plates])
    assert int(1.3 * mean) <= x2 - x1 <= min(6.4 * mean, 800)


@settings(max_examples=40, deadline=None)
@given(indices, kinds)
def test_a_crop_around_a_plate_is_a_square_inside_the_scene_that_holds_it(index, kind):
    for plate in scene(5, index, kind).plates:
        x1, y1, x2, y2 = crop_around(plate)
        assert 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE
        assert x2 - x1 == y2 - y1 == max(160, round(1.4 * plate.side))
        assert plate.visible((x1, y1, x2, y2)) == 1


def test_views_rendered_ahead_are_those_of_the_scenes(tmp_path):
    path = tmp_path / "views.u8"
    render(scene, 5, 0, 2, path, 2)
    stored = open_views(path, 2)
    assert stored.shape == (2, VIEWS, 128, 128, 3)
    made = scene(5, 1)
    for n, box in enumerate(view_boxes(made)):
        np.testing.assert_array_equal(stored[1, n], made.view(box))
