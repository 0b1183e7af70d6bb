"""Controls: what a crop is worth when it lies anywhere, and when it lies where it should.

Each answers exactly as ViCrop does, on the image and a crop. They are measures of a method, not methods.
"""

from collections.abc import Generator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np

from jaxvqa import methods
from jaxvqa.errors import UserError
from jaxvqa.methods import Facts
from jaxvqa.methods.vicrop import Vicrop
from jaxvqa.requests import Answer, Sample

VICROP = Vicrop()


@dataclass(frozen=True)
class RandomCrop:
    """Control: a crop of ViCrop's size for the same question, at a random place."""

    name: ClassVar[str] = "random_crop"

    like: Vicrop = VICROP
    """The search whose crop size is taken."""
    seed: int = 0
    """With the sample's id, decides the place."""

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "RandomCrop":
        return RandomCrop(methods.bind(self.like, facts), self.seed)

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        (x1, y1, x2, y2), _, _ = yield from self.like.locate(sample)
        digest = blake2b(f"{self.seed}/{sample.id}".encode(), digest_size=8).digest()
        u, v = np.random.default_rng(int.from_bytes(digest)).random(2)
        (W, H), w, h = sample.image.size, x2 - x1, y2 - y1
        box = (u * (W - w), v * (H - h), u * (W - w) + w, v * (H - h) + h)
        reply = yield from self.like.answer(sample, box)
        return Answer(reply.text, boxes=np.array([box]))


@dataclass(frozen=True)
class TruthCrop:
    """Control: a crop of ViCrop's smallest size around the ground-truth box (larger where the box is)."""

    name: ClassVar[str] = "truth_crop"

    like: Vicrop = VICROP
    """The method whose crop size and prompt are taken."""

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "TruthCrop":
        return TruthCrop(methods.bind(self.like, facts))

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        if sample.box is None:
            raise UserError(f"truth_crop: sample {sample.id!r} has no ground-truth box")
        assert self.like.base is not None, "bound"
        box = square_around(sample.box, self.like.base, sample.image.size)
        reply = yield from self.like.answer(sample, box)
        return Answer(reply.text, boxes=np.array([box]))


def square_around(box: tuple[float, ...], side: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The square of `side` pixels, or of the box's longer side, centred on the box and moved into the image."""
    x1, y1, x2, y2 = box
    side = max(side, x2 - x1, y2 - y1)
    edges = []
    for centre, limit in (((x1 + x2) / 2, size[0]), ((y1 + y2) / 2, size[1])):
        low = min(max(centre - side / 2, 0), max(limit - side, 0))
        edges.append((low, min(low + side, limit)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]
