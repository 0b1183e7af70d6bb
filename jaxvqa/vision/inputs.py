"""What an image becomes on the host before its encoder runs."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry
from jaxvqa.typing import Int


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image, ready for its encoder.

    All that depends on the image's size is in `arrays`, whose shapes depend on the bucket alone.
    """

    arrays: Any
    """What `encode_images` takes, without the batch axis: a NumPy array, or a registered dataclass of them."""
    geometry: Geometry
    cells: Int[np.ndarray, "C"]
    """Which of the image's tokens shows each cell of `geometry`, row-major."""
    tokens: int
    """Decoder tokens of the image."""
    capacity: int
    """Rows of its features, padding included."""
    stride: int | None = None
    """Rows of what becomes of them in a prompt, where that is not its features; None is `capacity`."""


def bucket_of(size: int, buckets: Sequence[int], what: str) -> int:
    """The smallest of `buckets` (ascending) that holds `size`; UserError where none does."""
    for candidate in buckets:
        if size <= candidate:
            return candidate
    raise UserError(f"{what} needs {size}, more than the largest bucket ({buckets[-1]}): give larger buckets")


def size_in_buckets(geometry_of: Callable[[tuple[int, ...]], Geometry], largest: int) -> int:
    """How large an image is in the unit of its family's buckets: the smallest bucket that holds it (`VLM.size_of`).

    geometry_of: the geometry of that image for given buckets (of `family_of(config).geometry_of`, with the rest bound).
    largest: a bucket that holds it. Raises UserError where it does not, or where the image cannot be encoded.
    """
    geometry_of((largest,))

    def holds(bucket: int) -> bool:
        try:
            geometry_of((bucket,))
        except UserError:
            return False
        return True

    return 1 + bisect_left(range(1, largest + 1), True, key=holds)


def buckets_for(sizes: Iterable[int], count: int) -> tuple[int, ...]:
    """Buckets for `load(..., image_buckets=)`: of all choices of `count`, one that pads images of these sizes least.

    sizes: of a data set's images, in the unit of the family's buckets (`VLM.size_of`). The largest is the last
        bucket. Crops that methods make may be larger: let the last of the family's `default_buckets` follow for them.
    count: how many at most; each is a program to compile for prompts of one image, and one for those of two.

    By dynamic programming over the distinct sizes, exact. Raises UserError for no sizes, or numbers below 1.
    """
    values, numbers = np.unique(np.fromiter(sizes, np.int64), return_counts=True)
    if not len(values) or values[0] < 1 or count < 1:
        raise UserError(f"buckets for {len(values)} sizes from {values[:1]} on, {count} of them; expected numbers >= 1")
    images = np.concatenate([[0], numbers.cumsum()])  # of the first j sizes
    padded = np.where(images == 0, 0.0, np.inf)  # rows that these take in the buckets so far
    begins = []
    for _ in range(min(count, len(values))):
        totals = [padded[: j + 1] + values[j] * (images[j + 1] - images[: j + 1]) for j in range(len(values))]
        begins.append([int(total.argmin()) for total in totals])
        padded = np.array([0.0, *(total.min() for total in totals)])
    buckets, j = [], len(values)
    for begin in reversed(begins):
        if j:
            buckets.append(int(values[j - 1]))
            j = begin[j - 1]
    return tuple(reversed(buckets))
