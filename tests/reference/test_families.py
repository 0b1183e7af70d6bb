"""ViCrop and FOCUS on every family against references on transformers: maps, boxes, answers, passes."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from agreement import MAPS, Agreement, answers, noise
from families import Model, focus, tiles_of, unpadded, vicrop
from plain import to_image
from tiny_internvl import tiny_internvl
from tiny_onevision import tiny_onevision
from tiny_qwen import tiny_qwen
from tiny_qwen3 import tiny_qwen3

import jaxvqa
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.prompts import TEMPLATES
from jaxvqa.requests import Sample

pytestmark = pytest.mark.parity


@dataclass(frozen=True)
class Case:
    """A random folder, and what the methods are told."""

    write: Any
    options: dict
    bucket: int
    """One for all images, so that one program serves them."""
    base: int
    """Side of ViCrop's smallest crop: two or three cells of the larger images."""
    template: str | None = None
    """None is the model's own."""


CASES = {
    "llava_onevision": Case(tiny_onevision, dict(max_tiles=4, vision_layers=2), 10, 70),
    "llava_next": Case(
        tiny_onevision, dict(is_next=True, text_model="llama", image_size=28, vision_layers=2), 10, 60, "vicrop_hf"
    ),
    "qwen2_5_vl": Case(tiny_qwen, dict(vision_layers=2, full_layers=(1,)), 64, 70),
    "qwen2_vl": Case(tiny_qwen, dict(kind="qwen2_vl", published=False, tied=True, vision_layers=2), 64, 70),
    "qwen3_vl": Case(tiny_qwen3, dict(vision_layers=2, deepstack=(0, 1), text_layers=3), 64, 80),
    "internvl": Case(tiny_internvl, {}, 13, 60),
}
SAME_CODE = ("llava_next", "qwen2_vl")
"""Of which each shares all but its configuration with the one before it."""
SIZES = ((300, 200), (90, 400), (200, 210), (60, 50), (33, 120))
QUESTIONS = ("What is red?", "Is the blue plate left of the red one?", "What is on the sign?\nSay it.")
LIMIT = 8


def asked():
    return [Sample((noise(*size, seed),), QUESTIONS[seed % 3]) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """both(name): the reference's model and the library's, from one random folder."""

    @functools.cache
    def make(name):
        torch.set_num_threads(1)
        case = CASES[name]
        folder = case.write(tmp_path_factory.mktemp(name), **case.options)
        return Model(folder), jaxvqa.load(folder, dtype="float32", image_buckets=(case.bucket,))

    return make


def by_vicrop(name, vlm):
    """(image, question, the library's answer) of each sample, and what the reference must be told."""
    template = CASES[name].template or vlm.facts.template
    options = dict(layer=1, base=CASES[name].base)
    found = answers(asked(), vlm, "vicrop", template=template, max_new_tokens=LIMIT, **options)
    return found, options | dict(joint=TEMPLATES[template].ending_break, limit=LIMIT)


def compare(agree, model, ours, theirs):
    heat, view, box, lead, text, search = theirs
    agree.samples += 1
    agree.maps(heat, ours.grid)
    agree.maps(to_image(heat, view, ours.heatmap.shape), ours.heatmap)
    assert ours.forward_passes == (search, 1)
    if agree.same(box, ours.boxes, lead):
        agree.same(text, ours.text, model.margin)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SAME_CODE)) for name in CASES])
def test_vicrop_on_a_random_model(both, measured, name):
    model, vlm = both(name)
    found, options = by_vicrop(name, vlm)
    with Agreement(measured, f"ViCrop, {name}") as agree:
        for image, question, ours in found:
            model.margin = float("inf")
            compare(agree, model, ours, vicrop(model, image, question, **options))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_focus_on_a_random_model(both, measured, name):
    """The map of values, blurred and halved; its best region, unverified, and the answer on it alone."""
    model, vlm = both(name)
    options = dict(targets=("red plate",), layer_start=1, layer_end=3, n_steps=1, overrun=False, blur=1.0, pool=2)
    like = Vanilla(ending="open", max_new_tokens=LIMIT)
    with Agreement(measured, f"FOCUS, {name}") as agree:
        for image, question, ours in answers(asked(), vlm, "focus", final="crop", like=like, **options):
            model.margin = float("inf")
            compare(agree, model, ours, focus(model, image, question, "red plate", layers=(1, 2), limit=LIMIT))


def shifted(cells):
    """Each cell is taken for its neighbour."""
    return np.roll(cells, 1)


def with_newlines(cells):
    """What follows a row of cells is taken for a cell."""
    return cells.min() + np.arange(len(cells), dtype=cells.dtype)


def tiles_swapped(cells):
    """The first two tiles, of 2 x 2 cells, change places."""
    tile = cells // 4
    return np.where(tile < 2, 1 - tile, tile) * 4 + cells % 4


@pytest.mark.parametrize(
    "name, mutation",
    [
        ("llava_onevision", shifted),
        ("llava_onevision", with_newlines),
        ("qwen2_5_vl", shifted),
        ("internvl", shifted),
        ("internvl", tiles_swapped),
    ],
)
def test_cells_in_the_wrong_place_are_noticed(both, measured, monkeypatch, name, mutation):
    model, vlm = both(name)
    process = type(vlm).process

    def mutated(*args, **kwargs):
        made = process(*args, **kwargs)
        return replace(made, cells=mutation(made.cells).astype(made.cells.dtype))

    monkeypatch.setattr(type(vlm), "process", mutated)
    found, options = by_vicrop(name, vlm)
    image, question, ours = next(found)
    agree = Agreement(measured, name)
    with pytest.raises(AssertionError):
        agree.maps(vicrop(model, image, question, **options)[0], ours.grid)
    measured(f"ViCrop, {name}, {mutation.__name__}: maps, relative to their range", agree.deviation)
    assert agree.deviation > 1000 * MAPS


@pytest.mark.parametrize(
    "size, grid",
    [
        ((2246, 1582), (68, 96)),
        ((4024, 3503), (75, 86)),
        ((7431, 5358), (68, 95)),
        ((7680, 3840), (57, 114)),
        ((2836, 1566), (60, 108)),
        ((1000, 800), (65, 81)),
        ((336, 336), (27, 27)),
    ],
)
def test_the_reference_lays_tiles_as_onevision_7b_does(size, grid):
    canvases = [(384 * a, 384 * b) for a in range(1, 7) for b in range(1, 7)]
    assert unpadded(size, canvases, 384, 27, 9).grid == grid


@pytest.mark.parametrize("size, tiles", [((800, 800), (2, 2)), ((300, 300), (1, 1)), ((1300, 400), (1, 3))])
def test_the_reference_lays_tiles_as_internvl_does(size, tiles):
    assert tiles_of(size, 448, 1, 12) == tiles
