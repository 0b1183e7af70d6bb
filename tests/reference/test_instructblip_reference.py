"""CoF and ViCrop on InstructBLIP against their references on transformers: maps, boxes, answers, logits, passes."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from agreement import Agreement, noise
from instructblip_reference import InstructBlip, cof, prompt, vicrop
from plain import to_image, view_of
from tiny_instructblip import tiny_instructblip

import jaxvqa
from jaxvqa import handlers
from jaxvqa.engine import Engine
from jaxvqa.methods import cof as cof_method
from jaxvqa.methods import vicrop as vicrop_method
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.requests import Sample
from jaxvqa.taps import Taps

pytestmark = pytest.mark.parity

LIMIT, LENGTH = 8, 128
LAYER, CROSS, BASE = 1, 2, 60
LOGITS = 1e-4
BOXES = {
    "Is the small sign at the left of the tree red or blue now, please?": [(30, 20, 120, 90)],
    "What stands in front of the house with a green door?": [(0, 0, 25, 60), (40, 200, 90, 390)],
    "How many people stand at the other side of the river?": [],
}
"""By question: what a detector says. With the general question they run in the same programs."""
SIZES = ((300, 200), (90, 400), (200, 210))


def asked(count):
    """Three samples of `count` images each."""
    return [
        Sample(tuple(noise(*size, seed + 10 * n) for n in range(count)), question)
        for seed, (size, question) in enumerate(zip(SIZES, BOXES, strict=True))
    ]


def detector(image, question):
    return BOXES[question]


VICROP = dict(method="vicrop", layer=LAYER, base=BASE, max_new_tokens=LIMIT)
COF = dict(method="cof", box_source=detector, like=Vanilla(ending="open", max_new_tokens=LIMIT))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The reference's model and the library's, of 5 x 5 cells: the third of six cross-attentions, ViCrop's, is one."""
    torch.set_num_threads(1)
    tiny = dict(image_size=40, qformer_layers=6, every=1, text_layers=2, question_tokens=96)
    folder = tiny_instructblip(tmp_path_factory.mktemp("instructblip"), **tiny)
    return InstructBlip(folder), jaxvqa.load(folder, dtype="float32")


@pytest.fixture
def answered(both, monkeypatch):
    """answered(samples, method=, ...): (sample, answer, logits of its first token), all samples in one batch."""
    run, logits = handlers._prefill, []

    def seen(*args, **kwargs):
        result = run(*args, **kwargs)
        logits.append(np.asarray(result[0].logits))
        return result

    def make(samples, **options):
        found = list(Engine(both[1], batch_size=len(samples), lengths=(LENGTH,)).run(samples, **options))
        for answer in found:
            if answer.error is not None:
                raise answer.error
        return list(zip(samples, found, logits[-1], strict=True))

    monkeypatch.setattr(handlers, "_prefill", seen)
    return make


def test_the_reference_asks_and_answers_as_transformers_does(both):
    model, (sample, *_) = both[0], asked(1)
    images, text = list(sample.images), prompt(sample.question)
    theirs = model.processor(images=images, text=text, return_tensors="pt")
    said = model.model.generate(**theirs, max_new_tokens=LIMIT, do_sample=False)[0, theirs["input_ids"].shape[1] :]
    reply, logits = model.generate(images, text, LIMIT)
    assert reply == model.tokenizer.decode(said, skip_special_tokens=True).strip()
    np.testing.assert_allclose(logits, model.model(**theirs).logits[0, -1], atol=1e-6)
    with model.biased(torch.zeros(1, 1, 1, 26)):
        np.testing.assert_array_equal(model.generate(images, text, 1)[1], logits)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_cof_with_boxes_of_a_detector(both, answered, measured, count):
    model, worst = both[0], 0.0
    with Agreement(measured, f"CoF, InstructBLIP, {count} images") as agree:
        for sample, ours, logits in answered(asked(count), **COF):
            model.margin, agree.samples = float("inf"), agree.samples + 1
            boxes = detector(None, sample.question)
            mask, text, first = cof(model, list(sample.images), sample.question, boxes, limit=LIMIT)
            agree.maps(mask, ours.grid)
            agree.same(boxes, ours.boxes, float("inf"))
            agree.same(text, ours.text, model.margin)
            worst = max(worst, np.abs(first - logits).max())
            assert ours.forward_passes == (0, 1)
    measured(f"CoF, InstructBLIP, {count} images: logits", worst)
    assert worst <= LOGITS


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_vicrop_through_the_queries(both, answered, measured, count):
    model, worst = both[0], 0.0
    with Agreement(measured, f"ViCrop, InstructBLIP, {count} images") as agree:
        for sample, ours, logits in answered(asked(count), **VICROP):
            model.margin, agree.samples = float("inf"), agree.samples + 1
            options = dict(layer=LAYER, cross=CROSS, base=BASE, limit=LIMIT)
            heat, box, lead, text, first, search = vicrop(model, list(sample.images), sample.question, **options)
            agree.maps(heat, ours.grid)
            view = view_of("squash", sample.image.size, 0, model.grid)
            agree.maps(to_image(heat, view, ours.heatmap.shape), ours.heatmap)
            assert ours.forward_passes == (search, 1)
            if agree.same(box, ours.boxes, lead):
                agree.same(text, ours.text, model.margin)
                worst = max(worst, np.abs(first - logits).max())
    measured(f"ViCrop, InstructBLIP, {count} images: logits", worst)
    assert worst <= LOGITS


def test_a_class_token_taken_for_a_patch_is_noticed(both, answered, measured, monkeypatch):
    """The bias of CoF and the map of ViCrop, each a place beside its own."""
    model, reweight, on_image = both[0], cof_method.reweight, vicrop_method.attention_on_image

    def biased(row, *args):
        return Taps(cross_bias=jnp.roll(reweight(row, *args).cross_bias, -1, axis=-1))

    def read(row):
        cross = jnp.roll(row.readouts.cross, 1, axis=-1)
        return on_image(replace(row, readouts=replace(row.readouts, cross=cross)))

    monkeypatch.setattr(cof_method, "reweight", biased)
    monkeypatch.setattr(vicrop_method, "attention_on_image", read)
    sample, _, logits = answered(asked(1), **COF)[0]
    images, boxes = list(sample.images), detector(None, sample.question)
    off = np.abs(cof(model, images, sample.question, boxes, limit=1)[2] - logits).max()
    measured("CoF, InstructBLIP, off by the class token: logits", off)
    assert off > 100 * LOGITS

    sample, ours, _ = answered(asked(1), **VICROP)[0]
    agree = Agreement(measured, "ViCrop")
    with pytest.raises(AssertionError):
        agree.maps(vicrop(model, images, sample.question, layer=LAYER, cross=CROSS, base=BASE)[0], ours.grid)
    measured("ViCrop, InstructBLIP, off by the class token: maps, relative to their range", agree.deviation)
    assert agree.deviation > 1000 * 1e-4
