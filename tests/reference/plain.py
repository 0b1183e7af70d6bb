"""What the references share: LLaVA and BLIP of HF transformers (torch, CPU, f32, eager), one question at a time.

The references are slow on purpose: loops, whole attention matrices, nothing of jaxvqa. They say what a method is; the
library must agree.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval, LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.models.llama import modeling_llama

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
SHORT = "Answer the question using a single word or phrase."
MEAN_COLOUR = (122, 116, 104)  # int(255 * CLIP mean)


def vicuna(*turns):
    """The prompt that asks the last of question, answer, question, ...; the questions hold their own `<image>`."""
    text = SYSTEM
    for number, turn in enumerate(turns):
        text += f" {turn}</s>" if number % 2 else f"USER: {turn} ASSISTANT:"
    return text


@dataclass(frozen=True)
class View:
    """The rectangle of the image's plane that an encoder sees; it may overhang the image. Cells divide it evenly."""

    size: tuple
    """(W, H) of the image."""
    origin: tuple
    extent: tuple
    grid: tuple
    """(rows, columns)."""

    @property
    def cell(self):
        """(width, height) of a cell in image pixels."""
        return self.extent[0] / self.grid[1], self.extent[1] / self.grid[0]

    def seen(self):
        """Half-open ranges of columns and of rows whose cells see any of the image; all others are padding."""
        ranges = []
        for i in (0, 1):
            cells = range(self.grid[1 - i])
            edges = [
                (
                    self.origin[i] + k * self.extent[i] / len(cells),
                    self.origin[i] + (k + 1) * self.extent[i] / len(cells),
                )
                for k in cells
            ]
            inside = [k for k, (low, high) in enumerate(edges) if min(high, self.size[i]) > max(low, 0)]
            ranges.append((inside[0], inside[-1] + 1))
        return ranges


