"""CoF and ViCrop on InstructBLIP of HF transformers (torch, CPU, f32, eager), straight from the papers.

The decoder has a few queries in an image's place, of which none shows a cell. The cells are where the queries look: in
the Q-Former's cross-attention over 1 + h·w keys, the class token's first. CoF edits it, ViCrop goes on through it.
"""

import math
from contextlib import contextmanager

import numpy as np
import torch
from cof_reference import cells
from plain import crop, outputs_of
from transformers import AutoProcessor, InstructBlipForConditionalGeneration
from vicrop_reference import GENERAL, window


def prompt(question):
    return f"Question: {question} Short answer:"


class InstructBlip:
    """A model of a Hugging Face folder. Counts passes; keeps the smallest margin of any argmax over logits."""

    def __init__(self, folder):
        options = dict(dtype=torch.float32, attn_implementation="eager")
        model = InstructBlipForConditionalGeneration.from_pretrained(folder, **options)
        self.model = model.eval().requires_grad_(False)
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.tokenizer, self.queries = self.processor.tokenizer, model.config.num_query_tokens
        self.cross = [
            layer.crossattention.attention for layer in model.qformer.encoder.layer if layer.has_cross_attention
        ]
        vision = model.config.vision_config
        self.grid = (vision.image_size // vision.patch_size,) * 2
        self.passes, self.margin = 0, math.inf

    @torch.no_grad()
    def inputs(self, images, text):
        """What the decoder reads, [1, T, D]: the queries of all images, each with all of the text, then the text."""
        seen = self.model.get_image_features(
            pixel_values=self.processor.image_processor(images, return_tensors="pt")["pixel_values"],
            qformer_input_ids=self.processor.qformer_tokenizer([text] * len(images), return_tensors="pt")["input_ids"],
        )
        return torch.cat([seen.pooler_output.flatten(0, 1)[None], self.words(self.tokenizer(text)["input_ids"])], dim=1)

    def words(self, ids):
        return self.model.get_input_embeddings()(torch.tensor([ids]))

    @torch.no_grad()
    def attentions(self, images, text):
        """Of one forward pass: by decoder layer [1, N, T, T], and by cross-attention [I, N, Q, 1 + h·w]."""
        self.passes += 1
        with outputs_of(self.cross) as looked:
            out = self.model.language_model(inputs_embeds=self.inputs(images, text), output_attentions=True)
        return out.attentions, [probs for _, probs in looked]

    @torch.no_grad()
    def generate(self, images, text, limit):
        """The greedy reply, and the logits of its first token; each token is a pass over everything before it."""
        self.passes += 1
        inputs, reply, first = self.inputs(images, text), [], None
        while len(reply) < limit:
            logits = self.model.language_model(inputs_embeds=inputs).logits[0, -1]
            first, best = logits.numpy() if first is None else first, logits.topk(2).values
            self.margin = min(self.margin, float(best[0] - best[1]))
            if int(logits.argmax()) == self.tokenizer.eos_token_id:
                break
            reply.append(int(logits.argmax()))
            inputs = torch.cat([inputs, self.words(reply[-1:])], dim=1)
        return self.tokenizer.decode(reply, skip_special_tokens=True).strip(), first

    @contextmanager
    def biased(self, bias):
        """Within it, a bias is added to the scores [I, N, Q, 1 + h·w] of every cross-attention."""

        def add(_, args, kwargs):
            return args, kwargs | dict(encoder_attention_mask=bias)  # scores are added to their mask

        handles = [module.register_forward_pre_hook(add, with_kwargs=True) for module in self.cross]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def cof(model, images, question, boxes, *, lam=22.0, alpha=1.0, limit=20):
    """(mask on the first image, answer, logits of its first token). boxes: in its pixels, of a detector.

    No word on InstructBLIP in the release: the paper reweights "the Q-former", here in all cross-attentions.
    """
    (width, height), mask = images[0].size, np.full(model.grid, not boxes)
    for x1, y1, x2, y2 in boxes:
        for cell in cells((x1 / width, y1 / height, x2 / width, y2 / height), alpha, model.grid[0], strict=False):
            mask[cell] = True
    chosen = np.flatnonzero(mask) + 1  # behind the class token
    bias = torch.zeros(len(images), 1, 1, mask.size + 1)
    bias[0, ..., chosen] = math.log(lam)
    with model.biased(bias):
        return mask, *model.generate(images, prompt(question), limit)


def vicrop(model, images, question, *, layer, cross, base, limit=20):
    """(heat map, box, its margin, answer, logits of its first token, search passes)."""
    before, maps = model.passes, []
    for asked in (question, GENERAL):
        rows, looked = model.attentions(images, prompt(asked))
        to_queries = rows[layer][0].mean(dim=0)[-1, : model.queries]  # of the first image
        to_cells = looked[cross][0].mean(dim=0)[:, 1:]
        maps.append((to_queries @ to_cells).reshape(model.grid).numpy())
    heat, size, search = maps[0] / maps[1], images[0].size, model.passes - before
    box, lead = window(heat, (0, 0), size, size, base)
    text, first = model.generate([*images, crop(images[0], box)], prompt(question), limit)
    return heat, box, lead, text, first, search
