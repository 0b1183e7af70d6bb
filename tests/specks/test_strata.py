"""The strata: what each asks, that nothing seen whole tells the answer, and that pictures wait to be looked at."""

import pickle
from collections import Counter
from functools import cache
from math import dist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxvqa.errors import UserError
from jaxvqa.images import open_image
from jaxvqa.requests import Sample
from jaxvqa.specks import CHARACTERS, COLORS, SHAPES, scene
from jaxvqa.specks.questions import PLURALS, has_rivals
from jaxvqa.specks.strata import FAR, NEAR, SPLITS, STRATA, WHOLE, Samples, sample, samples

READING = ("small", "crowded")
PAIRS = ("near", "far")
numbers = st.integers(0, 999)


@cache
def every(stratum: str) -> list[Sample]:
    return list(samples(stratum))


def plates_of(one: Sample):
    return one.image._drawn.plates


def of(boxes, plates):
    return [plate for plate in plates if plate.box in boxes]


def chi_square(counts: np.ndarray) -> float:
    """Of a table of counts against independence of rows and columns (one row: against equal shares), in units of its
    standard deviation above its mean."""
    counts = np.atleast_2d(counts).astype(float)
    expected = counts.sum(0) * counts.sum(1, keepdims=True) / counts.sum() if len(counts) > 1 else counts.mean()
    free = (counts.shape[1] - 1) * max(1, counts.shape[0] - 1)
    return float((((counts - expected) ** 2 / expected).sum() - free) / np.sqrt(2 * free))


def table(rows, columns, row_names, column_names) -> np.ndarray:
    pairs = Counter(zip(rows, columns, strict=True))
    return np.array([[pairs[row, column] for column in column_names] for row in row_names])


def test_strata_have_a_development_and_a_test_split_with_seeds_of_their_own():
    assert set(STRATA) == {"small", "crowded", "near", "far", "whole", "presence"}
    assert SPLITS == {"dev": (2, 500), "test": (3, 1000)}
    assert not {1, 101, 201, 301} & {seed for seed, _ in SPLITS.values()}
    for split, (seed, size) in SPLITS.items():
        assert len(samples("whole", split)) == size
        assert samples("whole", split)[-1].id == f"whole/{seed}/{size - 1}"


def test_a_sample_is_the_same_whenever_it_is_drawn():
    for stratum in STRATA:
        first, again = samples(stratum, "dev", 9)[7], samples(stratum, "dev")[:20][7]
        assert (first.id, first.question, first.boxes, first.other) == (
            again.id, again.question, again.boxes, again.other,
        )  # fmt: skip
        assert np.array_equal(first.image, again.image)


def test_they_are_a_sequence():
    some = samples("small", "test", 6)
    assert [one.id for one in some] == [f"small/3/{n}" for n in range(6)]
    assert [one.id for one in some[4:]] == ["small/3/4", "small/3/5"] == [some[-2].id, some[-1].id]
    with pytest.raises(IndexError):
        some[6]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("odd",), "stratum 'odd'; known: small"),
        (("small", "train"), "split 'train'"),
        (("small", "dev", 501), "1 to 500"),
    ],
)
def test_what_there_is_not_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        samples(*call)


def test_no_two_samples_share_a_scene():
    for stratum in STRATA:
        plates = [tuple(plate.box for plate in plates_of(one)) for one in every(stratum)]
        assert len(set(plates)) == len(plates)


@given(st.sampled_from(READING), numbers)
def test_a_reading_target_has_two_rivals_of_its_colour_and_two_of_its_shape(stratum, number):
    one = sample(stratum, 3, number)
    plates = plates_of(one)
    (target,) = of(one.boxes, plates)
    assert one.question == f"What character is on the {target.name}?" and one.answer == target.character
    rivals = of(one.rivals, plates)
    assert sum(r.color == target.color for r in rivals) >= 2 and sum(r.shape == target.shape for r in rivals) >= 2


@given(st.sampled_from(sorted(STRATA)), numbers)
def test_rivals_share_a_colour_or_a_shape_with_a_target_and_are_none(stratum, number):
    one = sample(stratum, 3, number)
    plates, targets = plates_of(one), of(one.boxes, plates_of(one))
    named = [(t.color, t.shape) for t in targets] or [tuple(one.question.split()[3:5])]
    expected = {p.box for p in plates if p not in targets and any(p.color == c or p.shape == s for c, s in named)}
    assert set(one.rivals) == expected and len(one.rivals) == len(expected)


@given(st.sampled_from(sorted(STRATA)), numbers)
def test_the_other_question_is_about_another_plate(stratum, number):
    one = sample(stratum, 3, number)
    plates = plates_of(one)
    (plate,) = [p for p in plates if one.other == f"What character is on the {p.name}?"]
    assert plate.box not in one.boxes or len(one.boxes) == len(plates)
    assert one.other != one.question


