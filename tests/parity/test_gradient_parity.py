"""`Gradient` against torch autograd: HF's LLaVA with eager attention, its probabilities and pixels differentiated."""

import numpy as np
import pytest
import reference

import jaxvqa
from jaxvqa.engine import Engine
from jaxvqa.prompts import render
from jaxvqa.requests import Answer, Gradient, Sample

pytestmark = pytest.mark.parity

CASES = {
    "mha": {},
    "gqa-select-full": dict(num_kv_heads=2, head_dim=12, select="full", feature_layer=-1),
}
LAYERS = (0, 1, 2)
QUESTIONS = ("What is the character on the red plate? Answer the question using a single word or phrase.", "Is it red?")
TOLERANCE = 1e-4
"""Relative to the largest gradient: f32 rounding through three blocks, with other summation orders."""


def autograd(model, ids, pixels):
    """Torch's (A, ∂y/∂A) per layer [L, N, T, T] and ∂y/∂X [I, E, E, 3] of one prompt."""
    import torch

    pixels = pixels.clone().requires_grad_()
    ids = torch.tensor(ids)[None]
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_attentions=True)
    for probs in out.attentions:
        probs.retain_grad()
    model.zero_grad()
    torch.log_softmax(out.logits[0, -1], dim=-1).max().backward()
    probs, slopes = (
        np.stack([x[0].detach().numpy() for x in xs]) for xs in zip(*((a, a.grad) for a in out.attentions), strict=True)
    )
    return probs, slopes, pixels.grad.numpy().transpose(0, 2, 3, 1)


def rows_and_gradient(row):
    return row.readouts.rows, row.gradient, row.rows


@pytest.mark.parametrize("name", CASES)
def test_both_gradients_match_torch_autograd(name, tmp_path, measured):
    """Two prompts in one batch: two images and a long question beside one image and a short one."""
    import torch
    from transformers import AutoImageProcessor

    model = reference.save_llava(tmp_path, **CASES[name], seed=5)
    vlm = jaxvqa.load(tmp_path, dtype="float32", image_setup="hf", offline=True)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pictures = reference.pictures()
    samples = [Sample(pictures[:2], QUESTIONS[0]), Sample(pictures[2:3], QUESTIONS[1])]
    prompts = [render("vicrop_hf", sample.question, num_images=len(sample.images)) for sample in samples]
    found = {}

    def method(sample):
        asked = (sample.images, prompts[int(sample.id)])
        found[sample.id] = yield [
            Gradient(*asked, layers=LAYERS, rows="question", reduce=rows_and_gradient),
            Gradient(*asked, wrt="pixels"),
        ]
        return Answer("done")

    engine = Engine(vlm, batch_size=2, lengths=(16, 192))
    assert all(answer.error is None for answer in engine.run(samples, method))
    assert engine.stats.rows["prefix"] == 2, "attention beside a shared prefix"
    for sample, prompt, (attention, to_pixels) in zip(samples, prompts, found.values(), strict=True):
        ids = vlm.tokenise(prompt, len(sample.images)).ids
        pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in sample.images])
        probs, slopes, pixel_slopes = autograd(model, ids.astype(np.int64), pixels)
        our_probs, our_slopes, rows = attention.value
        np.testing.assert_allclose(our_probs[..., : len(ids)], probs[:, :, rows], atol=1e-5)
        for what, ours, theirs in (
            ("attention", our_slopes[..., : len(ids)], slopes[:, :, rows]),
            ("pixels", to_pixels.value, pixel_slopes),
        ):
            d = np.abs(ours - theirs).max() / np.abs(theirs).max()
            measured(f"gradient to {what} against torch, {name}, {len(sample.images)} images", d)
            assert d <= TOLERANCE and np.abs(theirs).max() > 1e-3