def view_of(setup, size, encoder, grid):
    """Where the cells lie: setup "pad" (square with the mean colour), "hf" (centre crop) or "squash"."""
    width, height = size
    if setup == "squash":
        return View(size, (0, 0), (width, height), grid)
    if setup == "pad":
        side = max(size)
        return View(size, (-((side - width) // 2), -((side - height) // 2)), (side, side), grid)
    long = int(encoder * max(size) / min(size))
    new_width, new_height = (encoder, long) if width <= height else (long, encoder)
    left, top = (new_width - encoder) // 2, (new_height - encoder) // 2
    sx, sy = width / new_width, height / new_height
    return View(size, (left * sx, top * sy), (encoder * sx, encoder * sy), grid)


def to_image(heat, view, shape):
    """A map on the token grid as an image of `shape` (rows, columns): each pixel has the value of the cell at its
    centre, or, unseen, the smallest value of a cell that sees any of the image."""
    (width, height), (bx, by), ((c1, c2), (r1, r2)) = view.size, view.cell, view.seen()
    columns = [math.floor(((j + 0.5) * width / shape[1] - view.origin[0]) / bx) for j in range(shape[1])]
    rows = [math.floor(((i + 0.5) * height / shape[0] - view.origin[1]) / by) for i in range(shape[0])]
    unseen, cells, (h, w) = float(heat[r1:r2, c1:c2].min()), heat.tolist(), view.grid
    return np.array([[cells[r][c] if 0 <= r < h and 0 <= c < w else unseen for c in columns] for r in rows])


class Llava:
    """A LLaVA of a Hugging Face folder. Counts passes; keeps the smallest margin of any argmax over logits."""

    def __init__(self, folder, setup="pad", dtype=torch.float32):
        options = dict(dtype=dtype, attn_implementation="eager")
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, **options).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.setup, self.layers = setup, self.model.model.language_model.layers
        self.image_id, self.end = self.model.config.image_token_id, self.tokenizer.eos_token_id
        vision = self.model.config.vision_config
        self.encoder, self.patch = vision.image_size, vision.patch_size
        self.grid = (self.encoder // self.patch,) * 2
        self.passes, self.margin, self.doubt = 0, math.inf, 1.0

    def view(self, image):
        return view_of(self.setup, image.size, self.encoder, self.grid)

    def pixels(self, images):
        """[n, 3, E, E], None for no images."""
        seen = [pad_to_square(image) if self.setup == "pad" else image for image in images]
        if not seen:
            return None
        return torch.tensor(self.processor(seen, return_tensors="np")["pixel_values"]).to(self.model.dtype)

    def tokens(self, text):
        """Ids of a prompt with one `<image>` per image, and the characters (start, stop) that each covers.

        Prompts with the image inside the user's turn are those of the original LLaVA, which tokenises what stands
        between the images on its own; those with images before "USER:" are transformers': one string.
        """
        cells = self.grid[0] * self.grid[1]
        pieces = [text] if text.startswith("<image>") else text.split("<image>")
        ids, spans, at = [], [], 0
        for number, piece in enumerate(pieces):
            if number:
                ids, spans, at = ids + [self.image_id] * cells, spans + [(0, 0)] * cells, at + len("<image>")
            found = self.tokenizer(piece, add_special_tokens=number == 0, return_offsets_mapping=True)
            for token, (start, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True):
                copies = cells if token == self.image_id else 1
                ids += [token] * copies
                spans += [(0, 0) if token == self.image_id else (at + start, at + stop)] * copies
            at += len(piece)
        return ids, spans

    def positions(self, text, phrase):
        """Tokens that overlap the last occurrence of a phrase in a prompt."""
        start = text.rindex(phrase)
        spans = self.tokens(text)[1]
        return [i for i, (a, b) in enumerate(spans) if a < start + len(phrase) and b > start and a < b]

    def columns(self, text):
        """Positions of the image tokens."""
        return [i for i, token in enumerate(self.tokens(text)[0]) if token == self.image_id]

    def run(self, images, text, **options):
        """One forward pass, with attention probabilities. `pixel_values` may be given."""
        self.passes += 1
        options.setdefault("pixel_values", self.pixels(images))
        ids = torch.tensor([self.tokens(text)[0]])
        return self.model(input_ids=ids, output_attentions=True, **options)

    @torch.no_grad()
    def generate(self, images, text, limit):
        """The greedy reply."""
        self.passes += 1
        cache, reply = DynamicCache(), []
        step = dict(input_ids=torch.tensor([self.tokens(text)[0]]), pixel_values=self.pixels(images))
        while len(reply) < limit:
            logits = self.model(**step, past_key_values=cache, use_cache=True).logits[0, -1]
            best = logits.topk(2).values
            self.margin = min(self.margin, float(best[0] - best[1]))
            if int(logits.argmax()) == self.end:
                break
            reply.append(int(logits.argmax()))
            step = dict(input_ids=torch.tensor([reply[-1:]]))
        return self.tokenizer.decode(reply, skip_special_tokens=True).strip()

    @torch.no_grad()
    def confidence(self, images, text):
        """tanh of half the difference of the logits of Yes and No, as they follow "ASSISTANT:"."""
        before, logits = self.tokenizer("ASSISTANT:")["input_ids"], self.run(images, text).logits[0, -1]
        yes, no = (self.tokenizer(f"ASSISTANT: {word}")["input_ids"][len(before)] for word in ("Yes", "No"))
        return math.tanh(float(logits[yes] - logits[no]) / 2)


class Matcher:
    """A BLIP image-text retrieval model of a Hugging Face folder."""

    def __init__(self, folder):
        options = dict(dtype=torch.float32, attn_implementation="eager")
        self.model = BlipForImageTextRetrieval.from_pretrained(folder, **options).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        vision = self.model.config.vision_config
        self.grid = (vision.image_size // vision.patch_size,) * 2


@contextmanager
def attention(scores=lambda layer, x: x, probs=lambda layer, x: x):
    """Within it, the decoder's attention logits and probabilities [1, N, T, S] pass through two functions."""

    def edited(module, query, key, value, attention_mask, scaling, **_):
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        x = scores(module.layer_idx, query @ key.transpose(2, 3) * scaling + attention_mask)
        x = probs(module.layer_idx, torch.softmax(x, dim=-1))
        return (x @ value).transpose(1, 2), x

    with mock.patch.object(modeling_llama, "eager_attention_forward", edited):
        yield


@contextmanager
def outputs_of(modules):
    """Within it, a list collects what the modules return, in the order in which they run."""
    seen = []
    handles = [module.register_forward_hook(lambda _, __, out: seen.append(out)) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def pad_to_square(image):
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def crop(image, box):
    return image.crop(tuple(round(x) for x in box))
