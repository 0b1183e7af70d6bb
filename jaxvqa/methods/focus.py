"""FOCUS: crop where an image's cached values are like those of an object's name, and ask whether it is there."""

from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import inf, nan
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxvqa import methods
from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry, covers, missing
from jaxvqa.images import CLIP_MEAN_COLOUR, crop, pixel_box
from jaxvqa.methods import Facts, check_choice, fill, scaled_layer
from jaxvqa.methods.targets import Target, by_rules, named, parse, read_examples, stem
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import preview_size
from jaxvqa.prompts import MARKER, Prompt, render
from jaxvqa.regions.canvas import close_up, compose, highlight, paste
from jaxvqa.regions.proposals import Regions, merge, propose, to_pixels, union
from jaxvqa.requests import Answer, Generate, Read, Row, Sample, Score, YesNo
from jaxvqa.taps import ReadSpec
from jaxvqa.transforms.blur import blur_weights, pool_weights
from jaxvqa.transforms.resample import Overlap, lay
from jaxvqa.transforms.value_similarity import relevance, value_similarity
from jaxvqa.typing import Array, Bool, Float

ASKING = Vanilla()

# ZoomEye's words (om-ai-lab/ZoomEye), its rectangle's colour left open.
MAIN_IMAGE = "This is the main image, and the section enclosed by the {colour} rectangle is the focus region."
ZOOMED_IN = "This is the zoomed-in view of the focus region."