@given(st.sampled_from(PAIRS), numbers)
def test_pairs_are_as_near_or_as_far_as_they_are_called(stratum, number):
    one = sample(stratum, 3, number)
    plates = plates_of(one)
    a, b = of(one.boxes, plates)
    if one.question.index(a.name) > one.question.index(b.name):
        a, b = b, a
    assert one.answer == f"{a.character} and {b.character}"
    assert dist(a.center, b.center) < NEAR if stratum == "near" else dist(a.center, b.center) > FAR
    assert has_rivals(a, plates, 1) and has_rivals(b, plates, 1)
    assert one.box == (
        min(a.box[0], b.box[0]), min(a.box[1], b.box[1]), max(a.box[2], b.box[2]), max(a.box[3], b.box[3]),
    )  # fmt: skip


@pytest.mark.parametrize("stratum", PAIRS)
def test_most_pairs_have_two_rivals_of_each_kind(stratum, measured):
    both = [all(has_rivals(t, plates_of(s)) for t in of(s.boxes, plates_of(s))) for s in every(stratum)]
    measured(f"{stratum}: share of pairs with two rivals of each attribute", float(np.mean(both)))
    assert np.mean(both) > 0.6


@given(numbers)
def test_half_of_presence_is_a_colour_and_a_shape_that_are_there_but_not_together(number):
    one = sample("presence", 3, number)
    plates = plates_of(one)
    name = one.question.removeprefix("Is there a ").removesuffix(" in the image?")
    color, shape = name.split()
    assert sum(p.color == color for p in plates) >= 2 and sum(p.shape == shape for p in plates) >= 2
    there = [p.box for p in plates if p.name == name]
    assert list(one.boxes) == there
    assert one.answer == ("Yes" if there else "No") == ("No" if number % 2 else "Yes")


@given(numbers)
def test_whole_scenes_are_asked_each_kind_in_turn(number):
    one, kind = sample("whole", 3, number), WHOLE[number % len(WHOLE)]
    targets, plates = of(one.boxes, plates_of(one)), plates_of(one)
    answers = {
        "read": lambda: targets[0].character,
        "color": lambda: targets[0].color,
        "shape": lambda: targets[0].shape,
        "count": lambda: str(sum(p.color in one.question or PLURALS[p.shape] in one.question for p in plates)),
        "relation": lambda: one.answer if one.answer in ("left", "right", "above", "below") else "",
    }
    assert one.answer == answers[kind]() and len(targets) == {"count": len(targets), "relation": 2}.get(kind, 1)
    assert all(t.box[2] - t.box[0] >= 120 for t in targets)


@pytest.mark.parametrize("stratum", (*READING, *PAIRS))
def test_answers_cannot_be_guessed_from_what_is_visible_whole(stratum, measured):
    """Uniform over the ten characters, independent of colour, shape and place: no statistic is four deviations off."""
    read, color, shape, place = [], [], [], []
    for one in every(stratum):
        for plate in of(one.boxes, plates_of(one)):
            read.append(plate.character)
            color.append(plate.color)
            shape.append(plate.shape)
            place.append(tuple(int(c // 448) for c in plate.center))
    quarters = sorted(set(place))
    tables = {
        "character": np.array([read.count(c) for c in CHARACTERS]),
        "character by colour": table(color, read, COLORS, CHARACTERS),
        "character by shape": table(shape, read, SHAPES, CHARACTERS),
        "character by quarter": table(place, read, quarters, CHARACTERS),
    }
    for name, counts in tables.items():
        assert abs(chi_square(counts)) < 4, f"{stratum}: {name}"
    guess = max(tables["character"]) / len(read)
    measured(f"{stratum}: accuracy of the most frequent character", guess)
    assert guess < 0.13


def test_the_statistic_would_see_a_leak():
    rng = np.random.default_rng(0)
    color, read = rng.integers(0, 8, 1000), rng.integers(0, 10, 1000)
    assert abs(chi_square(table(color, read, range(8), range(10)))) < 4
    leaked = np.where(rng.random(1000) < 0.2, color, read)
    assert chi_square(table(color, leaked, range(8), range(10))) > 4


def test_a_picture_is_rendered_when_it_is_looked_at():
    one = samples("small", "test", 1)[0]
    assert "picture" not in vars(one.image._drawn)
    assert (one.image.size, one.image.mode) == ((896, 896), "RGB")
    assert "picture" not in vars(one.image._drawn)
    expected = scene(3, 0).image
    for late in (samples("small")[0].image for _ in range(9)):
        assert np.array_equal(open_image(late), expected)
    assert np.array_equal(one.image.crop((10, 20, 90, 80)), expected[20:80, 10:90])
    assert np.array_equal(pickle.loads(pickle.dumps(one.image)), expected)


def test_drawing_on_a_picture_leaves_its_scene_alone():
    picture = samples("small", "test", 1)[0].image
    picture.paste((1, 2, 3), (0, 0, 896, 896))
    assert np.asarray(picture).max() == 3
    assert np.array_equal(picture._drawn.image, scene(3, 0).image)


def test_an_iteration_keeps_no_picture():
    """A thousand scenes are 2.4 GB."""
    some = samples("whole", "test", 3)
    assert isinstance(some, Samples) and all(isinstance(one.image, Image.Image) for one in some)
    for one in some:
        one.image.load()
    assert all("picture" not in vars(one.image._drawn) for one in some)
