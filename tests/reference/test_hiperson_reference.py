"""HiPerson end to end against its reference on transformers: maps, boxes, reasoning, answers, passes."""

import functools

import pytest

pytest.importorskip("torch")

from agreement import Agreement, answers, both, tiny_samples
from hiperson_reference import SINGLE, THREE_STEPS, hiperson
from plain import Matcher

from jaxvqa.bundled import SPECKS_BLIP, SPECKS_LLAVA
from jaxvqa.specks.strata import samples

pytestmark = pytest.mark.parity

matcher_of = functools.cache(Matcher)
# The library's names of the reference's options.
NAMES = dict(rows="query_rows", neighbours="neighbourhood", neutral="q_ref", limit="max_new_tokens")
PROMPTS = dict(three_step=THREE_STEPS, single=SINGLE)


def compare(measured, name, setup, llava_folder, blip_folder, asked, *, prompt="three_step", **options):
    llava, vlm = both(llava_folder, setup)
    ours_options = {NAMES.get(key, key): value for key, value in options.items()}
    ours_options |= dict(prompt=prompt, matcher=str(blip_folder), extract="marker")
    with Agreement(measured, f"HiPerson, {name}") as agree:
        for image, question, ours in answers(asked, vlm, "hiperson", **ours_options):
            llava.margin, agree.samples = float("inf"), agree.samples + 1
            theirs = hiperson(llava, matcher_of(blip_folder), image, question, prompt=PROMPTS[prompt], **options)
            agree.maps(theirs["sem"], ours.grid)
            assert ours.forward_passes.total == theirs["passes"]
            if agree.same(theirs["box"], ours.boxes, theirs["lead"]):
                reasoning = next(entry.result for entry in ours.log if entry.kind == "Generate")
                if agree.same(theirs["reasoning"], reasoning, llava.margin):
                    agree.same(theirs["text"], ours.text, llava.margin)


@pytest.mark.parametrize(
    "setup, options",
    [
        ("pad", dict(template="vicuna_v1")),
        ("hf", dict(template="vicrop_hf", rows="last", area_norm=False, neighbours=8, prompt="single")),
        ("hf", dict(template="vicrop_hf", itm_layer=0, itm_rows="tokens_mean", relu="grad", align="none")),
        ("pad", dict(template="vicuna_v1", maps="rel", neutral="Write a general description of the image.")),
        ("pad", dict(template="vicuna_v1", maps="grad", itm_layer=1)),
    ],
)
def test_random_models(tiny_folder, tiny_matcher, measured, setup, options):
    options = dict(layer=2, rows="question", itm_layer=2, base=56, limit=8) | options
    name = f"random models, {setup}, {options.get('maps', 'both')}, {options['rows']}"
    compare(measured, name, setup, tiny_folder, tiny_matcher, tiny_samples(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("rows, itm_layer", [("last", 0), ("question", 2)])
def test_bundled_models(measured, rows, itm_layer):
    options = dict(template="vicuna_v1", layer=3, rows=rows, itm_layer=itm_layer, base=128)
    name = f"bundled models, {rows}, layer {itm_layer}"
    compare(measured, name, "pad", SPECKS_LLAVA, SPECKS_BLIP, samples("small", "dev", 8), **options)
