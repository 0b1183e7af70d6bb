"""Controls: what a method's result is to be measured against. They are measures of methods, not methods.

Each has an option `like`, the method that it controls for, and answers with that method's prompts; it differs in one
thing only. Some look at the ground truth (`Sample.boxes`), at its rivals, or at another question about the image; a
sample that lacks what a control needs is a UserError.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from jaxvqa import methods
from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry, covers
from jaxvqa.images import crop
from jaxvqa.methods import Facts, check_choice, fill
from jaxvqa.methods.cof import check_layers, check_strength, reweighted
from jaxvqa.methods.focus import Focus
from jaxvqa.methods.hiperson import HiPerson
from jaxvqa.methods.targets import Target
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import Vicrop
from jaxvqa.prompts import MARKER
from jaxvqa.requests import Answer, Sample
from jaxvqa.typing import Float

VANILLA, VICROP, FOCUS = Vanilla(), Vicrop(), Focus()

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Blind:
    """Control: the question without its image.

    What the words alone let one guess: answers above this come from the image.
    """

    name: ClassVar[str] = "blind"

    like: Vanilla = VANILLA
    """What asks the question."""

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "Blind":
        return replace(self, like=methods.bind(self.like, facts))

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        question = sample.question.replace(MARKER, "").strip()
        return (yield from self.like(replace(sample, images=(), question=question)))


@dataclass(frozen=True)
class RandomCrop:
    """Control: a crop of ViCrop's size for the same question, at a random place.

    What a second, sharper view is worth wherever it lies.
    """

    name: ClassVar[str] = "random_crop"

    like: Vicrop | HiPerson = VICROP
    """The search whose crop size is taken."""
    seed: int = 0
    """With the sample's id, decides the place."""

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "RandomCrop":
        return replace(self, like=methods.bind(self.like, facts))

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        (x1, y1, x2, y2), _, _ = yield from self.like.locate(sample)
        u, v = sample.random(self.seed).random(2)
        (W, H), w, h = sample.image.size, x2 - x1, y2 - y1
        box = (u * (W - w), v * (H - h), u * (W - w) + w, v * (H - h) + h)
        reply = yield from self.like.answer(sample, box)
        return Answer(reply.text, boxes=np.array([box]))


@dataclass(frozen=True)
class RivalCrop:
    """Control: a crop like the ground truth's, around a thing that only resembles the target.

    What a view of the right kind of thing is worth: whether the answer is read from the target or from any plate. Of
    the rivals whose crop holds less than half of each target, the sample's id picks one.
    """

    name: ClassVar[str] = "rival_crop"

    like: Vicrop | HiPerson = VICROP
    """The method whose crop size and prompt are taken."""
    seed: int = 0
    """With the sample's id, decides which rival."""

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "RivalCrop":
        return replace(self, like=methods.bind(self.like, facts))

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        assert self.like.base is not None, "bound"
        side = side_around(truth(sample, self.name), self.like.base)
        if not sample.rivals:
            raise UserError(f"rival_crop: sample {sample.id!r} has no rivals")
        crops = [square_around(rival, side, sample.image.size) for rival in sample.rivals]
        crops = [box for box in crops if not any(covers(box, target) for target in sample.boxes)]
        if not crops:
            raise UserError(f"rival_crop: sample {sample.id!r} has no rival whose crop leaves the targets out")
        box = crops[sample.random(self.seed).integers(len(crops))]
        reply = yield from self.like.answer(sample, box)
        return Answer(reply.text, boxes=np.array([box]))


@dataclass(frozen=True)
class OtherMap:
    """Control: ViCrop with the map of another question about the image.

    What a map owes to the image alone: a search that follows its question does worse with this one's.
    """

    name: ClassVar[str] = "other_map"

    like: Vicrop | HiPerson = VICROP
    """The search; the real question is asked in the end."""

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "OtherMap":
        return replace(self, like=methods.bind(self.like, facts))

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        if sample.other is None:
            raise UserError(f"other_map: sample {sample.id!r} has no other question")
        box, grid, heatmap = yield from self.like.locate(replace(sample, question=sample.other))
        reply = yield from self.like.answer(sample, box)
        return Answer(reply.text, boxes=np.array([box]), grid=grid, heatmap=heatmap)


@dataclass(frozen=True)
class TruthMap:
    """Control: FOCUS with the ground truth's map in place of its own.

    What its proposals, their verification and its final view are worth when the map is right.
    """

    name: ClassVar[str] = "truth_map"

    like: Focus = FOCUS
    """The method whose map is replaced."""

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "TruthMap":
        # Its own map is never made, so the model need not be one of which it can be.
        bound = methods.bind(replace(self.like, feature="random"), facts)
        return replace(self, like=_TruthFocus(**{name: getattr(bound, name) for name in methods.method_options(bound)}))

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        truth(sample, self.name)
        return (yield from self.like(sample))


