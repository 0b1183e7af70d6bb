"""`--option k=v`: what the annotations of a dataclass make of text."""

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa.cli.options import describe, parse_options
from jaxvqa.errors import UserError


@dataclass(frozen=True)
class Options:
    steps: int = 8
    rate: float = 0.5
    name: str = "x"
    deep: bool = False
    layer: int | None = None
    label: str | None = None
    mode: Literal["corrected", "official"] = "corrected"
    scale: Literal[0, 1] = 0
    ratios: tuple[float, ...] = (1.0, 2.0)
    window: tuple[int, int] = (1, 2)
    nested: dict | None = None


@given(st.integers(), st.floats(allow_nan=False), st.booleans(), st.lists(st.floats(allow_nan=False), min_size=1))
def test_printed_values_come_back_as_they_were(steps, rate, deep, ratios):
    pairs = [f"steps={steps}", f"rate={rate}", f"deep={deep}", f"ratios={','.join(map(str, ratios))}"]
    assert parse_options(Options, pairs) == {"steps": steps, "rate": rate, "deep": deep, "ratios": tuple(ratios)}


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("layer=none", None),
        ("layer=3", 3),
        ("label=None", None),
        ("label=3", "3"),
        ("mode=official", "official"),
        ("scale=0", 0),
        ("ratios=1", (1.0,)),
        ("ratios=(1, 1.5)", (1.0, 1.5)),
        ("window=3,4", (3, 4)),
        ("deep=yes", True),
        ("name=a=b", "a=b"),
        ("name=", ""),
    ],
)
def test_option_takes_the_type_of_its_field(pair, value):
    assert list(parse_options(Options, [pair]).values()) == [value]


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("steps=many", "expected int"),
        ("steps=1.5", "expected int"),
        ("deep=maybe", "expected true or false"),
        ("mode=offical", "expected corrected | official"),
        ("layer=x", "expected int | none"),
        ("window=1,2,3", "expected int, int"),
        ("nested=x", "expected dict | none"),
        ("steps", "name=value"),
        ("setps=3", "did you mean steps?"),
        ("zzz=3", "known: "),
    ],
)
def test_wrong_option_says_what_is_allowed(pair, said):
    with pytest.raises(UserError, match="option") as caught:
        parse_options(Options, [pair])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_option_given_twice_is_refused():
    with pytest.raises(UserError, match="twice"):
        parse_options(Options, ["steps=1", "steps=2"])


def test_dashes_in_an_option_name_are_underscores():
    @dataclass(frozen=True)
    class Dashed:
        max_new_tokens: int = 1

    assert parse_options(Dashed, ["max-new-tokens=3"]) == {"max_new_tokens": 3}


def test_types_are_described_as_a_user_reads_them():
    assert describe(tuple[float, ...]) == "float, ..."
    assert describe(int | None) == "int | none"