@dataclass(frozen=True)
class Focus:
    """FOCUS: find what the question names by value similarity, verify the best regions, answer on a view of them.

    `Answer.grid` is the largest value over the targets' relevance maps, each of sum 1.
    """

    name: ClassVar[str] = "focus"
    paper: ClassVar[str] = "FOCUS: Internal MLLM Representations for Efficient Fine-Grained Visual Question Answering"

    n_steps: int = 8
    """n_steps, the regions of each target that are verified. 1 without overrun verifies none: the ablation without
    ranking."""
    overrun: bool = True
    """Whether verification goes on, down to the first "Yes", where all of them are answered "No"."""
    targets: tuple[str, ...] | None = None
    """What to look for ("all ..." for all of a kind); None is what the question names."""
    extraction: Literal["examples", "rules"] = "examples"
    """Who says what a question names: the model after "examples", or the "rules" of `targets.by_rules`."""
    icl_examples: str | None = None
    """JSON file of examples with the keys of ZoomEye's (question_template, question_list, response_list); None is the
    library's own."""
    exist_suffix: str = " Answer Yes or No."
    """What follows "Is there a {target} in the image?"."""
    layer_start: int | None = None
    """l, first decoder layer (0-based) whose values are compared; None is 14 of 32, and 21 of 28 on LLaVA-OneVision and
    models that see detail, at the same depth in models with more or fewer."""
    layer_end: int | None = None
    """L, the layer after the last; None is the model's number of layers."""
    feature: Literal["value", "key_no_rope", "random"] = "value"
    """What is compared: cached values, or keys before their rotation; "random" is a random map instead of a pass."""
    norm: Literal["row", "column"] = "row"
    """What similarities are divided by: the sum of the target token's row, or of each image token's own."""
    clip_negative: bool = True
    """Whether negative similarities count as 0 where the maps of a target's tokens are multiplied."""
    windows: int = 1
    """Windows along each axis, each overlapping the next by half, that are read one by one for a map of (windows + 1)/2
    times the resolution (section 4.6); 1 reads the whole image once."""
    blur: float | None = None
    """Sigma in cells of the Gaussian filter over a map; None is 0, and 1 on models that see detail (Qwen-VL: 2)."""
    pool: int | None = None
    """Cells along each axis that become one, after the filter; None is 1, and 2 on models that see detail (Qwen-VL:
    4)."""
    mask_padding: bool = False
    """Whether cells of mere padding are left out of the map."""
    n_anchors: int | None = None
    """k, anchor points; None is 15 below `n_anchors_switch` steps and 30 from there on."""
    n_anchors_switch: int = 4
    """The n_steps from which on there are 30 anchors: 4 in Table 7, 3 by the passes on HR-Bench."""
    anchors: Literal["greedy", "topk_filter"] = "greedy"
    """See `regions.proposals.find_anchors`."""
    s_dist: float | None = None
    """s_dist, least distance of anchors in cells; None is 3 on a map of 24 cells a side (the paper has 2 on V*Bench),
    in proportion on others, and 2 on models that see detail."""
    s_min: int | None = None
    """s_min, side of the smallest regions in cells; None is 3 on a map of 24 cells a side, on others the odd number
    next to the same share of the side, and 3 on models that see detail, whose maps differ in size."""
    s_max: int | None = None
    """s_max, side of the largest; None is 5 on a map of 24 cells a side and on models that see detail (the paper has 9
    on V*Bench), on others as `s_min`."""
    threshold: float = 0.5
    """A region grows while its mean is at least this share of `threshold_ref`."""
    threshold_ref: Literal["anchor", "max", "absolute"] = "anchor"
    """The value at the region's anchor, the map's largest, or 1."""
    nms_iou: float = 0.3
    """Intersection over union from which on a region suppresses a worse one."""
    min_crop: bool = False
    """Whether regions are verified in a crop of at least the encoder's side (ZoomEye)."""
    t_type2: float | None = None
    """t_type2, the confidence above which regions are kept where all of a kind are wanted; None is 0.6, and 0.5 on
    models that see detail."""
    merge_dilation: float = 0.0
    """Pixels by which such regions are enlarged on every side to see which overlap (ZoomEye: 50)."""
    final: Literal["canvas", "crop", "two_image"] | None = None
    """What the answer is given on: the crop around all regions or, if they lie far apart, a "canvas" of them; always
    the "crop"; or "two_image", the regions outlined, and a crop of each. None is the first, and the last on models that
    see detail."""
    t_obj_dist: float | None = None
    """t_obj_dist, the distance of two regions' centres that is far, in pixels of the image; None is 1200 for an encoder
    of 336 pixels, in proportion for others."""
    paste: Literal["relative", "columns"] = "relative"
    """How more than two regions lie on a canvas (`regions.canvas.paste`)."""
    logits_match: bool = False
    """Whether the answer is the likeliest of the sample's options, not generated."""
    like: Vanilla = ASKING
    """What asks the question; the search uses its template, too."""
    seed: int = 0
    """With the sample's id, decides random maps."""
    facts: Facts | None = None
    """The model, whose image tokens must be known beforehand; filled in when the method is bound to it."""

    def __post_init__(self):
        for option, hint in get_type_hints(type(self)).items():
            choices = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
            if choices and getattr(self, option) is not None:
                check_choice(self, option, get_args(choices[0]))
        for option in ("n_steps", "windows"):
            if getattr(self, option) < 1:
                raise UserError(f"focus: {option}={getattr(self, option)}; expected 1 or more")

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "Focus":
        bound, layers = fill(self, **preset), facts.num_layers
        if facts.queries and bound.feature != "random":
            raise UserError(
                f"focus: feature={bound.feature!r} compares image tokens that show a cell each; {facts.name} sees an "
                f"image through queries: use feature='random', or another method"
            )
        if bound.windows > 1 and (facts.detail or any(cells % 2 for cells in facts.grid)):
            seen = "sees detail by itself" if facts.detail else f"has {facts.grid} image tokens"
            raise UserError(f"focus: windows={bound.windows} overlap by half; {facts.name} {seen}")
        scale = max(facts.grid) * (bound.windows + 1) / 2 / 24
        if facts.detail:
            bound = fill(bound, layer_start=scaled_layer(21, 28, layers), s_dist=2.0, s_min=3, s_max=5, t_type2=0.5)
            bound = fill(bound, blur=1.0, pool=2, final="two_image")
        bound = fill(bound, blur=0.0, pool=1, t_type2=0.6, final="canvas")
        bound = fill(
            bound,
            layer_start=scaled_layer(14, 32, layers),
            layer_end=layers,
            n_anchors=15 if bound.n_steps < bound.n_anchors_switch else 30,
            s_dist=3 * scale,
            s_min=odd(3 * scale),
            s_max=max(odd(5 * scale), bound.s_min or 0),
            t_obj_dist=1200 * facts.image_side / 336,
        )
        if not 0 <= bound.layer_start < bound.layer_end <= layers:
            raise UserError(
                f"focus: layer_start={bound.layer_start}, layer_end={bound.layer_end}; {facts.name} has {layers} layers"
            )
        if bound.blur < 0 or bound.pool < 1:
            raise UserError(f"focus: blur={bound.blur}, pool={bound.pool}; expected blur >= 0 and pool >= 1")
        if bound.n_anchors < 1 or not 1 <= bound.s_min <= bound.s_max:
            sizes = f"n_anchors={bound.n_anchors}, s_min={bound.s_min}, s_max={bound.s_max}"
            raise UserError(f"focus: {sizes}; expected n_anchors >= 1 and 1 <= s_min <= s_max")
        return replace(bound, like=methods.bind(self.like, facts), facts=facts)

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        assert self.facts is not None, "bound"
        if self.logits_match and not sample.options:
            raise UserError(f"focus: logits_match=True, but sample {sample.id!r} has no options to choose from")
        targets = yield from self.find_targets(sample)
        if not targets:
            text = yield from self.answer(sample, np.zeros((0, 4)))
            return Answer(text, status="no target")
        view = self.view_of(sample.image)
        maps = yield from self.maps(sample, targets, view)
        regions = [self.propose(heat, view) for heat in maps]
        confidences = yield from self.verify(sample, targets, regions)
        boxes, scores, notes = self.select(targets, regions, confidences)
        text = yield from self.answer(sample, boxes, apart=any(target.every for target in targets))
        grid = np.max(maps, axis=0)
        notes += ["even map"] * any(np.ptp(heat) == 0 for heat in maps)
        heatmap = view.to_image(grid, preview_size(sample.image.size))
        return Answer(text, boxes=boxes, scores=scores, grid=grid, heatmap=heatmap, status="; ".join(notes) or "ok")

    def find_targets(self, sample: Sample) -> Generator[Any, Any, tuple[Target, ...]]:
        """What to look for."""
        if self.targets is not None:
            return named(self.targets)
        question = stem(sample.question)
        if self.extraction == "rules":
            return by_rules(question)
        turns = read_examples(self.icl_examples).turns(question)
        # FOCUS does not count it among its passes (Table 10).
        return parse((yield Generate((), self.prompt(turns, num_images=0), max_new_tokens=256, passes=0)).text)

    def view_of(self, image: Image.Image) -> Geometry:
        """Where the cells of a relevance map look."""
        view = self.facts.geometry(image.size)
        (h, w), (width, height) = view.grid, view.extent
        if self.windows > 1:
            return replace(view, grid=(h * (self.windows + 1) // 2, w * (self.windows + 1) // 2))
        assert self.pool, "bound"
        y, x = min(self.pool, h), min(self.pool, w)
        # What pooling leaves over at the end is not looked at.
        extent = (width * (w // x * x) / w, height * (h // y * y) / h)
        return replace(view, grid=(h // y, w // x), extent=extent, capacity=None)

    def maps(
        self, sample: Sample, targets: tuple[Target, ...], view: Geometry
    ) -> Generator[Any, Any, list[np.ndarray]]:
        """Each target's relevance map: f32 [h, w], the absolute values summing to 1; even where there is nothing."""
        if self.feature == "random":
            draw = sample.random(self.seed).random((len(targets), *view.grid), np.float32)
            return [heat / heat.sum() for heat in draw]
        assert self.layer_start is not None and self.layer_end is not None, "bound"
        corners, seen = corners_of(view, self.windows), self.facts.geometry(sample.image.size)
        pictures = (
            [sample.image] if self.windows == 1 else [window(sample.image, view, at, self.facts.grid) for at in corners]
        )
        spec = ReadSpec(
            tuple(range(self.layer_start, self.layer_end)),
            frozenset({"values" if self.feature == "value" else "keys"}),
        )
        readings = yield [
            Read((picture,), self.existence(target), spec, rows="question", reduce=REDUCTIONS[self.feature, self.norm])
            for target in targets
            for picture in pictures
        ]
        found = []
        for number in range(len(targets)):
            mine = readings[number * len(pictures) : (number + 1) * len(pictures)]
            tokens = mine[0].value[0]
            if self.windows > 1:
                tokens = joined(np.stack([reading.value[0] for reading in mine]), corners, view.grid)
            with on_host():
                heat = np.asarray(_relevance(tokens, mine[0].value[1], clip_negative=self.clip_negative))
            heat = self.smooth(seen.on_grid(heat)) if self.windows == 1 else heat
            found.append(heat if np.isfinite(heat).all() else np.full(view.grid, 1 / heat.size, np.float32))
        return found

    def smooth(self, heat: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h2 w2"]:
        """A map after the filter, in fewer cells."""
        assert self.blur is not None and self.pool, "bound"
        if self.blur == 0 and self.pool == 1:
            return heat
        rows, columns = (pool_weights(size, self.pool) @ blur_weights(size, self.blur) for size in heat.shape)
        with on_host():
            heat = lay(heat, Overlap(rows, columns, np.ones(heat.shape, bool)))
        total = heat.sum()
        return heat / total if total > 0 else heat

    def existence(self, target: Target) -> Prompt:
        """The question whether an image shows the target, whose name alone is marked as the user's words."""
        before, after = "Is there a ", f" in the image?{self.exist_suffix}"
        prompt = self.prompt(before + target.name + after)
        at = prompt.roles.index("user")
        chunks = *prompt.chunks[:at], before, target.name, after, *prompt.chunks[at + 1 :]
        roles = *prompt.roles[:at], "template", "user", "template", *prompt.roles[at + 1 :]
        return replace(prompt, chunks=chunks, roles=roles)

    def prompt(self, turns: str | list[str], num_images: int = 1) -> Prompt:
        """Words of the search, in the template in which the question will be asked."""
        assert self.like.template is not None, "bound"
        return render(self.like.template, turns, num_images=num_images, ending="open")

    def propose(self, heat: np.ndarray, view: Geometry) -> Regions:
        """Regions of a relevance map in pixels, best first."""
        padding = tuple(map(missing, heat.shape))
        seen = view.valid() if self.mask_padding else np.ones(heat.shape, bool)
        with on_host():
            found = propose(
                np.pad(heat, padding),
                np.pad(seen, padding),
                np.array(heat.shape),
                num_anchors=self.n_anchors,
                smallest=self.s_min,
                largest=self.s_max,
                distance=self.s_dist,
                threshold=self.threshold,
                nms_iou=self.nms_iou,
                anchor_choice=self.anchors,
                threshold_ref=self.threshold_ref,
            )
            return to_pixels(found, view)

    def verify(
        self, sample: Sample, targets: tuple[Target, ...], regions: list[Regions]
    ) -> Generator[Any, Any, list[list[float]]]:
        """Existence confidence of each target's first regions: all at once, then one by one where none is there."""

        def ask(number: int, rank: int) -> YesNo:
            box = regions[number].boxes[rank]
            close = close_up(sample.image, box, self.facts.image_side) if self.min_crop else crop(sample.image, box)
            return YesNo((close,), self.existence(targets[number]))

        steps = 0 if self.n_steps == 1 and not self.overrun else self.n_steps
        first = [
            (number, rank)
            for number, (target, found) in enumerate(zip(targets, regions, strict=True))
            for rank in range(len(found.boxes) if target.every else min(steps, len(found.boxes)))
        ]
        found: list[list[float]] = [[] for _ in targets]
        if first:
            for (number, _), confidence in zip(first, (yield [ask(*pair) for pair in first]), strict=True):
                found[number].append(confidence)
        going = [
            n for n, target in enumerate(targets) if self.overrun and not target.every and max(found[n], default=0) < 0
        ]
        while going := [n for n in going if len(found[n]) < len(regions[n].boxes)]:
            for number, confidence in zip(going, (yield [ask(n, len(found[n])) for n in going]), strict=True):
                found[number].append(confidence)
            going = [n for n in going if found[n][-1] <= 0]
        return found

    def select(
        self, targets: tuple[Target, ...], regions: list[Regions], confidences: list[list[float]]
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """The boxes to answer on, [n, 4] in pixels, in the order of the targets and then of confidence; their
        confidences, of merged ones the highest, NaN where unverified; and notes."""
        assert self.t_type2 is not None, "bound"
        chosen, scores, notes = [np.zeros((0, 4))], [], []
        for target, found, confidence in zip(targets, regions, confidences, strict=True):
            if not len(found.boxes):
                notes.append(f"no region for {target.name}")
                continue
            # Sorting is stable: equal ones go by relevance.
            ranked = sorted(range(len(confidence)), key=lambda rank: -confidence[rank]) or [0]
            kept = [rank for rank in ranked if confidence[rank] > self.t_type2] if target.every else ranked[:1]
            if not kept:
                notes.append(f"no {target.name} above the threshold")
            chosen.append(found.boxes[kept or ranked[:1]])
            scores += [confidence[rank] if confidence else nan for rank in kept or ranked[:1]]
        boxes, scores = np.concatenate(chosen), np.array(scores, np.float32)
        if any(target.every for target in targets):
            parts, boxes = boxes, merge(boxes, self.merge_dilation)
            held = [[covers(box, part) for part in parts] for box in boxes]
            scores = np.array([np.fmax.reduce(scores[which]) for which in held], np.float32)
        return boxes, scores, notes

    def answer(self, sample: Sample, boxes: np.ndarray, apart: bool = False) -> Generator[Any, Any, str]:
        """The final answer on a view of the boxes; without any, on the whole image.

        apart: whether several boxes lie on a canvas however near they are.
        """
        assert self.t_obj_dist is not None, "bound"
        image, question = sample.image, sample.question
        if self.final == "two_image" and len(boxes):
            pictures, question = side_by_side(image, boxes, question, len(sample.images))
        elif self.final == "canvas" and apart and len(boxes) > 1:
            pictures = [paste(image, boxes, side=self.facts.image_side, layout=self.paste).image]
        else:
            far = self.t_obj_dist if self.final == "canvas" else inf
            pictures = [compose(image, boxes, far=far, side=self.facts.image_side, layout=self.paste).image]
        asked = replace(sample, images=(*pictures, *sample.images[1:]), question=question)
        if not self.logits_match:
            return (yield from self.like(asked)).text
        request = next(replace(self.like, ending="logits_match")(asked))
        scores = yield Score(request.images, request.prompt, options=sample.options)
        return sample.options[int(np.argmax(scores))]


# ---- maps ------------------------------------------------------------------------------------------------------------


def token_maps(row: Row, feature: str, norm: Any) -> tuple[Float[Array, "R h w"], Bool[Array, "R"]]:
    """How like each wanted token's values (or keys) are to those of the first image's cells, and which are wanted."""
    read = row.readouts.values if feature == "value" else row.readouts.keys
    valid = jnp.arange(read.shape[1]) < row.length
    return row.on_image(value_similarity(read, row.rows, valid, norm)), row.wanted


# Made once: a reduction is part of what a program is known by.
REDUCTIONS = {
    (feature, norm): partial(token_maps, feature=feature, norm=norm)
    for feature in ("value", "key_no_rope")
    for norm in ("row", "column")
}
_relevance = jax.jit(relevance, static_argnames=("clip_negative",))


def on_host():
    """Where small programs run: beside the accelerator, behind whose queue of batches they would have to wait."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return nullcontext()


def corners_of(view: Geometry, count: int) -> list[tuple[int, int]]:
    """First cell (row, column) on the grid of `view` of each of count x count windows, row by row.

    A window is 2 / (count + 1) of the view wide and high; those that would see none of the image are left out.
    """
    h, w = (2 * cells // (count + 1) for cells in view.grid)
    seen, steps = view.valid(), range(count)
    corners = [(row * h // 2, column * w // 2) for row, column in product(steps, steps)]
    return [(row, column) for row, column in corners if seen[row : row + h, column : column + w].any()]


def window(image: Image.Image, view: Geometry, corner: tuple[int, int], grid: tuple[int, int]) -> Image.Image:
    """The part of a view behind `grid` cells from `corner` on, to whole pixels; the mean colour beyond the image."""
    (row, column), (h, w), (x, y) = corner, grid, view.edges()
    size = max(1, round(x[column + w] - x[column])), max(1, round(y[row + h] - y[row]))
    part = Image.new("RGB", size, CLIP_MEAN_COLOUR)
    part.paste(image, (-round(x[column]), -round(y[row])))
    return part


def joined(
    maps: Float[np.ndarray, "n R h w"], corners: list[tuple[int, int]], grid: tuple[int, int]
) -> Float[np.ndarray, "R H W"]:
    """Maps of windows as one of `grid` cells: the mean where windows overlap, 0 where there is none."""
    (_, R, h, w), weight = maps.shape, np.zeros(grid, np.float32)
    total = np.zeros((R, *grid), np.float32)
    for part, (row, column) in zip(maps, corners, strict=True):
        total[:, row : row + h, column : column + w] += part
        weight[row : row + h, column : column + w] += 1
    return total / np.maximum(weight, 1)


def odd(cells: float) -> int:
    """The odd number next to `cells`, the larger of two, at least 1."""
    return 2 * max(0, int(cells // 2)) + 1


# ---- the view of models that see several images ----------------------------------------------------------------------


def side_by_side(
    image: Image.Image, boxes: np.ndarray, question: str, num_images: int
) -> tuple[list[Image.Image], str]:
    """ZoomEye's images and question: the boxes outlined (of several, in the part around them), a crop of each."""
    colour = "blue" if "red rectangle" in question else "red"
    part = pixel_box(union(boxes), image.size) if len(boxes) > 1 else (0, 0, *image.size)
    main = highlight(image.crop(part), boxes - np.tile(part[:2], 2), colour)
    told = [f"{MARKER}\n{MAIN_IMAGE.format(colour=colour)}", *[f"{MARKER}\n{ZOOMED_IN}"] * len(boxes)]
    question = question if MARKER in question else f"{MARKER}\n" * num_images + question
    return [main, *(crop(image, box) for box in boxes)], question.replace(MARKER, "\n".join(told), 1)
