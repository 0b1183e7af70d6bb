"""The views of a training scene, and a file of them rendered ahead."""

from pathlib import Path
from typing import Literal

import numpy as np

from jaxvqa.specks.scenes import Box, Scene, random_view
from jaxvqa.typing import UInt8

VIEWS = 4


def view_boxes(scene: Scene) -> tuple[Box, ...]:
    """The four views of a scene in training: all of it, and three random crops."""
    rng = np.random.default_rng((scene.seed, scene.index, 2))
    return (scene.box, *(random_view(rng, scene.plates) for _ in range(VIEWS - 1)))


def render(make_scene, seed: int, start: int, stop: int, path: Path, count: int, size: int = 128) -> None:
    """Write the views of the scenes start..stop-1 into a raw uint8 file [count, 4, size, size, 3]."""
    views = open_views(path, count, size, "r+")
    for index in range(start, stop):
        scene = make_scene(seed, index)
        for n, box in enumerate(view_boxes(scene)):
            views[index, n] = scene.view(box, size)


def open_views(
    path: Path, count: int, size: int = 128, mode: Literal["r", "r+"] = "r"
) -> UInt8[np.ndarray, "count 4 size size 3"]:
    """The file that `render` writes, memory-mapped; created (sparse) if missing."""
    create = mode == "r+" and not path.exists()
    return np.memmap(path, np.uint8, "w+" if create else mode, shape=(count, VIEWS, size, size, 3))
