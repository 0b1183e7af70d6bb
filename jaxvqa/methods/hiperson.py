"""HiPerson ("Beyond the Panorama", ACL 2026): crop where two maps agree, then reason from the crop to the scene."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from jaxvqa.bundled import SPECKS_BLIP, VLMS
from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry, for_squash, missing
from jaxvqa.images import crop
from jaxvqa.methods import Facts, check_choice, fill, middle_layer
from jaxvqa.methods.vicrop import brief, preview_size
from jaxvqa.prompts import ENDINGS, GENERAL_QUESTION, MARKER, SHORT_ANSWER, Template, as_template, render, stem, worded
from jaxvqa.regions.tiles import cut, join, joined_geometry
from jaxvqa.regions.windows import RATIOS, Tiles, high_res_split, search
from jaxvqa.requests import Answer, Continue, Generate, Gradient, Read, Reading, Row, Sample
from jaxvqa.taps import ReadSpec
from jaxvqa.transforms.gradient import gradient_map, match_layer, text_rows
from jaxvqa.transforms.normalise import minmax
from jaxvqa.transforms.relative_attention import relative_attention
from jaxvqa.transforms.resample import lay, overlap
from jaxvqa.typing import Array, Float

OBSERVE = (
    "1) Observe the cropped image above and provide a brief description.\n2) Now observe the original full image below:"
)
RELATE = (
    "Re-describe the content of the cropped region using the full image for context.\n"
    "3) Based on the information from both images, answer the question:"
)
SINGLE = "Based on the cropped image and the full image above, answer the question:"
"""The prompts of the paper's appendix C; the images of the three steps stand before and after `OBSERVE`."""
DEFAULT = dict(
    layer=-1,
    query_rows="question",
    q_ref="Describe this image",
    neighbourhood=4,
    area_norm=True,
    align="resample",
)
MATCHER = "Salesforce/blip-itm-large-coco"
SHORT = 20
"""Tokens that the answer in a second turn may have: a word or a phrase."""

CHOICES = {
    "preset": ("default", "literal", "middle", "vicrop_like"),
    "maps": ("both", "rel", "grad"),
    "query_rows": ("question", "last"),
    "itm_rows": ("enc", "tokens_mean"),
    "relu": ("sum", "grad"),
    "align": ("resample", "none"),
    "prompt": ("three_step", "single", "vicrop"),
    "image_order": ("crop_first", "full_first"),
    "extract": ("marker", "second_turn", "whole"),
}

Box = tuple[float, ...]


