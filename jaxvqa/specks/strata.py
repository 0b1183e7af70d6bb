"""Questions about Specks in strata, each for what one kind of method can and cannot repair.

Sample number n of a stratum and a seed is a function of the three alone, and no two share a scene. Its layout is drawn
when the sample is made; the picture is rendered when its pixels are asked for, and lives as long as the sample.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from math import dist, inf
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image

from jaxvqa.errors import UserError
from jaxvqa.requests import Sample
from jaxvqa.specks.questions import YES_NO, Question, has_rivals, pair_question, questions, read_question
from jaxvqa.specks.scenes import SIZE, Scene, scene

SPLITS = {"dev": (2, 500), "test": (3, 1000)}
"""Seed and number of samples. Training scenes have other seeds (1, 101, 201, 301)."""
NEAR, FAR = 360, 480
"""Two targets are near below, and far above these distances of their centres, in pixels."""
WHOLE = ("count", "relation", "read", "color", "shape")
"""The kinds of question about whole scenes, in turn."""
_STRIDE = 1 << 20  # from a scene that does not allow the question to the next one tried in its place


class Stratum(NamedTuple):
    """A kind of scene (`scenes.LAYOUTS`), and how number n is asked about one: None where it cannot be."""

    kind: str
    ask: Callable[[Scene, np.random.Generator, int], Question | None]


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """The samples of these numbers, each made anew whenever it is taken out."""

    stratum: str
    seed: int
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> "Samples": ...
    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return replace(self, numbers=self.numbers[at])
        return sample(self.stratum, self.seed, self.numbers[at])


def samples(stratum: str, split: str = "test", count: int | None = None) -> Samples:
    """The first `count` (default: all) samples of a stratum. UserError for unknown names and a count out of range."""
    for what, name, known in (("stratum", stratum, STRATA), ("split", split, SPLITS)):
        if name not in known:
            raise UserError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    seed, size = SPLITS[split]
    if count is not None and not 1 <= count <= size:
        raise UserError(f"{count} samples of {stratum}: expected 1 to {size} ({split})")
    return Samples(stratum, seed, range(count or size))


def sample(stratum: str, seed: int, number: int) -> Sample:
    """Sample `number` of a stratum in the world `seed`; 0 <= number < 2^20.

    boxes: the plates that the answer rests on. rivals: the plates that share a colour or a shape with one of them, or
    with what is asked for and not there. other: what is written on a plate that is none of them, if there is one.
    """
    kind, ask = STRATA[stratum]
    index, question = number, None
    while question is None:
        drawn, rng = scene(seed, index, kind), np.random.default_rng((seed, index, 3))
        index, question = index + _STRIDE, ask(drawn, rng, number)
    targets = question.targets
    words = {word for plate in targets for word in plate.name.split()} or set(question.text.split())
    others = [plate for plate in drawn.plates if plate not in targets]
    return Sample(
        (Picture(drawn),),
        question.text,
        f"{stratum}/{seed}/{number}",
        boxes=tuple(plate.box for plate in targets),
        rivals=tuple(plate.box for plate in others if {plate.color, plate.shape} & words),
        other=read_question(_one(rng, others or drawn.plates)).text,
        answer=question.answer,
    )


class Picture(Image.Image):
    """A scene's picture, rendered when its pixels are first asked for: Pillow's own way of loading late."""

    def __init__(self, drawn: Scene):
        super().__init__()
        self._drawn, self._mode, self._size = drawn, "RGB", (SIZE, SIZE)
        self.readonly = 1  # Pillow then copies the scene's pixels before it changes them

    def load(self):
        if self._im is None:
            self.im = self._drawn.picture.im
        return super().load()


def _read(drawn: Scene, rng: np.random.Generator, number: int) -> Question | None:
    """About a plate with two rivals of its colour and two of its shape."""
    plates = [plate for plate in drawn.plates if has_rivals(plate, drawn.plates)]
    return read_question(_one(rng, plates)) if plates else None


def _pair(low: float, high: float, drawn: Scene, rng: np.random.Generator, number: int) -> Question | None:
    """About two plates so far apart, each with two rivals of both kinds; in a scene without such a pair, with one."""
    for rivals in (2, 1):
        plates = [plate for plate in drawn.plates if has_rivals(plate, drawn.plates, rivals)]
        pairs = [(a, b) for a, b in permutations(plates, 2) if low < dist(a.center, b.center) < high]
        if pairs:
            return pair_question(*_one(rng, pairs))
    return None


def _whole(drawn: Scene, rng: np.random.Generator, number: int) -> Question | None:
    """Of each kind in turn."""
    return next(iter(questions(drawn, rng, kinds=(WHOLE[number % len(WHOLE)],))), None)


def _presence(drawn: Scene, rng: np.random.Generator, number: int) -> Question | None:
    """Even numbers: of a plate that is there; odd: of a colour and a shape that are there, but not together.

    Either way at least two plates have the colour and two the shape, so neither alone tells.
    """
    there = {plate.name: plate for plate in drawn.plates}
    colors, shapes = Counter(plate.color for plate in drawn.plates), Counter(plate.shape for plate in drawn.plates)
    names = [f"{c} {s}" for c in colors for s in shapes if min(colors[c], shapes[s]) >= 2]
    names = [name for name in names if (name in there) == (number % 2 == 0)]
    if not names:
        return None
    name = _one(rng, names)
    answer, targets = ("No", ()) if number % 2 else ("Yes", (there[name],))
    return Question("presence", f"Is there a {name} in the image?", YES_NO, answer, targets)


def _one(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


STRATA = {
    "small": Stratum("small", _read),
    "crowded": Stratum("crowded", _read),
    "near": Stratum("small", partial(_pair, 0, NEAR)),
    "far": Stratum("small", partial(_pair, FAR, inf)),
    "whole": Stratum("whole", _whole),
    "presence": Stratum("small", _presence),
}
"""By name. small: a character that only a crop shows (methods that crop). crowded: a character that can be read in the
whole scene, if one looks at the right plate of many (methods that reweight attention). near, far: two small characters,
within one crop or not. whole: few large plates (a crop must not hurt). presence: a colour and a shape, together or not
(what searches verify with)."""
