"""The objects that a question is about: found by a model after a few examples, by rules, or given by hand.

FOCUS names them as ZoomEye does (om-ai-lab/ZoomEye): a conversation shows how, and the reply is taken apart.
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from jaxvqa.errors import UserError
from jaxvqa.prompts import MARKER

ASK = "If you want to answer the question, which objects' information do you need?"
NAMED = "So I need the information about the following objects: "

# ZoomEye drops what spaCy tags as a pronoun; this list does without a tagger.
PRONOUNS = frozenset(
    """i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its
    itself we us our ours ourselves they them their theirs themselves this that these those who whom whose which
    someone somebody something anyone anybody anything everyone everybody everything""".split()
)

ARTICLES = frozenset({"the", "a", "an"})
ENDS = frozenset(
    """on in at of to from by near next left right behind under above below beneath beside between among inside outside
    over around into onto through across against along toward towards for is are was were be been being am do does did
    done has have had can could will would shall should may might must and or but nor than as that which who whom whose
    where when while what how why if not there say says tell wearing holding carrying doing making looking facing
    standing sitting lying walking running riding parked printed written shown painted drawn made located placed
    visible""".split()
)
"""Words that end the name of an object."""
ASIDE = frozenset(
    """top bottom middle center centre side front back upper lower corner edge background foreground image
    picture photo photograph scene view color colour shape size number name type kind sort material pattern style brand
    text word words letter letters character characters position direction relation relationship distance""".split()
)
"""What is asked for, or a place in the image, but no object in it."""


class Target(NamedTuple):
    """An object to look for."""

    name: str
    """What follows "Is there a": without an article, in the singular."""
    every: bool = False
    """Whether all of its kind are wanted (a question of type 2), not one (type 1)."""


class Examples(NamedTuple):
    """Questions and replies that show how a question's objects are named: the keys of ZoomEye's files."""

    question_template: str
    """A turn of the user's; {} stands for the question."""
    question_list: tuple[str, ...]
    response_list: tuple[str, ...]

    def asked(self, question: str) -> str:
        """The turn that asks for the objects of a question."""
        return self.question_template.replace("{}", question)

    def turns(self, question: str) -> list[str]:
        """The conversation that asks it after the examples."""
        pairs = zip(self.question_list, self.response_list, strict=True)
        return [*(turn for known, reply in pairs for turn in (self.asked(known), reply)), self.asked(question)]


def response(needs: str, purpose: str) -> str:
    """The reply that names the objects which a question needs, in the words of ZoomEye's examples, as they are."""
    return f"To answer the question, I need know the location of {needs} so that I can {purpose}. {NAMED}{needs}."


_OWN = {
    "What colour is the dog's collar?": ("dog with a collar", "determine the color"),
    "Is the red bicycle on the left or the right of the blue van?": (
        "red bicycle and blue van",
        "compare the positions",
    ),
    "What is written on the sign above the shop door?": ("sign above the shop door", "read the text"),
    "Is the man with the umbrella in front of or behind the woman with the white hat?": (
        "man with the umbrella and woman with the white hat",
        "compare the positions",
    ),
    "Which animal is printed on the green flag?": ("green flag", "determine the animal"),
    "How many boats are in the picture?": ("all boats", "count the boats"),
}
EXAMPLES = Examples(f"Question: {{}}\n{ASK}", tuple(_OWN), tuple(response(*needs) for needs in _OWN.values()))
"""The library's own: an attribute, two objects, a text, relative clauses, a single object, and "all" of a kind."""


@lru_cache
def read_examples(path: str | None) -> Examples:
    """The examples of a JSON file with the keys of `Examples`; None are the library's own.

    Raises UserError for a file that is none, lacks a key, or has not one response for each question.
    """
    if path is None:
        return EXAMPLES
    try:
        template, questions, responses = map(json.loads(Path(path).read_text()).__getitem__, Examples._fields)
        fits = "{}" in template and len(questions) == len(responses)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        keys = ", ".join(Examples._fields)
        raise UserError(f"{path}: no examples ({error!r}); expected a JSON file with {keys}") from error
    if not fits:
        raise UserError(f"{path}: expected {{}} in question_template, and one response for each question")
    return Examples(template, tuple(questions), tuple(responses))


def stem(question: str) -> str:
    """A question's first line, without image markers: what is asked, without options and instructions."""
    return question.replace(MARKER, " ").strip().split("\n")[0].strip()


def parse(reply: str) -> tuple[Target, ...]:
    """The objects that a reply names; none where it does not name them in the words of the examples.

    Those named by a pronoun are left out.
    """
    found = re.search(f"{re.escape(NAMED)}(.*)", reply)
    names = re.split(",? and |, ", found[1].strip().removesuffix(".")) if found else []
    return named(name for name in names if PRONOUNS.isdisjoint(re.findall(r"\w+", name.lower())))


def by_rules(question: str) -> tuple[Target, ...]:
    """The objects that a question names, without a model.

    A name is what follows an article, up to punctuation or one of the words in `ENDS`; it is dropped if its last word
    is one of `ASIDE`. After "how many" or "number of" all of what follows up to there are wanted, and nothing else.
    """
    words = re.findall(r"\w[\w'’-]*|[^\w\s]", question)
    lower = [word.lower() for word in words]
    ends = [at for at, word in enumerate(lower) if word in ENDS or not word[0].isalnum()]

    def name(start: int) -> list[str]:
        return words[start : next((end for end in ends if end >= start), None)]

    for at, pair in enumerate(pairwise(lower)):
        if pair in (("how", "many"), ("number", "of")):
            start = next((i for i in range(at + 2, len(words)) if lower[i] not in ("of", "the")), len(words))
            return named([f"all {' '.join(name(start))}"] if name(start) else [])
    found, at = [], 0
    while at < len(words):
        known = name(at + 1) if lower[at] in ARTICLES else []
        if known and known[-1].lower() not in ASIDE:
            found.append(" ".join(known))
        at += 1 + len(known)
    return named(name for name in found if PRONOUNS.isdisjoint(name.lower().split()))


def named(names: Iterable[str]) -> tuple[Target, ...]:
    """Objects by name, each once, whatever its case: all of a kind ("all boats") where the name says so."""
    found: dict[str, Target] = {}
    for name in map(str.strip, names):
        every = name.lower().startswith("all ")
        name = name[4:].strip().removesuffix("s") if every else name
        if name:
            found.setdefault(name.lower(), Target(name, every))
    return tuple(found.values())
