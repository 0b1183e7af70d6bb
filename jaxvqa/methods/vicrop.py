"""ViCrop ("MLLMs Know Where to Look", ICLR 2025): crop where the model looks, then answer on image and crop."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from jaxvqa.errors import UserError
from jaxvqa.geometry import for_squash
from jaxvqa.images import crop
from jaxvqa.methods import Facts, check_choice, fill, scaled_layer
from jaxvqa.prompts import GENERAL_QUESTION, Prompt, render
from jaxvqa.regions.windows import RATIOS, search
from jaxvqa.requests import Answer, Generate, Read, Reply, Row, Sample
from jaxvqa.taps import ReadSpec
from jaxvqa.transforms.relative_attention import relative_attention
from jaxvqa.typing import Array, Float


@dataclass(frozen=True)
class Vicrop:
    """ViCrop: crop where the model's relative attention peaks, then answer on the image and the crop."""

    name: ClassVar[str] = "vicrop"
    paper: ClassVar[str] = "MLLMs Know Where to Look, ICLR 2025 (arXiv 2502.17422)"

    maps: Literal["rel_att"] = "rel_att"
    """How the importance map is made: "rel_att", attention to the question over attention to a general request."""
    layer: int | None = None
    """Decoder layer (0-based) whose attention is read; None is 14 of 32 layers, at the same depth in other models."""
    alignment: Literal["corrected", "official"] = "corrected"
    """"official" lays the map over the whole image as the release does, wherever the encoder really looked."""
    base: int | None = None
    """Side in pixels of the smallest crop; None is the side of the encoder's input (336 in LLaVA-1.5)."""
    ratios: tuple[float, ...] = RATIOS
    """Crop sides to compare, in units of `base`."""
    template: str = "vicrop_hf"
    """Prompt template of the search and of the answer."""
    max_new_tokens: int = 20
    """Tokens that the answer may have."""

    def __post_init__(self):
        check_choice(self, "maps", tuple(MAPS))
        check_choice(self, "alignment", ("corrected", "official"))

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "Vicrop":
        bound = fill(fill(self, **preset), layer=scaled_layer(14, 32, facts.num_layers), base=facts.image_side)
        if not 0 <= bound.layer < facts.num_layers:
            raise UserError(f"vicrop: layer={bound.layer}; {facts.name} has layers 0 to {facts.num_layers - 1}")
        return bound

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        box, grid, heatmap = yield from self.locate(sample)
        reply = yield from self.answer(sample, box)
        return Answer(reply.text, boxes=np.array([box]), grid=grid, heatmap=heatmap)

    def locate(self, sample: Sample) -> Generator[Any, Any, tuple[tuple[float, ...], np.ndarray, np.ndarray]]:
        """The search: box in pixels of the first image, importance map on the token grid and in image coordinates."""
        assert self.base is not None, "bound"
        W, H = sample.image.size
        grid, geometry = yield from MAPS[self.maps](self, sample)
        if self.alignment == "official":
            geometry = for_squash(W, H, geometry.encoder_size, geometry.grid)
        box = search(grid, (W, H), self.base, self.ratios, alignment=self.alignment, geometry=geometry)
        return box, grid, geometry.to_image(grid, preview_size((W, H)))

    def answer(self, sample: Sample, box: tuple[float, ...]) -> Generator[Any, Any, Reply]:
        """The final answer, on the whole image and the crop, in this order."""
        images = (*sample.images, crop(sample.image, box))
        return (yield Generate(images, self.prompt(sample.question, len(images)), max_new_tokens=self.max_new_tokens))

    def prompt(self, question: str, num_images: int) -> Prompt:
        return render(self.template, question, num_images=num_images, ending="short")


def relative(options: Vicrop, sample: Sample) -> Generator[Any, Any, tuple[np.ndarray, Any]]:
    """rel_att: attention of the last prompt token to the image, for the question over for a general description."""
    assert options.layer is not None, "bound"
    spec = ReadSpec(layers=(options.layer,), read=frozenset({"rows"}))
    question, reference = yield [
        Read(sample.images, options.prompt(text, len(sample.images)), spec, reduce=attention_on_image)
        for text in (sample.question, GENERAL_QUESTION)
    ]
    ratio = relative_attention(jnp.asarray(question.value), jnp.asarray(reference.value))
    return np.asarray(ratio), question.geometries[0]


MAPS = {"rel_att": relative}


def attention_on_image(row: Row) -> Float[Array, "h w"]:
    """Attention of the wanted row to the first image, averaged over heads, on the token grid."""
    return row.on_image(row.readouts.rows[0, 0])


def preview_size(size: tuple[int, int], longest: int = 512) -> tuple[int, int]:
    """(width, height) of the same shape, at most `longest`: the resolution of heat maps in image coordinates."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
