import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvqa.prompts import TEMPLATES, render
from jaxvqa.specks import CHARACTERS, COLORS, SHAPES, scene
from jaxvqa.specks.questions import questions
from jaxvqa.specks.tokenizer import BOS, SYSTEM, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_it_is_learned_the_same_each_time(tokenizer):
    assert train_tokenizer().to_str() == tokenizer.to_str()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_decodes_to_itself(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not any(special in text for special in ("<s>", "</s>", "<unk>", "<image>")):
        assert tokenizer.decode(ids) == text


def test_what_is_answered_is_one_token_each(tokenizer):
    words = [
        f" {w}" for w in (*COLORS, *SHAPES, *CHARACTERS, *range(1, 10), "Yes", "No", "left", "right", "above", "below")
    ]
    for word in words + [f"{n:02d}" for n in range(100)]:
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1, word


def test_prompts_are_about_a_token_a_word(tokenizer):
    for n in range(5):
        for q in questions(scene(4, n), np.random.default_rng(n)):
            text = f"{q.text} {q.ending}"
            assert len(tokenizer.encode(text, add_special_tokens=False).ids) <= 1.5 * len(text.split()) + 4, text


def test_bos_opens_every_text(tokenizer):
    assert tokenizer.encode("a").ids[0] == tokenizer.token_to_id(BOS)


def test_its_system_text_is_that_of_the_template():
    assert render("vicuna_v1", "x").text.startswith(SYSTEM + "<image>")
    assert SYSTEM == TEMPLATES["vicuna_v1"].system + TEMPLATES["vicuna_v1"].user
