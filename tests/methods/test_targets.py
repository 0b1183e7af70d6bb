"""What a question is about: the examples a model is shown, its reply taken apart, and rules instead of a model."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa.errors import UserError
from jaxvqa.methods.targets import EXAMPLES, Target, by_rules, named, parse, read_examples, response, stem
from jaxvqa.specks.questions import OBJECTS, objects_answer

NAMED = "So I need the information about the following objects: "


def names(targets):
    return [f"all {target.name}" if target.every else target.name for target in targets]


def test_the_examples_are_a_conversation_in_zoomeyes_words():
    turns = EXAMPLES.turns("Where is it?")
    assert len(turns) == 13
    assert turns[6] == (
        "Question: Is the man with the umbrella in front of or behind the woman with the white hat?\n"
        "If you want to answer the question, which objects' information do you need?"
    )
    assert turns[7] == (
        "To answer the question, I need know the location of man with the umbrella and woman with the white hat so "
        "that I can compare the positions. So I need the information about the following objects: man with the "
        "umbrella and woman with the white hat."
    )
    assert turns[-1].startswith("Question: Where is it?\nIf you want")


def test_the_examples_are_understood_as_they_are_meant():
    assert [names(parse(reply)) for reply in EXAMPLES.response_list] == [
        ["dog with a collar"],
        ["red bicycle", "blue van"],
        ["sign above the shop door"],
        ["man with the umbrella", "woman with the white hat"],
        ["green flag"],
        ["all boat"],
    ]


def test_the_bundled_model_was_taught_the_same_words():
    assert EXAMPLES.asked("What?") == f"Question: What?\n{OBJECTS}"
    assert response("red plate", "read it") == objects_answer("red plate", "read it")


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("black board", ["black board"]),  # as one of ZoomEye's examples ends
        ("white top pedestrian in the middle, gray car on the left side.", None),
        ("red car, blue van, and dog.", ["red car", "blue van", "dog"]),
        ("red car and Red Car and red car.", ["red car"]),
        ("his hat and the lady's bag.", ["the lady's bag"]),
        ("object that barks and hatter.", ["hatter"]),
        ("all cars and all people.", ["all car", "all people"]),
        ("All glass and allspice.", ["all glas", "allspice"]),
        ("dog.\nAnd that is it, cat.", ["dog"]),
        ("St. Bernard..", ["St. Bernard."]),
        (".", []),
        ("all ", ["all"]),
    ],
)
def test_the_reply_is_taken_apart(told, found):
    found = ["white top pedestrian in the middle", "gray car on the left side"] if found is None else found
    assert names(parse(f"To answer, I look. {NAMED}{told}")) == found


@pytest.mark.parametrize("reply", ["", "The dog.", "So I need the information about the dog."])
def test_a_reply_in_other_words_names_nothing(reply):
    assert parse(reply) == ()


@given(st.text())
def test_any_reply_and_any_question_is_survived(text):
    for target in (*parse(NAMED + text), *by_rules(text), *named([text])):
        assert target.name.strip() == target.name != ""


def test_names_by_hand_may_ask_for_all_of_a_kind():
    assert named([" dog", "all red cars", "DOG", ""]) == (Target("dog"), Target("red car", every=True))


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("What character is on the blue square?", ["blue square"]),
        ("What characters are on the red cross and the white diamond?", ["red cross", "white diamond"]),
        ("Is the red bicycle on the left or the right of the blue van?", ["red bicycle", "blue van"]),
        ("Is the man with the umbrella behind the woman?", ["man with the umbrella", "woman"]),
        ("What colour is the dog's collar in the picture?", ["dog's collar"]),
        ("What is the color of the car, a van or an ox?", ["car", "van", "ox"]),
        ("What does the small sign say?", ["small sign"]),
        ("How many red plates are there?", ["all red plate"]),
        ("How many of the boats are near the shore?", ["all boat"]),
        ("What is the number of cars?", ["all car"]),
        ("What is the color of his hat?", []),
        ("Who is she?", []),
        ("How many?", []),
        ("the", []),
        ("", []),
    ],
)
def test_rules_name_what_follows_an_article(question, found):
    assert names(by_rules(question)) == found


def test_the_stem_is_the_first_line_without_images():
    assert stem("<image>\nWhat is red?\n(A) this (B) that") == "What is red?"
    assert stem("What is in <image>?") == "What is in  ?"


def test_examples_come_from_a_file_with_zoomeyes_keys(tmp_path):
    file = tmp_path / "mine.json"
    content = {"question_template": "Q: {}!", "question_list": ["a"], "response_list": ["b"]}
    file.write_text(json.dumps(content))
    assert read_examples(str(file)).turns("c {}") == ["Q: a!", "b", "Q: c {}!"]
    assert read_examples(None) is EXAMPLES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON file with question_template, question_list, response_list"),
        ("[]", "expected a JSON file"),
        ('{"question_template": "{}", "question_list": []}', "response_list"),
        ('{"question_template": 3, "question_list": [], "response_list": []}', "expected a JSON file"),
        ('{"question_template": "?", "question_list": [], "response_list": []}', r"expected \{\} in question_template"),
        ('{"question_template": "{}", "question_list": ["a"], "response_list": []}', "one response for each question"),
    ],
)
def test_a_file_that_holds_no_examples_is_refused(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_examples(str(file))
    with pytest.raises(UserError, match=r"none\.json"):
        read_examples(str(tmp_path / "none.json"))