class _TruthFocus(Focus):
    def maps(
        self, sample: Sample, targets: tuple[Target, ...], view: Geometry
    ) -> Generator[Any, Any, list[np.ndarray]]:
        """Each target's box, in the order in which the question names them; all boxes where their numbers differ."""
        yield from ()
        cells = np.array([view.cells_of_box(box) for box in sample.boxes], np.float32)
        one_each = len(cells) == len(targets) and not any(target.every for target in targets)
        found = cells if one_each else np.repeat(cells.max(0)[None], len(targets), 0)
        return list(found / found.sum((1, 2), keepdims=True))


@dataclass(frozen=True)
class TruthCrop:
    """Control: a crop of ViCrop's smallest size around the ground truth (larger where that is).

    What a perfect search would reach. Several ground-truth boxes share one crop.
    """

    name: ClassVar[str] = "truth_crop"

    like: Vicrop | HiPerson = VICROP
    """The method whose crop size is taken and, with both images, whose prompt."""
    images: Literal["both", "crop"] = "both"
    """What is shown: the image and the crop, as in ViCrop, or the crop in the image's place."""
    alone: Vanilla = VANILLA
    """What asks about the crop in the image's place."""

    def __post_init__(self):
        check_choice(self, "images", ("both", "crop"))

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "TruthCrop":
        return replace(self, like=methods.bind(self.like, facts), alone=methods.bind(self.alone, facts))

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        assert self.like.base is not None, "bound"
        target = truth(sample, self.name)
        box = square_around(target, side_around(target, self.like.base), sample.image.size)
        if self.images == "both":
            reply = yield from self.like.answer(sample, box)
        else:
            reply = yield from self.alone(replace(sample, images=(crop(sample.image, box), *sample.images[1:])))
        return Answer(reply.text, boxes=np.array([box]))


@dataclass(frozen=True)
class MaskReweight:
    """Control: attention to chosen tokens of the first image multiplied by λ, without a search.

    CoF's second stage alone: what reweighting is worth in the right place, in another one, and on the whole image.
    """

    name: ClassVar[str] = "mask_reweight"

    like: Vanilla = VANILLA
    """What asks the question."""
    mask: Literal["truth", "random", "all"] = "truth"
    """The tokens: "truth", all that touch a ground-truth box (CoF's raster "cover"); "random", the same moved
    cyclically by random numbers of rows and columns, within what the encoder sees of the image; "all"."""
    lam: float = 2.0
    """λ, the factor: 2 is CoF's for LLaVA-1.5-7B; 1 changes nothing, 0 hides the tokens."""
    layers: tuple[int, ...] | None = None
    """Decoder layers (0-based) whose attention is reweighted; None is all."""
    seed: int = 0
    """With the sample's id, decides the random place."""
    facts: Facts | None = None
    """The model, whose image tokens must be known beforehand; filled in when the method is bound to it."""

    def __post_init__(self):
        check_choice(self, "mask", ("truth", "random", "all"))
        check_strength(self)

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "MaskReweight":
        bound = fill(fill(self, **preset), layers=tuple(range(facts.num_layers)))
        check_layers(bound, facts)
        return replace(bound, like=methods.bind(self.like, facts), facts=facts)

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        assert self.facts is not None, "bound"
        view = self.facts.geometry(sample.image.size, len(sample.images))
        return (yield from reweighted(self, sample, self.tokens(sample, view), view))

    def tokens(self, sample: Sample, view: Geometry) -> Float[np.ndarray, "h w"]:
        """The mask, f32 in {0, 1}; of ones where a token is reweighted."""
        if self.mask == "all":
            return np.ones(view.grid, np.float32)
        truth(sample, self.name)
        mask = np.any([view.cells_of_box(box) > 0 for box in sample.boxes], axis=0)
        if self.mask == "random":
            rows, columns = view.valid_ranges()
            seen = mask[slice(*rows), slice(*columns)]
            seen[:] = np.roll(seen, sample.random(self.seed).integers(seen.shape), axis=(0, 1))
        return mask.astype(np.float32)


def truth(sample: Sample, method: str) -> Box:
    """The box around all ground-truth boxes; UserError where there is none."""
    if sample.box is None:
        raise UserError(f"{method}: sample {sample.id!r} has no ground-truth box")
    return sample.box


def side_around(box: Box, base: float) -> float:
    """Side of the square crop that holds a box: `base`, or the box's longer side."""
    return max(base, box[2] - box[0], box[3] - box[1])


def square_around(box: Box, side: float, size: tuple[int, int]) -> Box:
    """The square of `side` pixels centred on a box and moved into the image; cut where the image is smaller."""
    x1, y1, x2, y2 = box
    edges = []
    for centre, limit in (((x1 + x2) / 2, size[0]), ((y1 + y2) / 2, size[1])):
        low = min(max(centre - side / 2, 0), max(limit - side, 0))
        edges.append((low, min(low + side, limit)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]
