import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_blip import tiny_blip

import jaxvqa
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.matcher import MAX_TOKENS, Matcher, clean, collate, load_matcher


@pytest.fixture(scope="module")
def matcher(tmp_path_factory):
    return load_matcher(tiny_blip(tmp_path_factory.mktemp("blip") / "tiny"))


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Is there a RED square?  ", "is there a red square?"),
        ('a "sign": (small) #1!', "a sign small 1"),
        ("e.g.~this;that*", "e g this that"),
        ("word " * 60, ("word " * 50).strip()),
    ],
)
def test_texts_are_cleaned_as_lavis_does(text, cleaned):
    assert clean(text) == cleaned


@given(text=st.text(max_size=400))
def test_any_text_becomes_at_most_35_tokens_between_the_first_and_the_last(matcher, text):
    ids, special = matcher.tokenise(text), matcher.tokenizer
    assert ids[0] == special.cls_token_id and ids[-1] == special.sep_token_id
    assert 2 <= len(ids) <= MAX_TOKENS and ids.max() < matcher.config.text.vocab_size


def test_a_text_that_is_cut_is_told_and_keeps_its_last_token(matcher):
    text = "the red square " * 20
    with pytest.warns(UserWarning, match="reads 35 of the"):
        ids = matcher.tokenise(text)
    assert ids.tolist() == matcher.tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"]


def test_the_first_token_may_be_another(tmp_path):
    matcher = load_matcher(tiny_blip(tmp_path / "a"), first_token=4)
    assert matcher.tokenise("red")[0] == 4
    with pytest.raises(UserError, match="first_token 999"):
        load_matcher(tmp_path / "a", first_token=999)


def test_padding_changes_nothing(matcher, image):
    rows = [matcher.encode(image, text) for text in ("the red square", "plate")]
    padded, alone = collate(rows, length=12), [collate([row]) for row in rows]
    logits = np.asarray(matcher.match_logits(padded))
    maps = np.asarray(matcher.gradcam(padded))
    for i, pair in enumerate(alone):
        np.testing.assert_allclose(logits[i], matcher.match_logits(pair)[0], atol=1e-6)
        tokens = len(rows[i].ids)
        np.testing.assert_allclose(maps[i, :tokens], matcher.gradcam(pair)[0], atol=1e-7)
    with pytest.raises(UserError, match="5 tokens does not fit a batch of length 4"):
        collate(rows, length=4)


def test_a_probability_is_that_of_the_second_class(matcher, image):
    pair = matcher.encode(image, "the red square")
    no, yes = np.asarray(matcher.match_logits(pair))[0]
    np.testing.assert_allclose(matcher.probability(pair), [1 / (1 + np.exp(no - yes))], rtol=1e-5)


def test_a_map_covers_the_whole_image(matcher, image):
    pair = matcher.encode(image, "the red square")
    maps = np.asarray(matcher.gradcam(pair, layer=1, relu="grad"))
    assert maps.shape == (1, 5, 4, 4) and (maps >= 0).all()
    assert pair.geometry.mode == "squash" and pair.geometry.image_size == (90, 50)


def test_what_cannot_be_is_refused(matcher, image):
    pair = matcher.encode(image, "plate")
    with pytest.raises(JaxVQAError, match="text layer 3: the text encoder has 3 layers"):
        matcher.gradcam(pair, 3)
    with pytest.raises(JaxVQAError, match="relu 'max'"):
        matcher.gradcam(pair, relu="max")
    config = dataclasses.replace(matcher.config, vision=dataclasses.replace(matcher.config.vision, image_size=64))
    with pytest.raises(UserError, match="needs 64x64"):
        Matcher(config, matcher.params, matcher.tokenizer, matcher.image_processor, name="other")


def test_a_matcher_is_not_loaded_as_a_model_that_answers(tmp_path):
    with pytest.raises(UserError, match=r"use jaxvqa\.load_matcher"):
        jaxvqa.load(tiny_blip(tmp_path / "blip"))
