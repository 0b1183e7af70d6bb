"""The page stands alone, shows everything it is given, and says it as text."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from jaxvqa.report.page import MAX_SIDE, Entry, Outcome, data_uri, render

VOID = {"meta", "img", "link", "br", "hr", "input"}


class Structure(HTMLParser):
    """Raises nowhere, but notes tags left open and every attribute that could load something."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text, self.tags = [], [], "", set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if self.open[-1:] == ["style"] else data


def parse(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    structure.close()
    return structure


@pytest.fixture
def entries() -> list[Entry]:
    picture = Image.new("RGB", (64, 48), "teal")
    outcomes = (
        Outcome("vanilla", "K", False, 1),
        Outcome("vicrop", "7", True, 3, 1.5, ((10.4, 20.0, 30.6, 40.0),)),
        Outcome("mine", "", None, 2, 1.5, note="nothing found"),
    )
    return [Entry("first", "Which sign?", (("the scene", picture), ("the crop", picture)), outcomes, "7")]


def test_page_holds_pictures_as_data_uris_and_loads_nothing(entries):
    page = parse(render("run", [], entries))
    assert len(page.sources) == 2 and all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"url\(|@import|https?:", render("run", [], entries))


def test_page_is_balanced_markup_and_says_every_value(entries):
    page = parse(render("run of today", [("model", "small"), ("questions", "1")], entries))
    assert not page.open
    said = (
        "run of today",
        "small",
        "Which sign?",
        "true answer",
        "✓ right",
        "✗ wrong",
        "10, 20, 31, 40",
        "nothing found",
    )
    assert all(text in page.text for text in said)
    assert page.text.count("✓ right") == page.text.count("✗ wrong") == 1


def test_page_counts_right_answers_of_those_that_can_be_judged(entries):
    text = parse(render("run", [], entries * 3)).text
    assert "vanilla0 of 31.0" in text and "vicrop3 of 33.0" in text and "mine–2.0" in text


def test_markup_in_answers_and_questions_is_shown_not_obeyed(entries):
    evil = Entry(
        "<b>",
        "<script>alert(1)</script>",
        (('"onload="x', entries[0].pictures[0][1]),),
        (Outcome("m", "</td><img src=x>"),),
    )
    page = parse(render("</title>", [("<i>", "&amp;")], [evil]))
    assert "script" not in page.tags and len(page.sources) == 1 and not page.open
    assert "</td><img src=x>" in page.text and "&amp;" in page.text


def test_page_without_samples_is_a_page():
    assert not parse(render("empty", [], [])).open


@pytest.mark.parametrize("size", [(1, 1), (4000, 3000), (10, 2000)])
def test_pictures_are_shrunk_to_the_page_and_keep_their_shape(size):
    given = Image.new("RGBA", size, "red")
    shown = Image.open(io.BytesIO(base64.b64decode(data_uri(given).partition(",")[2])))
    assert shown.format == "JPEG" and max(shown.size) <= MAX_SIDE
    assert abs(shown.width * size[1] - shown.height * size[0]) <= max(size) and given.size == size
