"""Specks as samples of a run, and how answers and boxes are judged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa.requests import Answer, Sample
from jaxvqa.specks import CHARACTERS
from jaxvqa.specks.evaluation import covers, reading_samples, right


def test_samples_are_named_by_their_scene_and_know_their_truth():
    samples = reading_samples(7, 2)
    assert [sample.id for sample in samples] == ["7/0", "7/1"]
    for sample in samples:
        x1, y1, x2, y2 = sample.box
        assert 0 <= x1 < x2 <= sample.image.width and 0 <= y1 < y2 <= sample.image.height
        assert sample.answer in CHARACTERS and "What character" in sample.question


@pytest.mark.parametrize(("text", "is_right"), [("K", True), (" k.", True), ("KK", False), ("", False)])
def test_case_and_a_full_stop_do_not_count(text, is_right):
    assert right(Answer(text), Sample((), "?", answer="K")) == is_right


@given(st.integers(0, 90), st.integers(0, 90), st.integers(1, 40), st.integers(1, 40))
def test_a_box_covers_a_target_when_it_holds_half_of_its_area(x, y, width, height):
    target = (30, 30, 50, 60)
    held = sum(x <= u < x + width and y <= v < y + height for u in range(30, 50) for v in range(30, 60))
    assert covers((x, y, x + width, y + height), target) == (held >= 300)
