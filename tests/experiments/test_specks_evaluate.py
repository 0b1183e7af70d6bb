"""What the evaluation of a Specks model asks, and how it reads and judges what comes back; without a model."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageChops

from jaxvqa.geometry import covers
from jaxvqa.requests import Reply, Sample
from jaxvqa.specks.strata import samples


@pytest.fixture(scope="module")
def script():
    file = Path(__file__).parents[2] / "experiments" / "specks" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("specks_evaluate", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shows(picture, sample, box) -> bool:
    return ImageChops.difference(picture, sample.image.crop(box)).getbbox() is None


def test_a_question_is_asked_in_every_form(script):
    sample = samples("small")[3]
    asked = script.reading(sample)
    images = {form: len(request.images) for form, request in asked.items()}
    assert images == {
        "whole image": 1, "no image": 0, "ground-truth crop alone": 1,
        "image + ground-truth crop": 2, "image + random crop": 2, "image + rival's crop": 2,
    }  # fmt: skip
    assert all(sample.question in request.prompt.text for request in asked.values())
    (alone,) = asked["ground-truth crop alone"].images
    assert shows(alone, sample, script.around(sample.box)) and alone.size == (160, 160)
    assert covers(script.around(sample.box), sample.box)
    rival = asked["image + rival's crop"].images[1]
    assert any(shows(rival, sample, script.around(box)) for box in sample.rivals)


def test_the_rivals_crop_leaves_the_target_out(script):
    for sample in samples("small", count=40):
        assert any(not covers(script.around(box), sample.box) for box in sample.rivals)


def test_the_crop_of_several_targets_holds_them_all(script):
    for stratum in ("near", "far", "whole"):
        for sample in samples(stratum, count=20):
            square = script.around(sample.box)
            assert all(covers(square, box) for box in sample.boxes)
            assert 0 <= square[0] and 0 <= square[1] and square[2] <= 896 and square[3] <= 896


def test_the_plate_is_asked_for_by_its_name(script):
    sample = samples("crowded")[0]
    asked, name = script.boxes(sample), script.name_in(sample.question)
    assert len(name.split()) == 2 and f"Where is the {name}?" in asked["where"].prompt.text
    assert "detail the bounding box" in asked["grounding"].prompt.text


@given(st.lists(st.integers(0, 99), min_size=4, max_size=4))
def test_a_box_is_read_as_the_model_writes_it(script, hundredths):
    text = "[" + ", ".join(f"0.{n:02d}" for n in hundredths) + "]"
    assert script.parse(text) == pytest.approx([8.96 * n for n in hundredths])


@pytest.mark.parametrize("text", ["", "red", "[0.1, 0.2, 0.3]", "[1, 2, 3, 4]"])
def test_what_is_no_box_overlaps_nothing(script, text):
    chosen = [Sample((), "?", boxes=((0, 0, 896, 896),))]
    lines = script.box_lines("small", chosen, [{"where": Reply(text, ())}], {})
    assert [line.value for line in lines] == [0, 0]


def test_lines_say_what_was_asked_and_whether_it_is_met(script):
    line = script.Line
    assert script.text_of(line("a", 0.9, 0.85)).split() == ["a", "0.900", ">=", "0.85", "met"]
    assert script.text_of(line("a", 0.8, 0.85)).endswith("NOT MET")
    assert script.text_of(line("a", 0.3, -math.inf, 0.3)).endswith("<= 0.30       met")
    assert script.text_of(line("a", 0.8, 0.5, 0.75)).split()[2:] == ["0.50", "to", "0.75", "NOT", "MET"]
    assert script.text_of(line("a", 0.8)).split() == ["a", "0.800"]
    assert script.text_of(line("a", 0.1, interval=(-0.05, 0.2))).split()[1:] == ["0.100", "[-0.050,", "+0.200]"]


def test_accuracies_are_by_form_and_differences_are_paired(script):
    found = {"whole image": np.array([True, False, False, False]), "image + crop": np.array([True, True, True, False])}
    lines = script.accuracies("small", found, {"whole image": (-math.inf, 0.3)})
    assert [(line.name, line.value) for line in lines] == [
        ("small: whole image", 0.25), ("small: image + crop", 0.75), ("small: image + crop, less whole image", 0.5),
    ]  # fmt: skip
    assert lines[2].interval[0] < 0.5 < lines[2].interval[1]


def test_the_layers_are_all_ranges(script):
    assert script.ranges(3) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert script.layer_text(2, 3) == "layer 2" and script.layer_text(1, 4) == "layers 1-3"
