"""What an image becomes on the host before its encoder runs."""

from collections.abc import Sequence
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
