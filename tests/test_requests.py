"""What methods ask with and answer with: plain data that says what it holds."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import cells_from

from jaxvqa.errors import UserError
from jaxvqa.requests import Answer, Asked, Call, Cost, Generate, Passes, Read, Row, Sample
from jaxvqa.taps import ReadSpec

IMAGE = Image.new("RGB", (8, 6))


def test_one_image_is_a_list_of_one():
    for given_ in (IMAGE, [IMAGE], (IMAGE,)):
        assert Sample(given_, "?").images == (IMAGE,)
        assert Generate(given_, "?").images == (IMAGE,)
    assert Sample("a.png", "?").images == ("a.png",)
    assert Sample(b"bytes", "?").images == (b"bytes",)
    assert Sample(bytearray(b"bytes"), "?").images == (b"bytes",)
    assert Generate((), "?").images == ()


def test_no_image_at_all_is_refused():
    with pytest.raises(UserError, match="no image"):
        Sample(None, "?")


def test_what_needs_an_image_says_so_where_there_is_none():
    with pytest.raises(UserError, match="sample '7' has no image"):
        _ = Sample((), "?", id="7").image
    row = Row(jnp.zeros((1, 4), int), jnp.int32(4), jnp.zeros(1, int), jnp.ones(1, bool), None, None, (2, 2), 4)
    with pytest.raises(UserError, match="image 1 of a request with 1 images"):
        row.on_image(jnp.zeros(4), 1)


def test_a_samples_id_is_text():
    assert Sample(IMAGE, "?", id=5).id == "5"
    assert Sample(IMAGE, "?", id=None).id == ""


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=4))
def test_a_samples_box_holds_all_its_boxes(boxes):
    x1, y1, x2, y2 = np.array(boxes).T
    sample = Sample(IMAGE, "?", boxes=boxes)
    assert sample.boxes == tuple(boxes)
    assert sample.box == (x1.min(), y1.min(), x2.max(), y2.max())


def test_a_sample_without_boxes_has_no_box():
    assert Sample(IMAGE, "?").boxes == Sample(IMAGE, "?").rivals == ()
    assert Sample(IMAGE, "?").box is None and Sample(IMAGE, "?").other is None


def test_requests_are_frozen_and_name_their_model():
    request = Read(IMAGE, "?", ReadSpec(), model="big")
    assert request.model == "big"
    with pytest.raises(AttributeError):
        request.rows = "question"


def test_a_call_is_no_forward_pass():
    assert (Call.passes, Generate.passes) == (0, 1)


@given(grid=st.sampled_from([(2, 3), (4, 4)]), before=st.integers(0, 7), seed=st.integers(0, 99))
def test_a_row_cuts_the_cells_of_each_image_out_of_a_key_axis(grid, before, seed):
    (h, w), after = grid, 7 - before
    first, second = np.random.default_rng(seed).random((2, h, w)).astype(np.float32)
    axis = np.concatenate([np.full(before, 7.0), first.ravel(), [8.0], second.ravel(), np.full(after, 9.0)])
    starts = jnp.array([before, before + h * w + 1])
    row = Row(
        cells_from(starts, grid),
        jnp.int32(len(axis)),
        jnp.zeros(1, int),
        jnp.ones(1, bool),
        None,
        None,
        grid,
        len(axis),
    )
    both = jnp.stack([axis, -axis]).astype(jnp.float32)
    np.testing.assert_array_equal(row.on_image(both), np.stack([first, -first]))
    np.testing.assert_array_equal(row.on_image(both, 1), np.stack([second, -second]))


@given(before=st.integers(0, 4), seed=st.integers(0, 99))
def test_an_edit_of_cells_lies_on_their_keys_and_nowhere_else(before, seed):
    """In any order, and with padding behind the cells: what `on_image` reads is what `on_keys` wrote."""
    rng = np.random.default_rng(seed)
    order, values = before + rng.permutation(6), rng.random((2, 1, 8)).astype(np.float32)
    cells = jnp.array([[*order, -1, -1]])
    row = Row(cells, jnp.int32(10), jnp.zeros(1, int), jnp.ones(1, bool), None, None, (1, 8), 12)
    keys = np.zeros((2, 12), np.float32)
    keys[:, order] = values[:, 0, :6]
    np.testing.assert_array_equal(row.on_keys(values), keys)
    np.testing.assert_array_equal(row.on_image(row.on_keys(values)), values * (np.arange(8) < 6))


def test_an_answers_boxes_are_an_array_whatever_was_given():
    assert Answer("x").boxes.shape == (0, 4)
    assert Answer("x", boxes=[(0, 1, 2.5, 3)]).boxes.tolist() == [[0, 1, 2.5, 3]]


def test_passes_add_up():
    assert Passes(search=2, final=1).total == 3


def test_a_record_is_json_and_names_what_the_command_line_prints():
    answer = Answer(
        "7", boxes=[(0, 0, 2, 2)], heatmap=np.zeros((4, 4)), forward_passes=Passes(2, 1),
        cost=Cost({"Read": 2}, 1, 3, 99), log=(Asked("Read", "prompt", "f32[4, 4]"),), method="vicrop",
        options={"layer": 3, "odd": object}, model="tiny",
        error=UserError("because"),
    )  # fmt: skip
    record = json.loads(json.dumps(answer.record()))
    assert {"text", "boxes", "forward_passes", "status", "method", "model", "seconds"} <= set(record)
    assert record["forward_passes"] == {"search": 2, "final": 1}
    assert record["error"] == "UserError: because"
    assert record["options"]["layer"] == 3
    assert "heatmap" not in record
