"""Questions about a Specks view, with answers and ground-truth boxes.

A question is asked about a *view* (a square box of a scene). A plate counts as there when more than 60 % of it is
visible and as not there below 25 %; questions that hang on a plate in between are not asked.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from jaxvqa.specks.scenes import COLORS, SHAPES, Box, Plate, Scene

KINDS = ("read", "pair", "color", "shape", "presence", "relation", "count", "where", "describe", "objects")
PLURALS = {"square": "squares", "triangle": "triangles", "diamond": "diamonds", "cross": "crosses"}

SHORT = "Answer the question using a single word or phrase."
YES_NO = "Answer Yes or No."
BOX = "Answer with a bounding box."
GROUND = (
    "According to the information in the image and the question, \n"
    "detail the bounding box of the region in the image that contains the answer in JSON format."
)
DESCRIBE = ("Write a general description of the image.", "Describe this image")
OBJECTS = "If you want to answer the question, which objects' information do you need?"
THERE, GONE = 0.6, 0.25


@dataclass(frozen=True)
class Question:
    """A question: its bare `text`, the `ending` that asks for the form of the answer, and the truth."""

    kind: str
    text: str
    ending: str
    answer: str
    targets: tuple[Plate, ...] = ()

    @property
    def box(self) -> Box | None:
        """Ground-truth box of what the answer rests on, scene pixels (the union if several); None without target."""
        if not self.targets:
            return None
        corners = np.array([plate.box for plate in self.targets])
        return (*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist())


def questions(
    scene: Scene, rng: np.random.Generator, view: Box | None = None, kinds: tuple[str, ...] = KINDS
) -> list[Question]:
    """Every question of `kinds` that the view allows, in random order; a kind with many is represented by a few."""
    view = scene.box if view is None else view
    seen = [p for p in scene.plates if p.visible(view) > THERE]
    unclear = [p for p in scene.plates if GONE <= p.visible(view) <= THERE]
    makers = {
        "read": lambda: _read(rng, seen, view),
        "pair": lambda: _pair(rng, seen, view),
        "color": lambda: _attribute(rng, seen, unclear, "color"),
        "shape": lambda: _attribute(rng, seen, unclear, "shape"),
        "presence": lambda: _presence(rng, scene, seen, unclear),
        "relation": lambda: _relation(rng, seen, view),
        "count": lambda: _count(rng, seen, unclear),
        "where": lambda: _where(rng, seen, view),
        "describe": lambda: _describe(rng, scene, seen, view),
        "objects": lambda: _objects(rng, scene),
    }
    found = [question for kind in kinds for question in makers[kind]()]
    return [found[i] for i in rng.permutation(len(found))]


def has_rivals(plate: Plate, plates: tuple[Plate, ...], count: int = 2) -> bool:
    """Whether at least `count` other plates have the same colour and as many the same shape."""
    others = [p for p in plates if p is not plate]
    return min(sum(p.color == plate.color for p in others), sum(p.shape == plate.shape for p in others)) >= count


def read_question(plate: Plate) -> Question:
    """What is written on `plate`?"""
    return Question("read", f"What character is on the {plate.name}?", SHORT, plate.character, (plate,))


def pair_question(a: Plate, b: Plate) -> Question:
    """What is written on two plates?"""
    text = f"What characters are on the {a.name} and the {b.name}?"
    return Question("pair", text, SHORT, f"{a.character} and {b.character}", (a, b))


def caption(plates: tuple[Plate, ...], view: Box) -> str:
    """The plates in the view from left to right, with the characters that can be read."""
    seen = sorted((p for p in plates if p.visible(view) > THERE), key=lambda p: p.center[0])
    if not seen:
        return "There is nothing in the image."
    words = [f"{p.name} {p.character}" if p.legible(view) else p.name for p in seen]
    return f"There are {len(seen)} plates: {', '.join(words)}." if len(seen) > 1 else f"There is one plate: {words[0]}."


def box_text(box: Box, view: Box) -> str:
    """The visible part of `box` as LLaVA writes it: fractions of the square view, two decimals, at most 0.99."""
    return "[" + ", ".join(f"0.{n:02d}" for n in box_hundredths(box, view)) + "]"


def box_hundredths(box: Box, view: Box) -> tuple[int, ...]:
    """x1, y1, x2, y2 of `box` in hundredths of the view, clipped to 0..99."""
    side = view[2] - view[0]
    return tuple(int(np.clip(round(100 * (box[i] - view[i % 2]) / side), 0, 99)) for i in range(4))


def _some(rng: np.random.Generator, items: list, count: int) -> list:
    return [items[i] for i in rng.permutation(len(items))[:count]]


def _read(rng, seen, view):
    legible = [p for p in seen if p.legible(view)]
    return [read_question(p) for p in _some(rng, legible or seen, 3 if legible else 1)]


def _pair(rng, seen, view):
    a, b, *_ = *_some(rng, [p for p in seen if p.legible(view)], 2), None, None
    return [pair_question(a, b)] if b is not None else []


def _describe(rng, scene, seen, view):
    """Longer captions would be all that fits into a row of training."""
    return [Question("describe", str(rng.choice(DESCRIBE)), "", caption(scene.plates, view))] if len(seen) <= 12 else []


def _attribute(rng, seen, unclear, wanted):
    """Colour by shape or shape by colour, where that is unique."""
    given = "shape" if wanted == "color" else "color"
    count = Counter(getattr(p, given) for p in seen + unclear)
    found = []
    for plate in _some(rng, [p for p in seen if count[getattr(p, given)] == 1], 2):
        text = f"What color is the {plate.shape}?" if wanted == "color" else f"What shape is the {plate.color} plate?"
        found.append(Question(wanted, text, SHORT, getattr(plate, wanted), (plate,)))
    return found


def _presence(rng, scene, seen, unclear):
    """Up to two that are there and as many that are not, most of them mixed from colours and shapes that are."""
    there = _some(rng, seen, 2)
    known = {p.name for p in seen + unclear}
    colors, shapes = {p.color for p in seen} or set(COLORS), {p.shape for p in seen} or set(SHAPES)
    near = [f"{c} {s}" for c in COLORS if c in colors for s in SHAPES if s in shapes and f"{c} {s}" not in known]
    far = [f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in known]
    gone = [_some(rng, near if near and rng.random() < 0.6 else far, 1)[0] for _ in range(max(1, len(there)))]
    make = [(p.name, "Yes", (p,)) for p in there] + [(name, "No", ()) for name in gone]
    return [Question("presence", f"Is there a {name} in the image?", YES_NO, a, targets) for name, a, targets in make]


def _relation(rng, seen, view):
    found, margin = [], 0.08 * (view[2] - view[0])
    for _ in range(2):
        if len(seen) < 2:
            break
        a, b = _some(rng, seen, 2)
        axis, words = [(0, ("left", "right")), (1, ("above", "below"))][int(rng.integers(2))]
        distance = a.center[axis] - b.center[axis]
        if abs(distance) > margin:
            ask = f"Is the {a.name} {words[0]} or {words[1]} {'of ' if axis == 0 else ''}the {b.name}?"
            found.append(Question("relation", ask, SHORT, words[int(distance > 0)], (a, b)))
    return found


def _count(rng, seen, unclear):
    found = []
    for given, plural in (("color", lambda c: f"{c} plates"), ("shape", PLURALS.get)):
        sure = {getattr(p, given) for p in seen} - {getattr(p, given) for p in unclear}
        for value in _some(rng, sorted(sure), 2):
            targets = tuple(p for p in seen if getattr(p, given) == value)
            found.append(Question("count", f"How many {plural(value)} are there?", SHORT, str(len(targets)), targets))
    return found


def _where(rng, seen, view):
    found = []
    for plate in _some(rng, seen, 2):
        ask, ending = f"Where is the {plate.name}?", BOX
        if rng.random() < 0.4:
            ask, ending = (ask if rng.random() < 0.5 else read_question(plate).text), GROUND
        found.append(Question("where", ask, ending, box_text(plate.box, view), (plate,)))
    return found


def _objects(rng, scene):
    """What a question needs, in words (no image): the target extraction of FOCUS."""
    a, b = _some(rng, list(scene.plates), 2)
    plural = PLURALS[a.shape]
    ask, purpose, needs = [
        (f"What character is on the {a.name}?", "read the character", a.name),
        (f"What characters are on the {a.name} and the {b.name}?", "read the characters", f"{a.name} and {b.name}"),
        (f"Is the {a.name} left or right of the {b.name}?", "compare the positions", f"{a.name} and {b.name}"),
        (f"Is the {a.name} above or below the {b.name}?", "compare the positions", f"{a.name} and {b.name}"),
        (f"How many {plural} are there?", f"count the {plural}", f"all {plural}"),
        (f"How many {a.color} plates are there?", "count the plates", f"all {a.color} plates"),
        (f"What color is the {a.shape}?", "determine the color", a.shape),
        (f"What shape is the {a.color} plate?", "determine the shape", f"{a.color} plate"),
    ][int(rng.integers(8))]
    return [Question("objects", f"Question: {ask}", OBJECTS, objects_answer(needs, purpose))]


def objects_answer(needs: str, purpose: str) -> str:
    """The reply that names the objects a question needs, in FOCUS's words."""
    return (
        f"To answer the question, I need know the location of {needs} so that I can {purpose}. "
        f"So I need the information about the following objects: {needs}."
    )
