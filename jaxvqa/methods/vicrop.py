"""ViCrop ("MLLMs Know Where to Look", ICLR 2025): crop where the model looks, then answer on image and crop."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from PIL import Image

from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry, for_squash
from jaxvqa.images import crop
from jaxvqa.methods import Facts, check_choice, fill, scaled_layer
from jaxvqa.prompts import GENERAL_QUESTION, MARKER, Prompt, Template, as_template, render, stem, worded
from jaxvqa.regions import tiles
from jaxvqa.regions.windows import RATIOS, Tiles, high_res_split, search
from jaxvqa.requests import Answer, Generate, Gradient, Read, Reply, Row, Sample
from jaxvqa.taps import ReadSpec
from jaxvqa.transforms.gradient import gradient_length, gradient_map, high_pass_mask, pixel_gradient_map
from jaxvqa.transforms.query_map import query_map
from jaxvqa.transforms.relative_attention import relative_attention
from jaxvqa.transforms.resample import lay, overlap
from jaxvqa.typing import Array, Float

Views = list[tuple[Image.Image, ...]]
"""The images of each request that a map is made of: the whole first image, or one of its tiles, and the others."""
Maps = Generator[Any, Any, tuple[list[np.ndarray], Geometry]]
"""Asks, and returns the map of each view, f32 [h, w], and where the encoder looked in its first image."""


@dataclass(frozen=True)
class Vicrop:
    """ViCrop: crop where the model looks for the answer, then answer on the image and the crop."""

    name: ClassVar[str] = "vicrop"
    paper: ClassVar[str] = "MLLMs Know Where to Look, ICLR 2025 (arXiv 2502.17422)"

    maps: Literal["rel_att", "grad_att", "pure_grad", "rel_att_high", "grad_att_high", "pure_grad_high"] = "rel_att"
    """How the importance map is made: "rel_att", attention to the question over attention to a general request;
    "grad_att", attention times what it adds to the likeliest answer; "pure_grad", the same of the image's pixels over
    that under a general request. "_high": in each tile of a large image."""
    layer: int | None = None
    """Decoder layer (0-based) whose attention is used; None is 14 of 32 layers, at the same depth in other models."""
    alignment: Literal["corrected", "official"] = "corrected"
    """"official" lays the map over the whole image as the release does, wherever the encoder really looked, and takes
    the detail of "pure_grad" from the squashed image."""
    tile: int | None = None
    """Height in pixels that a tile has at most; None is 1024 for an encoder whose input has a side of 336, and in
    proportion for others (the release: 1024 for all). Tiles are about square, and an image of one is left whole."""
    base: int | None = None
    """Side in pixels of the smallest crop; None is the side of the encoder's input (336 in LLaVA-1.5)."""
    ratios: tuple[float, ...] = RATIOS
    """Crop sides to compare, in units of `base`."""
    template: str | Template | None = None
    """Prompt template, or its name, of the search and of the answer; None is "vicrop_hf" for LLaVA, for other models
    their own."""
    listing: str = "mcq_letter_parens"
    """How a sample's options follow its question in the last prompt (`prompts.ENDINGS`); maps are made without them."""
    max_new_tokens: int = 20
    """Tokens that the answer may have."""

    def __post_init__(self):
        check_choice(self, "maps", (*MAPS, *(f"{name}_high" for name in MAPS)))
        check_choice(self, "alignment", ("corrected", "official"))
        if self.tile is not None and self.tile < 1:
            raise UserError(f"vicrop: tile={self.tile}; expected at least 1 pixel")

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "Vicrop":
        bound = fill(fill(self, **preset), layer=scaled_layer(14, 32, facts.num_layers), base=facts.image_side)
        bound = fill(bound, tile=round(1024 * facts.image_side / 336), template=facts.template)
        if not 0 <= bound.layer < facts.num_layers:
            raise UserError(f"vicrop: layer={bound.layer}; {facts.name} has layers 0 to {facts.num_layers - 1}")
        if bound.maps.startswith("pure_grad") and facts.detail:
            raise UserError(
                f"vicrop: maps={bound.maps!r} needs an encoder that sees one square; {facts.name} sees detail: "
                f"use rel_att or grad_att"
            )
        return bound

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        box, grid, heatmap = yield from self.locate(sample)
        reply = yield from self.answer(sample, box)
        return Answer(reply.text, boxes=np.array([box]), grid=grid, heatmap=heatmap)

    def locate(self, sample: Sample) -> Generator[Any, Any, tuple[tuple[float, ...], np.ndarray, np.ndarray]]:
        """The search: box in pixels of the first image, importance map on the token grid (tiles side by side) and in
        image coordinates."""
        assert self.base is not None, "bound"
        size, make = sample.image.size, MAPS[self.maps.removesuffix("_high")]
        split = self.split(size)
        parts = [sample.image] if split[:2] == (1, 1) else tiles.cut(sample.image, split)
        maps, view = yield from make(self, [(part, *sample.images[1:]) for part in parts], stem(sample.question))
        if len(parts) > 1:
            onto = overlap(self.laid_over(view), for_squash(*split.size, view.encoder_size, view.grid))
            maps = [tiles.join(np.stack([lay(one, onto) for one in maps]), split)]
            view = tiles.joined_geometry(size, split, view.grid, view.encoder_size)
        (grid,), view = maps, self.laid_over(view)
        return search(grid, size, self.base, self.ratios, geometry=view), grid, view.to_image(grid, preview_size(size))

    def answer(self, sample: Sample, box: tuple[float, ...]) -> Generator[Any, Any, Reply]:
        """The final answer, on the whole image and the crop, in this order."""
        images, question = (*sample.images, crop(sample.image, box)), sample.question.replace(MARKER, "").strip()
        if sample.options:
            question = worded(question, self.listing, sample.options)
        return (yield Generate(images, self.prompt(question, len(images)), max_new_tokens=self.max_new_tokens))

    def prompt(self, question: str, num_images: int) -> Prompt:
        template = self.template or "vicrop_hf"
        return render(template, question, num_images=num_images, ending=brief(template))

    def split(self, size: tuple[int, int]) -> Tiles:
        """How an image of `size` (W, H) is cut for the maps."""
        if not self.maps.endswith("_high"):
            return Tiles(1, 1, size)
        assert self.tile is not None, "bound"
        return high_res_split(size, self.tile)

    def laid_over(self, view: Geometry) -> Geometry:
        """Where the cells of a map count as looking."""
        if self.alignment == "corrected":
            return view
        return for_squash(*view.image_size, view.encoder_size, view.grid)


