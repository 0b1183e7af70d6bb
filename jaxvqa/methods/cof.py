"""CoF ("Coarse to Fine-Grained Image Understanding"): ground the answer, then attend more to where it lies."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np

from jaxvqa import methods
from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry
from jaxvqa.methods import Facts, check_choice, fill
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import preview_size
from jaxvqa.prompts import render
from jaxvqa.regions import boxes
from jaxvqa.requests import Answer, Call, Generate, Row, Sample
from jaxvqa.taps import Edit, Tap, Taps
from jaxvqa.transforms.reweight import log_reweight
from jaxvqa.typing import Array, Float

GROUNDING = (
    "According to the information in the image and the question, \n"
    "detail the bounding box of the region in the image that contains the answer in JSON format."
)
"""The released code's prompt; its line break is there."""
ASKING = Vanilla(template="vicuna_v1", max_new_tokens=128)


@dataclass(frozen=True)
class Cof:
    """CoF: the model says where the answer lies, and is asked again with its attention to those tokens times λ.

    Of InstructBLIP it is the Q-Former's attention to those patches, in all of its cross-attentions.
    """

    name: ClassVar[str] = "cof"
    paper: ClassVar[str] = "CoF: Coarse to Fine-Grained Image Understanding for Multi-modal Large Language Models"

    lam: float | None = None
    """λ, the factor of the attention weights; None is 2, in models of 40 layers (LLaVA-1.5-13B) 4.5, in InstructBLIP
    22."""
    alpha: float | None = None
    """α, the enlargement of the boxes; None is 1.3, in models of 40 layers and InstructBLIP 1."""
    layers: tuple[int, ...] | None = None
    """Decoder layers (0-based) whose attention is reweighted; None is all."""
    preset: Literal["default", "strict"] = "default"
    """What the following are where they are None: "strict" is the released code with its slips."""
    parse: str | None = None
    """Reading of the reply: "tolerant" (any JSON) or "strict" (one expression, the first match)."""
    units: Literal["view", "encoder", "thousandths"] | None = None
    """What a box with a number above 1.5 is measured in: pixels of the "view" (the image, or the square to which it is
    padded), pixels of what the "encoder" reads (Qwen2.5-VL), or "thousandths" of the view (Qwen2-VL, Qwen3-VL,
    InternVL). None is what the family was trained to say, otherwise the view."""
    multi_box: str | None = None
    """"union" of all boxes, or the "first"."""
    square: bool | None = None
    """Whether boxes become squares of their longer side."""
    clamp: str | None = None
    """At the border: "shift" moves a box inside, "code" is the release."""
    raster: str | None = None
    """Boxes to tokens: "code" (the release) or "cover" (all that a box touches)."""
    fallback: str | None = None
    """Tokens selected where no box is found: "all" or "none"."""
    grounding_prompt: str = GROUNDING
    """What follows the question's first line in the grounding prompt."""
    box_source: Callable | None = None
    """What says the boxes in the model's place, xyxy in pixels of the image: a function of the image and the question's
    first line, such as a detector. InstructBLIP says none by itself."""
    like: Vanilla = ASKING
    """What asks the question; the grounding uses its template and length, too."""
    facts: Facts | None = None
    """The model, whose image tokens must be known beforehand; filled in when the method is bound to it."""

    def __post_init__(self):
        check_choice(self, "preset", tuple(boxes.PRESETS))
        if self.units is not None:
            check_choice(self, "units", ("view", "encoder", "thousandths"))
        check_strength(self)

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "Cof":
        large = facts.num_layers >= 40
        lam = 22.0 if facts.queries else 4.5 if large else 2.0
        bound = fill(fill(self, **preset), lam=lam, alpha=1.0 if large or facts.queries else 1.3)
        if facts.family != "llava" and bound.like == ASKING:
            bound = replace(bound, like=replace(ASKING, template=None))
        bound = fill(bound, layers=tuple(range(facts.num_layers)), units="view", **boxes.PRESETS[self.preset])
        check_layers(bound, facts)
        return replace(bound, like=methods.bind(bound.like, facts), facts=facts)

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        assert self.facts is not None, "bound"
        view = self.facts.geometry(sample.image.size, len(sample.images))
        found = yield from self.ground(sample, view)
        how: dict[str, Any] = {name: getattr(self, name) for name in boxes.PRESETS[self.preset] if name != "parse"}
        mask = boxes.select(found.boxes, view.grid, self.alpha or 1.0, **how)
        answer = yield from reweighted(self, sample, mask, view)
        status = "nothing found" if found.status == "no_box" else found.status
        return replace(answer, boxes=boxes.to_pixels(found.boxes, view), status=status)

    def ground(self, sample: Sample, view: Geometry) -> Generator[Any, Any, boxes.Grounding]:
        """Where the answer lies, as `box_source` or the model says."""
        assert self.like.template is not None, "bound"
        stem = sample.question.split("\n")[0]
        if self.box_source is not None:
            given = np.asarray((yield Call(self.box_source, (sample.image, stem))), np.float64).reshape(-1, 4)
            return boxes.Grounding(boxes.from_pixels(given, view), "ok" if len(given) else "no_box")
        where = f"{stem}\n{self.grounding_prompt}"
        prompt = render(self.like.template, where, num_images=len(sample.images), ending="open")
        reply = yield Generate(sample.images, prompt, max_new_tokens=self.like.max_new_tokens)
        extents = {"encoder": view.encoder_size, "thousandths": 1000}
        return boxes.parse(reply.text, extents.get(self.units or "view", view.extent), self.parse or "tolerant")


