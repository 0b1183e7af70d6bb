"""ViCrop end to end against its reference on transformers: maps, boxes, answers, passes."""

import pytest

pytest.importorskip("torch")

import torch
from agreement import Agreement, answers, both, grainy, tiny_samples
from plain import to_image, view_of
from vicrop_reference import vicrop

from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.specks.strata import samples

pytestmark = pytest.mark.parity


def compare(measured, name, folder, setup, asked, *, layer, base, maps, alignment="corrected", dtype=None):
    llava, vlm = both(folder, setup, dtype or torch.float32)
    options = dict(maps=maps, layer=layer, base=base, alignment=alignment)
    with Agreement(measured, f"{name}, {maps}") as agree:
        for image, question, ours in answers(asked, vlm, "vicrop", **options):
            llava.margin, llava.doubt, agree.samples = float("inf"), 1.0, agree.samples + 1
            heat, box, lead, text, search = vicrop(llava, image, question, **options)
            agree.maps(heat, ours.grid, llava.doubt)
            view = llava.view(image) if alignment == "corrected" else view_of("squash", image.size, 0, llava.grid)
            agree.maps(to_image(heat, view, ours.heatmap.shape), ours.heatmap, llava.doubt)
            assert ours.forward_passes == (search, 1)
            if agree.same(box, ours.boxes, lead):
                agree.same(text, ours.text, llava.margin)


@pytest.mark.parametrize("maps", ["rel_att", "grad_att", "pure_grad"])
@pytest.mark.parametrize("setup, alignment", [("pad", "corrected"), ("hf", "corrected"), ("hf", "official")])
def test_random_model(tiny_folder, measured, setup, alignment, maps):
    name = f"ViCrop, random model, {setup}, {alignment}"
    compare(measured, name, tiny_folder, setup, tiny_samples(), layer=1, base=56, maps=maps, alignment=alignment)


@pytest.mark.parametrize("maps", ["rel_att", "grad_att", "pure_grad"])
def test_random_model_on_tiles(tiny_folder, measured, maps):
    """As released; the map of all tiles covers the whole image."""
    llava, vlm = both(tiny_folder, "hf")
    options = dict(maps=f"{maps}_high", layer=1, base=56, alignment="official", tile=170)
    with Agreement(measured, f"ViCrop, random model, tiles, {maps}") as agree:
        for image, question, ours in answers(tiny_samples(), vlm, "vicrop", **options):
            llava.margin, agree.samples = float("inf"), agree.samples + 1
            heat, box, lead, text, search = vicrop(llava, image, question, **options)
            agree.maps(heat, ours.grid)
            assert ours.forward_passes == (search, 1)
            if agree.same(box, ours.boxes, lead):
                agree.same(text, ours.text, llava.margin)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stratum, maps, count", [("small", "rel_att", 20), ("crowded", "grad_att", 12), ("crowded", "pure_grad", 6)]
)
def test_bundled_model(measured, stratum, maps, count):
    """Where it is certain of a token the gradient is close to zero: the reference takes it in float64."""
    asked = samples(stratum, "dev", count)
    if maps == "pure_grad":
        asked = [grainy(sample) for sample in asked]
    dtype = torch.float32 if maps == "rel_att" else torch.float64
    options = dict(layer=5, base=128, maps=maps, dtype=dtype)
    compare(measured, "ViCrop, bundled model", SPECKS_LLAVA, "pad", asked, **options)