def relative(options: Vicrop, views: Views, question: str) -> Maps:
    """rel_att: attention of the last prompt token to the image, for the question over for a general description."""
    assert options.layer is not None, "bound"
    spec = ReadSpec(layers=(options.layer,), read=frozenset({"rows"}))
    readings = yield [
        Read(view, options.prompt(text, len(view)), spec, reduce=attention_on_image)
        for view in views
        for text in (question, GENERAL_QUESTION)
    ]
    pairs = zip(readings[::2], readings[1::2], strict=True)
    maps = [
        asked.geometries[0].on_grid(np.asarray(relative_attention(asked.value, general.value)))
        for asked, general in pairs
    ]
    return maps, readings[0].geometries[0]


def weighted(options: Vicrop, views: Views, question: str) -> Maps:
    """grad_att: that attention, times the positive part of the gradient of the likeliest answer's log-probability."""
    assert options.layer is not None, "bound"
    readings = yield [
        Gradient(view, options.prompt(question, len(view)), layers=(options.layer,), reduce=weighted_on_image)
        for view in views
    ]
    return [reading.geometries[0].on_grid(reading.value) for reading in readings], readings[0].geometries[0]


def from_pixels(options: Vicrop, views: Views, question: str) -> Maps:
    """pure_grad: how much a pixel matters to the likeliest answer, for the question over for a general description."""
    readings = yield [
        Gradient(view, options.prompt(text, len(view)), wrt="pixels", reduce=length_on_image)
        for view in views
        for text in (question, GENERAL_QUESTION)
    ]
    seen = readings[0].geometries[0]
    assert isinstance(seen.encoder_size, int), "bound"
    looked, cell = options.laid_over(seen), seen.encoder_size // seen.grid[0]
    maps = [
        np.asarray(pixel_gradient_map(asked.value, general.value, high_pass_mask(image, looked), cell))
        for (image, *_), asked, general in zip(views, readings[::2], readings[1::2], strict=True)
    ]
    return maps, seen


MAPS = {"rel_att": relative, "grad_att": weighted, "pure_grad": from_pixels}


def attention_on_image(row: Row) -> Float[Array, "h w"]:
    """Attention of the wanted row to the first image, averaged over heads, on the token grid."""
    return row.on_image(row.readouts.rows[0, 0])  # through queries, of which `Row.on_image` knows where they look


def weighted_on_image(row: Row) -> Float[Array, "h w"]:
    """The same attention times the positive part of its gradient, head by head, then averaged over heads.

    Through queries, both attentions that lead to the image are weighted so, and multiplied.
    """
    if row.queries is not None:
        rows = row.readouts.rows[0, :, 0] * jax.nn.relu(row.gradient[0, :, 0])
        cross = row.readouts.cross[0, 0] * jax.nn.relu(row.cross_gradient[0, 0])
        return query_map(row.on_queries(rows.mean(0)), cross.mean(0))
    return gradient_map(row.on_image(row.readouts.rows[0]), row.on_image(row.gradient[0]), row.wanted, relu="grad")


def length_on_image(row: Row) -> Float[Array, "E E"]:
    """Length of the gradient at each pixel of the first image, as the encoder reads it."""
    return gradient_length(row.gradient[0])


def brief(template: str | Template) -> str:
    """The ending that asks for a short answer; none where the template itself does."""
    return "open" if as_template(template).name == "instructblip" else "short"


def preview_size(size: tuple[int, int], longest: int = 512) -> tuple[int, int]:
    """(width, height) of the same shape, at most `longest`: the resolution of heat maps in image coordinates."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
