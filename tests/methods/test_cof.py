"""CoF asks where the answer lies, then asks the question with those tokens reweighted."""

import json

import numpy as np
import pytest
from tiny import tiny_llava

import jaxvqa
from jaxvqa import methods
from jaxvqa.engine import Engine
from jaxvqa.errors import UserError
from jaxvqa.methods.cof import Cof, reweight
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.requests import Reply
from tests.methods.driven import FACTS, drive, picture, sample_of

SQUARE = picture((480, 480))


def bound(facts=FACTS, **options):
    return methods.bind(Cof(**options), facts)


def grounded(reply, image=SQUARE, facts=FACTS, **options):
    """CoF's two requests and its answer, when the model replies so to the grounding prompt."""
    sample = sample_of(image, "What is red?\nAnswer briefly.")
    return drive(bound(facts, **options), sample, Reply(reply, ()), Reply("42", ()))


def test_grounding_asks_for_the_first_line_and_the_answer_for_all_of_it():
    (first, second), answer = grounded("[0.40, 0.40, 0.60, 0.60]")
    assert first.prompt.text.endswith(
        "USER: <image>\nWhat is red?\nAccording to the information in the image and the question, \n"
        "detail the bounding box of the region in the image that contains the answer in JSON format. ASSISTANT:"
    )
    assert "What is red?\nAnswer briefly.\nAnswer the question using" in second.prompt.text
    assert first.taps is None and second.taps is reweight and answer.text == "42" and answer.status == "ok"
    assert (first.max_new_tokens, second.max_new_tokens) == (128, 128)
    np.testing.assert_allclose(answer.boxes, [[192, 192, 288, 288]], atol=1e-3)


@pytest.mark.parametrize(
    ("reply", "options", "ranges", "count"),
    [
        ("[0.4, 0.4, 0.6, 0.6]", {}, (8, 14, 8, 14), 49),
        ("[0.4, 0.4, 0.6, 0.6]", {"alpha": 1.0}, (9, 13, 9, 13), 25),
        ("[0.31, 0.2, 0.55, 0.8]", {"alpha": 1.0}, (2, 16, 4, 18), 225),
        ("[0.31, 0.2, 0.55, 0.8]", {"alpha": 1.0, "preset": "strict"}, (0, 23, 0, 23), 576),
        ("[0.4, 0.4, 0.6, 0.6] [0.0, 0.0, 0.1, 0.1]", {"alpha": 1.0, "multi_box": "first"}, (9, 13, 9, 13), 25),
        ("I see none.", {}, (0, 23, 0, 23), 576),
        ("I see none.", {"fallback": "none"}, None, 0),
    ],
)
def test_the_reply_selects_the_tokens(reply, options, ranges, count):
    (_, second), answer = grounded(reply, **options)
    mask, _ = second.args
    rows, columns = np.nonzero(mask)
    assert mask.sum() == count
    assert ranges is None or (columns.min(), columns.max(), rows.min(), rows.max()) == ranges
    np.testing.assert_array_equal(answer.grid, mask)


def test_a_reply_without_a_box_is_said_to_be_one():
    assert grounded("I see none.")[1].status == "nothing found"
    assert grounded("[0.5, 0.5, 0.5, 0.5]")[1].status == "degenerate"


def test_boxes_of_a_wide_image_come_back_in_its_pixels():
    """480 x 240 in a square of 480: 120 px of padding above."""
    _, answer = grounded("[0.25, 0.50, 0.50, 0.60]", picture((480, 240)))
    np.testing.assert_allclose(answer.boxes, [[120, 120, 240, 168]], atol=1e-3)


@pytest.mark.parametrize(
    ("facts", "reply"),
    [
        (FACTS._replace(view="squash"), "[120, 60, 240, 180]"),
        (FACTS._replace(view="squash", family="qwen2_5_vl"), "[84, 84, 168, 252]"),  # of 336 x 336
        (FACTS._replace(view="squash", family="internvl"), "[[250, 250, 500, 750]]"),
        (FACTS, "[120, 180, 240, 300]"),  # of the square, with 120 px of padding above
    ],
)
def test_boxes_in_pixels_are_read_in_the_units_of_the_family(facts, reply):
    _, answer = grounded(reply, picture((480, 240)), facts)
    np.testing.assert_allclose(answer.boxes, [[120, 60, 240, 180]], atol=1e-3)


def test_the_factor_is_the_papers_for_the_size_of_the_model():
    small, large = bound(), bound(FACTS._replace(num_layers=40))
    assert (small.lam, small.alpha, len(small.layers)) == (2.0, 1.3, 32)
    assert (large.lam, large.alpha, len(large.layers)) == (4.5, 1.0, 40)
    (_, second), _ = grounded("", lam=3.0, layers=(1,))
    np.testing.assert_array_equal(second.args[1], [[1], [3]])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lam": -1.0}, "lam=-1.0"), ({"preset": "loose"}, "preset='loose'"), ({"layers": (32,)}, "layers 0 to 31")],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        bound(**options)


def test_a_factor_of_one_gives_vanillas_answers_in_two_passes(tmp_path):
    vlm = jaxvqa.load(tiny_llava(tmp_path / "tiny", text_layers=3, vision_layers=2, feature_layer=-1), dtype="float32")
    like = Vanilla("vicuna_v1", max_new_tokens=6)
    samples = [sample_of(picture((60, 40), n), id=str(n)) for n in range(2)]

    def texts(method):
        answers = list(Engine(vlm, batch_size=2, lengths=(192, 256)).run(samples, method))
        assert all(answer.error is None for answer in answers), answers[0].error
        return [answer.text for answer in answers], answers[0]

    plain, _ = texts(like)
    same, answer = texts(Cof(lam=1.0, like=like))
    other, _ = texts(Cof(lam=1e6, like=like))
    assert same == plain != other
    assert answer.forward_passes == (1, 1) and json.dumps(answer.record())
