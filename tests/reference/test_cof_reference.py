"""CoF end to end against its reference on transformers: masks, boxes, answers, passes."""

import pytest

pytest.importorskip("torch")

from agreement import Agreement, answers, both, picture, tiny_samples
from cof_reference import cof

from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.requests import Sample
from jaxvqa.specks.strata import samples

pytestmark = pytest.mark.parity


def compare(measured, name, folder, asked, *, preset="default", limit=128, **options):
    from jaxvqa.methods.vanilla import Vanilla

    llava, vlm = both(folder)
    like = Vanilla("vicuna_v1", "short", limit)
    with Agreement(measured, name) as agree:
        for image, question, ours in answers(asked, vlm, "cof", preset=preset, like=like, **options):
            llava.margin, agree.samples = float("inf"), agree.samples + 1
            mask, boxes, text, search, reply = cof(
                llava, image, question, strict=preset == "strict", limit=limit, **options
            )
            if agree.same(reply, ours.log[0].result, llava.margin):
                agree.maps(mask, ours.grid)
                agree.same(boxes, ours.boxes, float("inf"))
                agree.same(text, ours.text, llava.margin)
            assert ours.forward_passes == (search, 1)


@pytest.mark.parametrize("options", [dict(lam=22.0), dict(lam=9.0, layers=(0, 2))])
def test_random_model_without_a_box_looks_everywhere(tiny_folder, measured, options):
    compare(measured, f"CoF, random model, {options}", tiny_folder, tiny_samples(), limit=10, alpha=1.0, **options)


@pytest.mark.slow
@pytest.mark.parametrize("preset, lam, alpha", [("default", 4.5, 1.0), ("strict", 2.0, 1.3)])
def test_bundled_model(measured, preset, lam, alpha):
    wide = [
        Sample(picture(sample.image).crop((0, 150, 896, 700)), f"{sample.question}\nOne letter.")
        for sample in samples("crowded", "dev", 16)[12:]
    ]
    asked = [*samples("crowded", "dev", 12), *wide]
    compare(measured, f"CoF, bundled model, {preset}", SPECKS_LLAVA, asked, preset=preset, lam=lam, alpha=alpha)
