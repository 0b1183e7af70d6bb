import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvqa.specks import random_view, scene
from jaxvqa.specks.questions import GONE, KINDS, THERE, box_hundredths, caption, has_rivals, questions
from jaxvqa.specks.scenes import LAYOUTS

indices, kinds = st.integers(0, 10_000), st.sampled_from(sorted(LAYOUTS))


def asked(index, whole, kind="small"):
    made, rng = scene(6, index, kind), np.random.default_rng(index)
    view = made.box if whole else random_view(rng, made.plates)
    return made, view, questions(made, rng, view)


@pytest.mark.parametrize(
    ("kind", "missing"), [("small", {"pair"}), ("crowded", {"describe", "color"}), ("whole", set())]
)
def test_a_whole_scene_gives_questions_of_every_kind_that_it_allows(kind, missing):
    """Small characters cannot be read; of thirty plates a caption would be too long, and no shape is alone."""
    assert {q.kind for n in range(30) for q in asked(n, True, kind)[2]} == set(KINDS) - missing


@settings(max_examples=60, deadline=None)
@given(indices, st.booleans(), st.sampled_from(["small", "crowded", "whole"]))
def test_questions_are_true_of_what_the_view_shows(index, whole, kind):
    made, view, found = asked(index, whole, kind)
    seen = [p for p in made.plates if p.visible(view) > THERE]
    by_name = {p.name: p for p in made.plates}
    for q in found:
        assert all(t in seen for t in q.targets)
        if q.kind == "read":
            assert q.answer == q.targets[0].character and q.targets[0].name in q.text
        elif q.kind == "pair":
            a, b = q.targets
            assert q.text == f"What characters are on the {a.name} and the {b.name}?" and a is not b
            assert q.answer == f"{a.character} and {b.character}" and a.legible(view) and b.legible(view)
        elif q.kind in ("color", "shape"):
            assert q.answer == getattr(q.targets[0], q.kind) and q.answer not in q.text
            assert sum(p.color in q.text or p.shape in q.text for p in seen) == 1
        elif q.kind == "presence":
            name = q.text.removeprefix("Is there a ").removesuffix(" in the image?")
            visible = by_name[name].visible(view) if name in by_name else 0.0
            assert visible > THERE if q.answer == "Yes" else visible < GONE
        elif q.kind == "relation":
            a, b = q.targets
            axis = 0 if "left" in q.text else 1
            assert (a.center[axis] > b.center[axis]) == (q.answer in ("right", "below"))
            assert q.text.index(a.name) < q.text.index(b.name)
        elif q.kind == "count":
            matching = [p for p in seen if p.color in q.text or p.shape in q.text]
            assert q.answer == str(len(matching)) and len(q.targets) == len(matching)
        elif q.kind == "where":
            assert json.loads(q.answer) == [n / 100 for n in box_hundredths(q.targets[0].box, view)]


@settings(max_examples=40, deadline=None)
@given(indices, kinds)
def test_boxes_are_those_of_the_targets(index, kind):
    _, _, found = asked(index, True, kind)
    for q in found:
        if q.targets:
            x1, y1, x2, y2 = q.box
            assert all(x1 <= t.box[0] and y1 <= t.box[1] and x2 >= t.box[2] and y2 >= t.box[3] for t in q.targets)
        else:
            assert q.box is None


def test_presence_is_balanced_on_whole_scenes():
    answers = [q.answer for n in range(50) for q in asked(n, True)[2] if q.kind == "presence"]
    assert answers.count("Yes") == answers.count("No") == len(answers) / 2


def test_a_caption_names_plates_from_left_to_right_and_only_legible_characters():
    made = scene(6, 0)
    names = [p.name for p in sorted(made.plates, key=lambda p: p.center[0])]
    assert caption(made.plates, made.box) == f"There are {len(names)} plates: {', '.join(names)}."
    plate = made.plates[0]
    assert caption((plate,), plate.box) == f"There is one plate: {plate.name} {plate.character}."
    assert caption((), made.box) == "There is nothing in the image."


def test_the_same_generator_gives_the_same_questions():
    made = scene(6, 1)
    first, second = (questions(made, np.random.default_rng(9)) for _ in range(2))
    assert first == second


@settings(max_examples=40, deadline=None)
@given(indices, kinds, st.integers(0, 3))
def test_rivals_are_counted_by_colour_and_by_shape_without_the_plate_itself(index, kind, count):
    plates = scene(6, index, kind).plates
    for plate in plates:
        by_color = [p for p in plates if p.color == plate.color]
        by_shape = [p for p in plates if p.shape == plate.shape]
        assert has_rivals(plate, plates, count) == (len(by_color) > count and len(by_shape) > count)
