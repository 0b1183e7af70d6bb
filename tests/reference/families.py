"""ViCrop and FOCUS's map on the families after LLaVA-1.5: HF transformers behind its own processor, one at a time.

What a family adds to the references of LLaVA-1.5 is where its image tokens look. That is worked out here from the
image's size as the papers do it, and the rest from whole attention matrices and values: nothing of jaxvqa.
"""

import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from focus_reference import exists, product, propose, similarity, to_pixels
from plain import SHORT, View, crop, outputs_of
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from vicrop_reference import GENERAL, window, without_padding

PROCESSORS = {
    "internvl": InternVLProcessor,
    "llava_next": LlavaNextProcessor,
    "llava_onevision": LlavaOnevisionProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen2_vl": Qwen2VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
}


class Model:
    """A model of a Hugging Face folder. Counts passes; keeps the smallest margin of any argmax over logits."""

    def __init__(self, folder):
        options = dict(dtype=torch.float32, attn_implementation="eager")
        self.model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval().requires_grad_(False)
        self.config, self.kind = self.model.config, self.model.config.model_type
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        path = Path(folder) / "processor_config.json"
        said = (
            {k: v for k, v in json.loads(path.read_text()).items() if k != "processor_class"} if path.exists() else {}
        )
        # They want a video processor, which needs torchvision; images never reach it.
        with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None):
            template = self.tokenizer.chat_template
            self.processor = PROCESSORS[self.kind](images, self.tokenizer, chat_template=template, **said)
        self.layers = self.model.model.language_model.layers
        ends = self.model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [self.tokenizer.eos_token_id if ends is None else ends]
        self.passes, self.margin = 0, math.inf

    def inputs(self, images, text):
        """What the processor makes of a user's turn: the images, then the text."""
        turns = [dict(role="user", content=[*[dict(type="image")] * len(images), dict(type="text", text=text)])]
        if self.kind == "llava_next":  # transformers' form of the prompt, as ViCrop has it
            prompt = f"{'<image>' * len(images)}\nUSER: {text}\nASSISTANT:"
        else:
            if self.kind == "llava_onevision":
                turns = [dict(role="system", content=[dict(type="text", text="You are a helpful assistant.")]), *turns]
            prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.processor(text=[prompt], images=[images], return_tensors="pt")

    def columns(self, inputs):
        """Positions of the image tokens."""
        return np.flatnonzero(inputs["input_ids"][0].numpy() == self.config.image_token_id)

    def positions(self, inputs, before, phrase):
        """Tokens that overlap a phrase where it follows some words."""
        ids = inputs["input_ids"][0].tolist()
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        found = self.tokenizer(text, return_offsets_mapping=True)
        assert found["input_ids"] == ids
        start = text.rindex(before + phrase) + len(before)
        return [i for i, (a, b) in enumerate(found["offset_mapping"]) if a < start + len(phrase) and b > start]

    @torch.no_grad()
    def run(self, inputs):
        """One forward pass, with attention probabilities."""
        self.passes += 1
        return self.model(**inputs, output_attentions=True, use_cache=False)

    @torch.no_grad()
    def generate(self, images, text, limit):
        """The greedy reply; each token is a pass over everything before it."""
        self.passes += 1
        inputs, reply = dict(self.inputs(images, text)), []
        inputs.pop("attention_mask")
        while len(reply) < limit:
            logits = self.model(**inputs, use_cache=False).logits[0, -1]
            best = logits.topk(2).values
            self.margin = min(self.margin, float(best[0] - best[1]))
            if int(logits.argmax()) in self.ends:
                break
            reply.append(int(logits.argmax()))
            for name, new in (("input_ids", reply[-1]), ("mm_token_type_ids", 0)):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.tensor([[new]])], dim=1)
        return self.tokenizer.decode(reply, skip_special_tokens=True).strip()

    def place(self, image, inputs):
        """Where the cells of a map look, and which of the image's tokens shows each: [h, w]."""
        size, vision = image.size, self.config.vision_config
        if self.kind.startswith("qwen"):
            _, h, w = inputs["image_grid_thw"][0].tolist()
            view = View(size, (0, 0), size, (h // vision.spatial_merge_size, w // vision.spatial_merge_size))
            return view, np.arange(view.grid[0] * view.grid[1]).reshape(view.grid)
        if self.kind == "internvl":
            side, cells = vision.image_size[0], int(vision.image_size[0] / vision.patch_size[0] / 2)
            images = self.processor.image_processor
            rows, columns = tiles_of(size, side, images.min_patches, images.max_patches)
            view = View(size, (0, 0), size, (rows * cells, columns * cells))
            return view, by_tiles(rows, columns, cells)
        side, cells = vision.image_size, vision.image_size // vision.patch_size
        canvases = [(width, height) for height, width in self.config.image_grid_pinpoints]
        most = int(self.config.vision_aspect_ratio.rpartition("_")[2]) if self.kind == "llava_onevision" else None
        view = unpadded(size, canvases, side, cells, most)
        return view, after_base(view.grid, cells)


def unpadded(size, canvases, side, cells, most):
    """The grid of LLaVA-OneVision's and NeXT's tiles without the padding (`anyres` of LLaVA-NeXT's code).

    most: beyond so many tiles' worth of tokens the grid is shrunk; None never does.
    """
    (width, height), best = size, None
    for w, h in canvases:
        scale = min(w / width, h / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        if best is None or (used, used - w * h) > best[0]:
            best = (used, used - w * h), (w, h)
    wide, high = best[1]
    new = (wide, min(math.ceil(height * wide / width), high))  # of the image within the canvas
    if wide / width > high / height:
        new = (min(math.ceil(width * high / height), wide), high)
    margins = (wide - new[0]) // 2, (high - new[1]) // 2
    gw, gh = wide // side * cells, high // side * cells
    px = py = 0
    if width / height > gw / gh:
        py = (gh - int(round(height * gw / width, 7))) // 2
    else:
        px = (gw - int(round(width * gh / height, 7))) // 2
    sx, sy = width / new[0], height / new[1]  # image pixels by canvas pixels
    origin = (px * wide / gw - margins[0]) * sx, (py * high / gh - margins[1]) * sy
    extent = (gw - 2 * px) * wide / gw * sx, (gh - 2 * py) * high / gh * sy
    h, w = gh - 2 * py, gw - 2 * px
    if most is not None and (shrink := math.sqrt(h * w / (most * cells**2))) > 1.1:
        h, w = int(h // shrink), int(w // shrink)
    return View(size, origin, extent, (h, w))


def after_base(grid, cells):
    """The whole image comes first; a newline token follows each row of the tiles."""
    h, w = grid
    return np.array([[cells**2 + row * (w + 1) + column for column in range(w)] for row in range(h)])


def tiles_of(size, side, fewest, most):
    """Rows and columns of InternVL's tiles: the nearest aspect ratio; of equal ones the larger if the image is."""
    width, height = size
    shapes = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if fewest <= c * r <= most]
    best, least = (1, 1), math.inf
    for c, r in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        gap = abs(width / height - c / r)
        if gap < least or (gap == least and width * height > 0.5 * side**2 * c * r):
            best, least = (c, r), gap
    return best[1], best[0]


def by_tiles(rows, columns, cells):
    """Tile after tile, each row by row."""
    shown = np.zeros((rows * cells, columns * cells), int)
    for y in range(rows * cells):
        for x in range(columns * cells):
            tile = y // cells * columns + x // cells
            shown[y, x] = tile * cells**2 + y % cells * cells + x % cells
    return shown


def vicrop(model, image, question, *, layer, base, joint, limit=20):
    """(heat map, where it looks, box, its margin, answer, search passes). joint: between question and its ending."""
    before, rows = model.passes, []
    for asked in (question, GENERAL):
        inputs = model.inputs([image], f"{asked}{joint}{SHORT}")
        probs = model.run(inputs).attentions[layer][0]
        rows.append(probs[:, -1, model.columns(inputs)].mean(dim=0).numpy())
    view, shown = model.place(image, inputs)
    heat, search = (rows[0] / rows[1])[shown], model.passes - before
    box, lead = window(*without_padding(heat, view), image.size, base)
    text = model.generate([image, crop(image, box)], f"{question}{joint}{SHORT}", limit)
    return heat, view, box, lead, text, search


def focus(
    model, image, question, target, *, layers, n_anchors=30, s_min=3, s_max=5, s_dist=2, threshold=0.5, nms=0.3,
    limit=20,
):  # fmt: skip
    """(relevance map, where it looks, best region, its margin, answer on it, search passes), without verification."""
    before = model.passes
    inputs = model.inputs([image], exists(target))
    at, attentions = model.positions(inputs, "Is there a ", target), [model.layers[n].self_attn for n in layers]
    with outputs_of([attention.v_proj for attention in attentions]) as values:
        model.run(inputs)
    view, shown = model.place(image, inputs)
    on_image, rows = model.columns(inputs)[shown.ravel()], 0
    for value in values:
        v = value[0].reshape(len(value[0]), -1, attentions[0].head_dim).double().numpy()
        rows = rows + similarity(v, "row")[at][:, on_image]
    heat, view = halved(blurred(product(rows, clip=True).reshape(view.grid)), view)
    rois, lead = propose(heat, n_anchors, s_min, s_max, s_dist, threshold, nms)
    box, search = to_pixels(rois[0], view), model.passes - before
    return heat, view, box, lead, model.generate([crop(image, box)], question, limit), search


def blurred(heat, sigma=1.0):
    """Gaussian filter, border cells mirrored about the border."""
    far = round(4 * sigma)
    weights = np.exp(-0.5 * (np.arange(-far, far + 1) / sigma) ** 2)
    weights, (h, w), around = weights / weights.sum(), heat.shape, np.pad(heat, far, mode="symmetric")
    out = np.zeros_like(heat)
    for i, down in enumerate(weights):
        for j, right in enumerate(weights):
            out += down * right * around[i : i + h, j : j + w]
    return out


def halved(heat, view):
    """Means of 2 x 2 cells, sum 1; an odd last row or column is dropped. An axis of one cell stays as it is."""
    y, x = (min(2, cells) for cells in heat.shape)
    h, w = heat.shape[0] // y, heat.shape[1] // x
    out = np.array([[heat[y * r : y * (r + 1), x * c : x * (c + 1)].mean() for c in range(w)] for r in range(h)])
    return out / out.sum(), View(view.size, view.origin, (x * w * view.cell[0], y * h * view.cell[1]), (h, w))