@dataclass(frozen=True)
class HiPerson:
    """HiPerson: crop where relative attention and an image-text matcher's gradient point, then reason in three steps.

    The answer's `grid` is M^sem over the whole image, in as many rows and columns as the model has tokens; its
    `reasoning` the whole reply; its `status` "second turn" where the reply named no answer and was asked for one.
    """

    name: ClassVar[str] = "hiperson"
    paper: ClassVar[str] = "Beyond the Panorama (HiPerson), ACL 2026"

    preset: Literal["default", "literal", "middle", "vicrop_like"] = "default"
    """What the following are where they are None: "literal" is the equations as printed, "middle" the default with
    layer 14 of 32, "vicrop_like" the map as ViCrop makes it."""
    maps: Literal["both", "rel", "grad"] = "both"
    """What M^sem is made of (Eq. 5): M^rel, M^grad or both."""

    layer: int | tuple[int, ...] | None = None
    """Decoder layer (0-based; negative from the end) whose attention A is read; of several, the mean of their M^rel.
    None is the last one, as the paper says, though its appendix B finds deep layers diverging."""
    query_rows: Literal["question", "last"] | None = None
    """Rows of A averaged in Eq. 1: all tokens of the "question", or the "last" of the prompt (ViCrop)."""
    include_template: bool = False
    """Whether "question" means all text after the image."""
    q_ref: str | None = None
    """q_ref, the neutral question; None is "Describe this image"."""
    eps: float = 1e-8
    """Added to the denominator of Eq. 2."""

    matcher: str | None = None
    """BLIP image-text retrieval model behind M^grad: a folder or hub id. None is the bundled one beside a bundled
    model, otherwise "Salesforce/blip-itm-large-coco"."""
    itm_layer: int | None = None
    """Text layer (0-based; negative from the end) whose cross-attention A_cross is read. None is the last, and with
    "tokens_mean" layer 6 (LAVIS); of the bundled matcher it is layer 0, chosen on development questions."""
    itm_rows: Literal["enc", "tokens_mean"] = "enc"
    """Rows of A_cross: that of [ENC], or the mean over the text's own tokens (LAVIS; zero in the last layer)."""
    relu: Literal["sum", "grad"] = "sum"
    """ReLU of the sum over heads (Eq. 4), or of the gradient before the product (LAVIS)."""

    align: Literal["resample", "none"] | None = None
    """"resample" brings both maps onto one grid over the whole image before they are added; "none" adds them cell by
    cell and lays them over the image, wherever the encoders looked."""
    betas: tuple[float, ...] = RATIOS
    """B, the window sizes to compare, in units of `base`."""
    base: int | None = None
    """W of Eq. 6, side in pixels of the smallest crop; None is the side of the encoder's input (336 in LLaVA-1.5)."""
    neighbourhood: Literal[4, 8] | None = None
    """N of Eq. 9: the 4 positions along the axes (None), or 8."""
    area_norm: bool | None = None
    """Whether saliencies are compared per cell; Eq. 9 does not, and favours large windows. None is true."""
    tiling: int | None = None
    """Height in pixels that a tile has at most where M^rel is put together from those of tiles, for large images:
    ViCrop's `_high` has 1024. None is no tiles."""
    skip_if_full: bool = False
    """Whether a crop that is the whole image is left out, and the question asked about the image alone."""

    template: str | Template | None = None
    """Prompt template, or its name; None is the model's own."""
    prompt: Literal["three_step", "single", "vicrop"] = "three_step"
    """The question on crop and image: in "three_step"s, in a "single" one, or as ViCrop asks it (no reasoning)."""
    image_order: Literal["crop_first", "full_first"] | None = None
    """"crop_first" as the prompts say it; "full_first" is Eq. 11, both images before the text. None is as the prompts
    say it, and full_first for "vicrop"."""
    ending: str | None = None
    """What follows the question (`prompts.ENDINGS`); None is "mcq_letter_parens" for a question with options, otherwise
    nothing ("open"), and for "vicrop" "short"."""
    extract: Literal["marker", "second_turn", "whole"] | None = None
    """The answer: the line after the last "Answer:" of the reply, or without one as in "second_turn", where the
    conversation goes on to ask for it; or the "whole" reply. None is "marker", and "whole" for "vicrop"."""
    max_new_tokens: int = 512
    """Tokens that the reply may have."""
    facts: Facts | None = None
    """The model, whose token grid must be known beforehand; filled in when the method is bound to it."""

    def __post_init__(self):
        for option, allowed in CHOICES.items():
            if getattr(self, option) is not None:
                check_choice(self, option, allowed)
        if self.neighbourhood not in (None, 4, 8):
            raise UserError(f"hiperson: neighbourhood={self.neighbourhood}; expected 4 or 8")
        if self.tiling is not None and self.tiling < 1:
            raise UserError(f"hiperson: tiling={self.tiling}; expected at least 1 pixel, or none")

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "HiPerson":
        bound = fill(fill(self, **presets(middle_layer(facts))[self.preset]), **preset)
        vicrop, bundled = bound.prompt == "vicrop", facts.name in [folder.name for folder in VLMS]
        bound = fill(
            bound,
            **DEFAULT,
            base=facts.image_side,
            template=facts.template,
            image_order="full_first" if vicrop else "crop_first",
            extract="whole" if vicrop else "marker",
        )
        if bound.maps != "rel":
            bound = fill(bound, matcher=str(SPECKS_BLIP) if bundled else MATCHER)
            published = -1 if bound.itm_rows == "enc" else 6
            bound = fill(bound, itm_layer=0 if bound.matcher == str(SPECKS_BLIP) else published)
            if bound.itm_layer == -1:  # of others, only the matcher knows whether they are the last
                match_layer(-1, 1, bound.itm_rows)
        layers, count = (bound.layer,) if isinstance(bound.layer, int) else bound.layer, facts.num_layers
        if not layers or not all(-count <= layer < count for layer in layers):
            raise UserError(f"hiperson: layer={bound.layer}; {facts.name} has layers 0 to {count - 1}")
        return replace(bound, layer=tuple(sorted({layer % count for layer in layers})), facts=facts)

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        box, grid, heatmap = yield from self.locate(sample)
        answer = yield from self.answer(sample, box)
        return replace(answer, grid=grid, heatmap=heatmap)

    def locate(self, sample: Sample) -> Generator[Any, Any, tuple[Box, np.ndarray, np.ndarray]]:
        """The search: box in pixels of the first image, M^sem on its grid and in image coordinates."""
        assert self.facts is not None and self.base is not None, "bound"
        size, side = sample.image.size, self.facts.image_side
        tiles = high_res_split(size, self.tiling) if self.tiling else Tiles(1, 1, size)
        looks = [] if self.maps == "grad" else [*self.look(sample, tiles)]
        match = [] if self.maps == "rel" else [self.match(sample)]
        found = yield [*looks, *match]
        grid = found[0].geometries[0].grid if looks else self.facts.geometry(size, len(sample.images)).grid
        view, tile = joined_geometry(size, tiles, grid, side), for_squash(*tiles.size, side, grid)

        maps = []
        if looks:
            pairs = zip(found[: len(looks) // 2], found[len(looks) // 2 : len(looks)], strict=True)
            relative = [
                self.aligned(q.geometries[0].on_grid(np.asarray(relative_map(q.value, r.value, eps=self.eps))), q, tile)
                for q, r in pairs
            ]
            maps.append(join(np.stack(relative), tiles))
        if match:
            maps.append(self.matched(found[-1], view))
        shapes = [heatmap.shape for heatmap in maps]
        if len(set(shapes)) > 1:
            raise UserError(f"hiperson: align='none' adds maps cell by cell; theirs are {shapes}; use 'resample'")
        rows, columns = map(missing, shapes[0])
        h, w = shapes[0]
        semantic = np.asarray(fuse([np.pad(heatmap, (rows, columns), mode="edge") for heatmap in maps]))[:h, :w]
        how: dict[str, Any] = dict(neighbours=self.neighbourhood, area_norm=self.area_norm)
        box = search(semantic, size, self.base, self.betas, geometry=view, **how)
        return box, semantic, view.to_image(semantic, preview_size(size))

    def look(self, sample: Sample, tiles: Tiles) -> Generator[Read, None, None]:
        """Attention to the image, or to each tile of it, under the question, then under q_ref."""
        assert isinstance(self.layer, tuple) and self.query_rows and self.q_ref and self.template, "bound"
        images = cut(sample.image, tiles) if self.tiling else [sample.image]
        spec = ReadSpec(layers=self.layer, read=frozenset({"rows"}))
        for question in (stem(sample.question), self.q_ref):
            prompt = render(self.template, question, num_images=len(sample.images), ending=brief(self.template))
            everything = self.include_template and self.query_rows == "question"
            rows = prompt.text.split(MARKER)[-1] if everything else self.query_rows
            for image in images:
                yield Read((image, *sample.images[1:]), prompt, spec, rows=rows, reduce=focus)

    def match(self, sample: Sample) -> Gradient:
        """What in the image speaks for a match with the question."""
        assert self.itm_layer is not None, "bound"
        layers, reduce = (self.itm_layer,), MATCH_MAPS[self.itm_rows, self.relu]
        return Gradient(
            sample.images[:1], stem(sample.question), of="match", layers=layers, reduce=reduce, model="matcher"
        )

    def matched(self, reading: Reading, view: Geometry) -> np.ndarray:
        """M^grad on the cells of `view`."""
        if self.itm_rows == "tokens_mean" and not reading.value.any():
            raise UserError(
                f"hiperson: itm_layer={self.itm_layer} with itm_rows='tokens_mean' gives no map: in the last layer "
                f"only [ENC] has a gradient; use itm_rows='enc', or an earlier layer (LAVIS: 6)"
            )
        return self.aligned(reading.value, reading, view)

    def aligned(self, heatmap: Any, reading: Reading, view: Geometry) -> np.ndarray:
        """A map on the cells of `view`; with align="none" as it is."""
        onto = overlap(reading.geometries[0], view) if self.align == "resample" else None
        return np.asarray(heatmap) if onto is None else lay(heatmap, onto)

    def answer(self, sample: Sample, box: Box) -> Generator[Any, Any, Answer]:
        """The reply to the crop and the image, and the answer in it."""
        assert self.template and self.extract, "bound"
        if self.skip_if_full and box == (0, 0, *sample.image.size):
            images, turn, extract = sample.images, self.worded(sample, "short"), "whole"
        else:
            images, turn = self.views(sample, box)
            extract = self.extract
        ask = partial(render, self.template, num_images=len(images), ending="open")
        reply = yield Generate(images, ask(turn), max_new_tokens=self.max_new_tokens, keep=extract != "whole")
        text, status = {"whole": reply.text, "marker": marked(reply.text), "second_turn": None}[extract], "ok"
        if text is None:
            second = ask([turn, reply.text, SHORT_ANSWER])
            said = yield Continue(of=reply, prompt=second, max_new_tokens=min(SHORT, self.max_new_tokens))
            text = said.text.removesuffix(".")
            status = "second turn" if extract == "marker" else "ok"
        return Answer(text, reasoning=reply.text, boxes=np.array([box]), status=status)

    def views(self, sample: Sample, box: Box) -> tuple[tuple[Any, ...], str]:
        """The images in prompt order, and the user's turn that asks about them."""
        assert self.template, "bound"
        near, far = (crop(sample.image, box),), sample.images
        question = self.worded(sample, "short" if self.prompt == "vicrop" else "open")
        if self.prompt == "three_step":
            # Where a model takes all images before the text, they stand there in the order in which it speaks of them.
            if self.image_order == "crop_first" and not as_template(self.template).images_outside:
                turn = f"{MARKER}\n{OBSERVE}\n{MARKER * len(far)}\n{RELATE}\n{question}"
            else:
                turn = f"{OBSERVE}\n{RELATE}\n{question}"
        else:
            turn = f"{SINGLE}\n{question}" if self.prompt == "single" else question
        return (near + far if self.image_order == "crop_first" else far + near), turn

    def worded(self, sample: Sample, ending: str) -> str:
        """The full question with the ending asked for, or with this one."""
        assert self.template, "bound"
        ending = brief(self.template) if ending == "short" else ending
        ending = self.ending or ("mcq_letter_parens" if sample.options else ending)
        listed = sample.options if ENDINGS[ending].option else ()
        return worded(sample.question.replace(MARKER, "").strip(), ending, listed, self.template)


def marked(reply: str) -> str | None:
    """The answer that a reply names: the line after its last "Answer:", without a final period; None if there is none.

    >>> marked("1) A plate. 2) It lies in the middle. 3) Answer: K.")
    'K'
    """
    _, marker, rest = reply.rpartition("Answer:")
    return (marker and rest.partition("\n")[0].strip().removesuffix(".")) or None


def focus(row: Row) -> Float[Array, "C h w"]:
    """M_focus (Eq. 1) of every layer read: attention to the first image, averaged over heads and wanted rows."""
    wanted = row.wanted / row.wanted.sum()
    return row.on_image((row.readouts.rows * wanted[:, None]).sum(1))


def match_map(row: Row, *, rows: str, relu: str) -> Float[Array, "h w"]:
    """M^grad (Eq. 3-4) of a text's cross-attention, or LAVIS's."""
    attention, gradient = (x[0].reshape(*x.shape[1:3], *row.grid) for x in (row.readouts.rows, row.gradient))
    return gradient_map(attention, gradient, text_rows(rows, row.length, attention.shape[1]), relu=relu)


MATCH_MAPS = {
    (rows, relu): partial(match_map, rows=rows, relu=relu)
    for rows, relu in product(CHOICES["itm_rows"], CHOICES["relu"])
}


@partial(jax.jit, static_argnames="eps")
def relative_map(
    question: Float[Array | np.ndarray, "C h w"], reference: Float[Array | np.ndarray, "C h w"], *, eps: float
) -> Float[Array, "h w"]:
    """M^rel (Eq. 2), the mean over layers."""
    return relative_attention(question, reference, eps).mean(0)


@jax.jit
def fuse(maps: list[Float[Array | np.ndarray, "h w"]]) -> Float[Array, "h w"]:
    """M^sem (Eq. 5) of one map, or two."""
    return sum(map(minmax, maps))


def presets(middle: int) -> dict[str, dict[str, Any]]:
    """The named sets of options; what they leave open is `DEFAULT`."""
    general = dict(query_rows="last", q_ref=GENERAL_QUESTION)
    return {
        "default": {},
        "literal": dict(layer=-1, query_rows="question", neighbourhood=8, area_norm=False),
        "middle": dict(layer=middle),
        "vicrop_like": dict(layer=middle, neighbourhood=4, area_norm=True, align="none", **general),
    }