def reweighted(method: Any, sample: Sample, mask: np.ndarray, view: Geometry) -> Generator[Any, Any, Answer]:
    """The second stage of a method with `lam`, `layers` and `like`: the question, with the mask's tokens reweighted."""
    mask = mask.astype(np.float32)
    strengths = np.ones((max(method.layers) + 1, 1), np.float32)
    strengths[list(method.layers)] = method.lam
    asking = method.like(sample)
    reply = yield replace(next(asking), taps=reweight, args=(view.for_program(mask), strengths))
    return Answer(reply.text, grid=mask, heatmap=view.to_image(mask, preview_size(sample.image.size)))


def reweight(row: Row, mask: Float[Array, "h w"], strengths: Float[Array, "L #N"]) -> Taps:
    """Multiply the attention of every row to the first image's tokens by λ^M, in prefill and while decoding.

    strengths: λ for each of the first L layers, and head if they differ; 1 leaves a layer as it is. Where the model
        sees the image through queries, the last of them is that of all cross-attentions by which these look at it.
    """
    if row.queries is not None:
        return Taps(cross_bias=row.on_cross(log_reweight(mask, strengths[-1][:, None, None])))
    bias = row.on_keys(log_reweight(mask, strengths[:, :, None, None]))
    return Taps((Edit(Tap(key_bias=bias), 0, len(strengths)),))


def check_strength(options: Any) -> None:
    """UserError where `lam` is given and is no factor."""
    if options.lam is not None and not 0 <= options.lam < inf:
        raise UserError(f"{options.name}: lam={options.lam}; expected 0 or more")


def check_layers(options: Any, facts: Facts) -> None:
    """UserError where `layers` are not the model's, or none can be chosen."""
    if not options.layers or not all(0 <= layer < facts.num_layers for layer in options.layers):
        raise UserError(f"{options.name}: layers={options.layers}; {facts.name} has layers 0 to {facts.num_layers - 1}")
    if facts.queries and tuple(options.layers) != tuple(range(facts.num_layers)):
        raise UserError(
            f"{options.name}: layers={options.layers}; {facts.name} sees an image through queries, all of whose "
            f"cross-attentions are reweighted: leave it out"
        )
